"""Vectorised metrics against the slow ones of slow_scoring.py, on random sets of answers."""

import dataclasses
import random

import numpy as np
import pytest
from slow_scoring import slow_metrics, slow_size, vlm_r1_iou

from medground.scoring import Prediction, record_scores, score
from medground.scoring.columns import columns_of, take
from medground.scoring.overlap import overlap
from medground.scoring.scores import score_columns

INF, NAN = float("inf"), float("nan")
UNIT = (0.0, 0.0, 1.0, 1.0)
ODD = ((9.0, 0.0, 3.0, 5.0), (4.0, 4.0, 4.0, 8.0), (NAN, 0.0, 5.0, 5.0), (0.0, 0.0, INF, 5.0), (0.0, 0.0, 1e200, 1e200))
PHRASES = ("left nodule", "right mass", "nodule", "left and right effusion", "Right-sided, cleft")


def random_box(rng):
    x, y = rng.uniform(0, 80), rng.uniform(0, 80)
    return (x, y, x + rng.choice((1, 3, 9, 60)) * rng.random() + 0.1, y + rng.uniform(1, 60))


def near(rng, box):
    return tuple(v + rng.uniform(-4, 4) for v in box)


def answer_to(rng, truth):
    """What a model might answer: nothing readable, nothing found, near the truth, anywhere, no box at all."""
    kind = rng.randrange(12)
    if kind == 0:
        return None
    if kind == 1:
        return ()
    if kind == 2:
        return (rng.choice(ODD), *(random_box(rng) for _ in range(rng.randrange(2))))
    if kind == 3:  # whole pixels, where an IoU may be a threshold exactly
        return tuple(tuple(float(round(v)) for v in box) for box in truth[:1])
    if kind < 6:
        return tuple(random_box(rng) for _ in range(rng.randrange(1, 4)))
    answer = [near(rng, box) for box in truth for _ in range(rng.randrange(1, 3))][:3]
    return tuple(rng.sample(answer, len(answer)))


def random_prediction(rng, name="a", category="c"):
    truth = tuple(random_box(rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3))))
    if rng.random() < 0.1:
        truth = tuple((40.0, box[1], 60.0, box[3]) for box in truth)  # on the midline
    boxes, phrase = answer_to(rng, truth), rng.choice(PHRASES)
    return Prediction(name, "", 100, 120, phrase, category, f"p{rng.randrange(9)}", truth, boxes, "", 0.0)


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        (found[name]["value"], found[name]["n"]) == (value if value is None else pytest.approx(value, abs=1e-9), n)
        for name, (value, n) in wanted.items()
    )


def test_ten_thousand_random_sets_score_as_slowly():
    rng = random.Random(0)
    sets = {
        f"set {i:05d}": [random_prediction(rng, category=f"set {i:05d}") for _ in range(rng.randrange(1, 4))]
        for i in range(10_000)
    }
    everything = [p for predictions in sets.values() for p in predictions]
    rng.shuffle(everything)
    found = score(everything, resamples=1)
    assert same(found["metrics"], slow_metrics(everything))
    assert found["by_category"].keys() == sets.keys()
    wrong = [
        name for name, predictions in sets.items() if not same(found["by_category"][name], slow_metrics(predictions))
    ]
    assert not wrong


def test_sets_alone_and_their_sides_and_sizes():
    rng = random.Random(1)
    words = {"left nodule": "left", "right mass": "right", "Right-sided, cleft": "right"}
    for _ in range(150):
        predictions = [random_prediction(rng) for _ in range(rng.randrange(1, 30))]
        found = score(predictions, resamples=3)
        assert same(found["metrics"], slow_metrics(predictions))
        for table, rule in (("by_side", lambda p: words.get(p.phrase, "none")), ("by_size", slow_size)):
            names = {rule(p) for p in predictions} - {None}
            assert found[table].keys() == names
            for name in names:
                assert same(found[table][name], slow_metrics([p for p in predictions if rule(p) == name]))


@pytest.mark.parametrize(("side", "size"), [(9.9, "small"), (10.0, "medium"), (31.6, "medium"), (31.7, "large")])
def test_sizes_begin_at_one_and_ten_per_cent(side, size):
    found = score([Prediction("a", "", 100, 100, "x", "c", "p", ((0.0, 0.0, side, side),), (), "", 0.0)], 1)
    assert list(found["by_size"]) == [size]


def test_scores_of_each_record_are_those_of_the_record_alone():
    rng = random.Random(5)
    predictions = [random_prediction(rng) for _ in range(200)]
    found = record_scores(predictions)
    for i, p in enumerate(predictions):
        for name, (value, _) in slow_metrics([p]).items():
            assert found[name][i] == pytest.approx(NAN if value is None else value, nan_ok=True)


def test_crowds_are_matched_greedily():
    boxes = tuple((10.0 * i, 0.0, 10.0 * i + 9, 9.0) for i in range(12))
    found = overlap(columns_of([Prediction("a", "", 200, 9, "x", "c", "p", boxes, boxes[::-1][:11], "", 0.0)]))
    assert found.iou[0] == pytest.approx(11 / 12) and found.matched[0] == 11
    assert found.giou[0] == pytest.approx((11 - 1) / 12)


