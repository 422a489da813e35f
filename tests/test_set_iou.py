"""Set IoU against all pairings, and what counts as a box."""

import itertools
import math
import random

import pytest

from medground.set_iou import set_iou

INF, NAN = float("inf"), float("nan")
UNIT = (0.0, 0.0, 1.0, 1.0)


def slow_iou(a, b):
    for box in (a, b):
        if not all(math.isfinite(v) for v in box) or box[0] >= box[2] or box[1] >= box[3]:
            return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = width * height if width > 0 and height > 0 else 0.0
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_set_iou(pred, truth):
    if pred is None:
        return 0.0
    if not pred and not truth:
        return 1.0
    few, many = sorted((pred, truth), key=len)
    pairings = itertools.permutations(range(len(many)), len(few))
    best = max(sum(slow_iou(few[i], many[j]) for i, j in enumerate(chosen)) for chosen in pairings)
    return best / len(many)


def random_box(rng):
    x, y = rng.uniform(0, 80), rng.uniform(0, 80)
    return (x, y, x + rng.uniform(1, 60), y + rng.uniform(1, 60))


def test_matching_is_the_best_of_all_pairings():
    rng = random.Random(0)
    for _ in range(300):
        pred = tuple(random_box(rng) for _ in range(rng.randrange(6)))
        truth = tuple(random_box(rng) for _ in range(rng.randrange(6)))
        assert set_iou(pred, truth) == pytest.approx(slow_set_iou(pred, truth), abs=1e-12)


def test_the_best_pairing_is_not_the_greedy_one():
    pred = [(0.0, 0.0, 10.0, 1.0), (3.0, 0.0, 13.0, 1.0)]
    truth = [(1.0, 0.0, 11.0, 1.0), (-2.0, 0.0, 8.0, 1.0)]
    greedy = slow_iou(pred[0], truth[0]) + slow_iou(pred[1], truth[1])
    best = slow_iou(pred[0], truth[1]) + slow_iou(pred[1], truth[0])
    assert slow_iou(pred[0], truth[0]) > slow_iou(pred[0], truth[1]) and best > greedy
    assert set_iou(pred, truth) == pytest.approx(best / 2, abs=1e-12)
    # exact as long as one side is small
    far = [(100.0 * i, 50.0, 100.0 * i + 1, 51.0) for i in range(11)]
    assert set_iou(far + pred, truth) == pytest.approx(best / 13, abs=1e-12)
    assert set_iou(truth, far + pred) == pytest.approx(best / 13, abs=1e-12)


def test_eight_boxes_are_exact_and_many_boxes_stay_between_half_and_one():
    rng = random.Random(1)
    cells = [(10.0 * i, 0.0, 10.0 * i + 9, 9.0) for i in range(12)]
    shuffled = rng.sample(cells, 12)
    assert set_iou(shuffled[:8], [*cells, UNIT]) == pytest.approx(8 / 13)
    assert set_iou(shuffled, cells) == pytest.approx(1.0)
    assert set_iou(cells[:1] * 12, cells) == pytest.approx(1 / 12)
    crowd = [random_box(rng) for _ in range(40)]
    assert 0.5 <= set_iou(crowd, rng.sample(crowd, 40)) <= 1


@pytest.mark.parametrize(
    "bad",
    [
        (1.0, 0.0, 0.0, 1.0),
        (0.0, 1.0, 1.0, 0.0),
        (0.0, 0.0, 0.0, 1.0),
        (NAN, 0.0, 1.0, 1.0),
        (0.0, 0.0, INF, INF),
        (-INF, -INF, INF, INF),
        (0.0, 0.0, 1e300, 1e300),
    ],
)
def test_a_bad_box_overlaps_nothing_but_counts(bad):
    assert set_iou([bad], [UNIT]) == 0
    assert set_iou([UNIT, bad], [UNIT]) == 0.5
    assert set_iou([bad], [bad]) == 0
    assert set_iou([bad], []) == 0


def test_empty_and_unreadable():
    assert set_iou([], []) == 1
    assert set_iou([], [UNIT]) == 0
    assert set_iou([UNIT], []) == 0
    assert set_iou(None, []) == 0
    assert set_iou(None, [UNIT]) == 0
    assert set_iou([UNIT], [UNIT]) == 1
    assert set_iou([UNIT, UNIT], [UNIT]) == 0.5
