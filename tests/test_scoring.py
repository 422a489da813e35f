"""Metrics against a slow implementation of the definitions; intervals against the normal approximation."""

import json
import math
import random
from collections import defaultdict

import numpy as np
import pytest

from medground.records import Example
from medground.scoring import Prediction, blind_baseline, score

UNIT = (0.0, 0.0, 1.0, 1.0)


def random_box(rng):
    x, y = rng.uniform(0, 80), rng.uniform(0, 80)
    return (x, y, x + rng.uniform(1, 60), y + rng.uniform(1, 60))


def prediction(truth=(UNIT,), boxes=(UNIT,), phrase="nodule", category="nodule", patient="p", name="a", width=100):
    return Prediction(name, "images/a.png", width, 100, phrase, category, patient, truth, boxes, "", -1.0)


def example(phrase, boxes, category="nodule", width=100, height=100, name="a"):
    return Example(name, "images/a.png", width, height, phrase, boxes, category, name, name, "made", "train")


def values(predictions):
    found = score(predictions, resamples=50)["metrics"]
    return {name: (estimate["value"], estimate["n"]) for name, estimate in found.items()}


def test_every_metric_on_a_hand_made_set():
    truth = ((0.0, 0.0, 10.0, 10.0),)
    found = values(
        [
            prediction(truth, truth),  # IoU 1
            prediction(truth, ((0.0, 0.0, 5.0, 10.0),)),  # IoU 1/2 exactly: not above 0.5; its centre is inside
            prediction(truth, ((20.0, 20.0, 30.0, 30.0),)),  # IoU 0
            prediction(truth, ()),
            prediction(truth, None),
            prediction((), ()),
            prediction((), truth),
            prediction((), None),
        ]
    )
    assert found["miou"] == (pytest.approx(1.5 / 5), 5)
    assert found["acc@0.3"] == (2 / 5, 5)
    assert found["acc@0.5"] == (1 / 5, 5)
    assert found["acc@0.7"] == (1 / 5, 5)
    assert found["centre_hit"] == (2 / 5, 5)
    assert found["absent"] == (pytest.approx(1 / 3), 3)
    assert found["false_empty"] == (1 / 5, 5)
    assert found["parse_failures"] == (2 / 8, 8)
    assert found["side"] == (None, 0)


@pytest.mark.parametrize(
    "phrase, truth, boxes, want",
    [
        ("left nodule", (70.0, 0.0, 90.0, 9.0), ((51.0, 0.0, 53.0, 9.0),), 1),
        ("Left nodule", (70.0, 0.0, 90.0, 9.0), ((40.0, 0.0, 59.0, 9.0),), 0),
        ("RIGHT-sided effusion", (10.0, 0.0, 20.0, 9.0), ((10.0, 0.0, 20.0, 9.0), (70.0, 0.0, 80.0, 9.0)), 1),
        ("right effusion", (10.0, 0.0, 20.0, 9.0), ((70.0, 0.0, 80.0, 9.0), (10.0, 0.0, 20.0, 9.0)), 0),
        ("right effusion", (10.0, 0.0, 20.0, 9.0), ((0.0, 0.0, 100.0, 9.0),), 0),  # the midline is no side
        ("right effusion", (10.0, 0.0, 20.0, 9.0), ((20.0, 9.0, 10.0, 0.0),), 0),
        ("right effusion", (10.0, 0.0, 20.0, 9.0), (), 0),
        ("right effusion", (10.0, 0.0, 20.0, 9.0), None, 0),
        ("right more than left effusion", (10.0, 0.0, 20.0, 9.0), ((10.0, 0.0, 20.0, 9.0),), None),
        ("cleft upright shape", (10.0, 0.0, 20.0, 9.0), ((10.0, 0.0, 20.0, 9.0),), None),
        ("left midline tube", (40.0, 0.0, 60.0, 9.0), ((40.0, 0.0, 60.0, 9.0),), None),
    ],
)
def test_side(phrase, truth, boxes, want):
    assert values([prediction((truth,), boxes, phrase=phrase)])["side"] == (want, 0 if want is None else 1)


def test_side_leaves_out_absent_records():
    assert values([prediction((), (UNIT,), phrase="left nodule")])["side"] == (None, 0)


def test_intervals_agree_with_the_normal_approximation():
    rng = random.Random(2)
    truth = (0.0, 0.0, 10.0, 10.0)
    predictions = [
        prediction((truth,), ((0.0, 0.0, 10 * rng.random() + 1e-6, 10.0),), patient=f"p{i}") for i in range(400)
    ]
    found = score(predictions)["metrics"]["miou"]
    ious = np.array([p.iou for p in predictions])
    half = 1.96 * ious.std(ddof=1) / math.sqrt(len(ious))
    assert found["value"] == pytest.approx(ious.mean())
    assert found["low"] == pytest.approx(ious.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(ious.mean() + half, abs=0.1 * half)


def test_the_bootstrap_draws_patients_not_records():
    rng = random.Random(3)
    predictions, sums = [], defaultdict(lambda: [0.0, 0])
    for patient in range(60):
        right, size = rng.random() < 0.5, rng.randrange(1, 12)
        for _ in range(size):
            predictions.append(prediction(boxes=(UNIT,) if right else (), patient=f"p{patient}"))
        sums[patient] = [size * right, size]
    found = score(predictions)["metrics"]["miou"]
    slow = []
    for _ in range(4000):
        drawn = [sums[rng.randrange(60)] for _ in range(60)]
        slow.append(sum(d[0] for d in drawn) / sum(d[1] for d in drawn))
    low, high = np.percentile(slow, [2.5, 97.5])
    assert found["low"] == pytest.approx(low, abs=0.02)
    assert found["high"] == pytest.approx(high, abs=0.02)
    alone = score([prediction(boxes=p.boxes, patient=f"r{i}") for i, p in enumerate(predictions)])["metrics"]["miou"]
    assert alone["high"] - alone["low"] < 0.6 * (found["high"] - found["low"])


def test_rare_metrics_keep_an_interval_within_bounds():
    predictions = [prediction(patient=f"p{i}") for i in range(50)]
    predictions.append(prediction((), (), patient="rare"))
    absent = score(predictions, resamples=500)["metrics"]["absent"]
    assert absent == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}