def test_the_largest_matching_counts_not_the_best_sum():
    truth = ((0.0, 0.0, 100.0, 1.0), (24.0, 0.0, 126.0, 1.0))
    boxes = ((10.0, 0.0, 110.0, 1.0), (-40.0, 0.0, 65.0, 1.0))
    found = overlap(columns_of([Prediction("a", "", 200, 9, "x", "c", "p", truth, boxes, "", 0.0)]))
    assert found.matched[0] == 1  # (0, 1) alone would be IoU 0.46; (0, 0) and (0, 1) cannot both be
    moved = ((10.0, 0.0, 110.0, 1.0), (-30.0, 0.0, 75.0, 1.0))
    found = overlap(columns_of([Prediction("a", "", 200, 9, "x", "c", "p", truth, moved, "", 0.0)]))
    assert found.matched[0] == 2


def test_legacy_iou_is_that_of_vlm_r1():
    rng = random.Random(2)
    box = lambda: tuple(rng.choice((float, int))(rng.uniform(0, 12)) for _ in range(4))  # noqa: E731
    predictions = [Prediction("a", "", 9, 9, "x", "c", "p", (box(),), (box(),), "", 0.0) for _ in range(2000)]
    found = overlap(columns_of(predictions), legacy=True).iou
    for p, iou in zip(predictions, found, strict=True):
        assert iou == pytest.approx(vlm_r1_iou(p.boxes[0], p.truth[0]), abs=1e-12)
    edge = Prediction("a", "", 9, 9, "x", "c", "p", ((0.0, 0.0, 5.0, 5.0),), ((4.0, 0.0, 9.0, 5.0),), "", 0.0)
    assert overlap(columns_of([edge]), legacy=True).iou[0] == 0 < overlap(columns_of([edge])).iou[0]


def test_legacy_iou_is_of_single_boxes():
    for truth, boxes, named in (((UNIT,), (UNIT, UNIT), "2 and 1"), ((UNIT, UNIT), (), "0 and 2")):
        several = Prediction("seven", "", 9, 9, "x", "c", "p", truth, boxes, "", 0.0)
        with pytest.raises(ValueError, match=rf"one box at most.* got {named} in record 'seven'"):
            score_columns(columns_of([several]), 1, legacy=True)


def test_two_empty_sets_agree_and_a_truth_without_size_has_none():
    found = overlap(columns_of([Prediction("a", "", 9, 9, "x", "c", "p", (), (), "", 0.0)]))
    assert (found.iou[0], found.giou[0], found.matched[0]) == (1, 1, 0)
    odd = Prediction("a", "", 9, 9, "x", "c", "p", ((NAN, 0.0, 5.0, 5.0),), (), "", 0.0)
    assert score([odd], 1)["by_size"] == {}


def test_several_answers_count_as_their_mean_and_as_the_best():
    rng = random.Random(3)
    predictions, means, bests = [], [], []
    for i in range(40):
        first = dataclasses.replace(random_prediction(rng, f"r{i}"), sample=0, truth=(random_box(rng),))
        answers = [dataclasses.replace(first, sample=k, boxes=answer_to(rng, first.truth)) for k in range(1 + i % 4)]
        predictions += answers
        means.append(sum(p.iou for p in answers) / len(answers))
        bests.append(max(answers, key=lambda p: p.iou))
    rng.shuffle(predictions)
    found = score(predictions, resamples=20)
    assert found["metrics"]["miou"]["value"] == pytest.approx(sum(means) / 40)
    assert found["metrics"]["miou"]["n"] == found["best_of_k"]["miou"]["n"] == 40
    assert found["best_of_k"]["miou"]["value"] == pytest.approx(sum(p.iou for p in bests) / 40)
    assert found["best_of_k"]["acc@0.5"]["value"] == sum(p.iou > 0.5 for p in bests) / 40
    assert found["by_side"].keys() == {"left", "right", "none"}


def test_the_best_answer_where_there_is_nothing_is_nothing():
    false, true = (Prediction("a", "", 9, 9, "x", "c", "p", (), b, "", 0.0, sample=len(b)) for b in ((UNIT,), ()))
    found = score([false, true], 1)
    assert (found["metrics"]["absent"]["value"], found["best_of_k"]["absent"]["value"]) == (0.5, 1)


def test_answers_of_one_record_have_one_truth():
    first = Prediction("a", "", 9, 9, "x", "c", "p", (UNIT,), (UNIT,), "", 0.0, sample=0)
    for changed in ({"truth": ()}, {"patient": "q"}):
        with pytest.raises(ValueError, match="record 'a': want one truth and one patient"):
            score([first, dataclasses.replace(first, sample=1, **changed)], 1)
    assert "best_of_k" not in score([first, dataclasses.replace(first, id="b")], 1)


def test_columns_give_back_what_was_taken():
    rng = random.Random(4)
    predictions = [random_prediction(rng, f"r{i}", f"c{i % 3}") for i in range(50)]
    rows = [7, 3, 3, 49, 0]
    taken = take(columns_of(predictions), np.array(rows))
    again = columns_of([predictions[row] for row in rows])
    assert taken.ids == again.ids and taken.boxes_at.tolist() == again.boxes_at.tolist()
    assert str(taken.boxes.tolist()) == str(again.boxes.tolist()) and taken.truth.tolist() == again.truth.tolist()
    assert [taken.patients[i] for i in taken.patient] == [predictions[row].patient for row in rows]
    assert [taken.categories[i] for i in taken.category] == [predictions[row].category for row in rows]