def test_score_is_json_and_repeats_itself():
    predictions = [prediction(boxes=(UNIT,) if i % 3 else None, patient=f"p{i % 7}") for i in range(30)]
    once = score(predictions, resamples=200, seed=5)
    assert json.loads(json.dumps(once, allow_nan=False)) == once == score(predictions, resamples=200, seed=5)


def test_by_category_holds_its_own_records():
    predictions = [prediction(patient=f"p{i}", category="mass") for i in range(4)]
    predictions += [prediction(boxes=(), patient=f"p{i}", category="effusion") for i in range(3)]
    predictions.append(prediction((), (), category="effusion"))
    found = score(predictions, resamples=50)["by_category"]
    assert list(found) == ["effusion", "mass"]
    assert found["mass"]["acc@0.5"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 4}
    assert found["effusion"]["miou"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least one prediction"):
        score([])
    with pytest.raises(ValueError, match="resamples >= 1; got 0"):
        score([prediction()], resamples=0)
    with pytest.raises(ValueError, match="got 1 without"):
        blind_baseline([example("nodule", ())], [example("nodule", (UNIT,))])


def test_a_row_is_the_line_of_the_run_folder():
    line = json.loads(json.dumps(prediction(boxes=None).row()))
    names = "id image width height phrase category patient truth boxes completion logp iou"
    assert " ".join(line) == names
    assert line["boxes"] is None and line["iou"] == 0 and line["truth"] == [list(UNIT)]


def test_the_blind_answer_is_the_best_constant_of_its_phrase():
    left, right = (60.0, 0.0, 80.0, 20.0), (20.0, 0.0, 40.0, 20.0)
    outlier = (0.0, 80.0, 10.0, 90.0)
    # twice the size: boxes are compared as fractions of the image
    train = [example("left nodule", (left,), name=f"l{i}") for i in range(3)]
    train += [
        example("left nodule", (tuple(2 * v for v in left),), width=200, height=200),
        example("left nodule", (outlier,)),
    ]
    train += [example("right nodule", (right,)), example("no box", ())]
    test = [example("Left nodule ", (left,)), example("right nodule", (right,), name="b")]
    assert blind_baseline(train, test)["metrics"]["miou"]["value"] == pytest.approx(1.0)
    large = [example("left nodule", (tuple(2 * v for v in left),), width=200, height=200)]
    assert blind_baseline(train, large)["metrics"]["miou"]["value"] == pytest.approx(1.0)
    swapped = [example("left nodule", (right,)), example("right nodule", (left,), name="b")]
    assert blind_baseline(train, swapped)["metrics"]["miou"]["value"] == 0


def test_the_median_box_is_a_candidate():
    train = [
        example("mass", ((20.0 + dx, 20.0, 60.0 + dx, 60.0 + dy),)) for dx, dy in ((-15, 0), (0, 20), (0, -20), (15, 0))
    ]
    test = [example("mass", ((20.0, 20.0, 60.0, 60.0),))]
    assert blind_baseline(train, test)["metrics"]["miou"]["value"] == pytest.approx(1.0)


def test_an_unseen_phrase_backs_off_by_side_then_category_then_everything():
    mass_left, mass_right, effusion = (60.0, 0.0, 80.0, 20.0), (20.0, 0.0, 40.0, 20.0), (0.0, 80.0, 50.0, 100.0)
    train = [example("big left mass", (mass_left,), "mass"), example("big right mass", (mass_right,), "mass")]
    train += [example("mass", (mass_right,), "mass")] + [example("effusion", (effusion,), "effusion")] * 9

    def blind(phrase, box, category):
        return blind_baseline(train, [example(phrase, (box,), category)])["metrics"]["miou"]["value"]

    assert blind("tiny left mass", mass_left, "mass") == pytest.approx(1.0)
    assert blind("tiny mass", mass_right, "mass") == pytest.approx(1.0)
    assert blind("left and right mass", mass_right, "mass") == pytest.approx(1.0)
    assert blind("left rib fracture", effusion, "fracture") == pytest.approx(1.0)


def test_the_blind_answer_may_be_several_boxes():
    pair = ((10.0, 10.0, 30.0, 30.0), (60.0, 10.0, 90.0, 30.0))
    train = [example("bilateral effusions", pair)] * 3 + [example("bilateral effusions", pair[:1])]
    test = [example("bilateral effusions", pair[::-1])]
    assert blind_baseline(train, test)["metrics"]["miou"]["value"] == pytest.approx(1.0)
