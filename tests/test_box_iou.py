"""Overlaps of boxes and box sets against slow, obvious forms."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medground_kernels.box_iou import box_iou, matched_iou

pytestmark = pytest.mark.usefixtures("on_the_gpu")


def slow_iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    if not (a[2] > a[0] and a[3] > a[1] and b[2] > b[0] and b[3] > b[1]):
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union


def slow_matched(pred, truth):
    if not pred and not truth:
        return 1.0
    small, large = sorted((pred, truth), key=len)
    best = max(
        sum(slow_iou(a, b) for a, b in zip(small, chosen, strict=True))
        for chosen in itertools.permutations(large, len(small))
    )
    return best / len(large)


sides = st.integers(-3, 12)
boxes = st.lists(st.tuples(sides, sides, sides, sides), max_size=4)


@given(st.lists(st.tuples(boxes, boxes), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_sets_match_as_well_as_any_permutation(pairs):
    def pad(sets):
        width = max(len(s) for s in sets)
        out = torch.full((len(sets), width, 4), 5.0)  # what lies past the count must not matter
        for row, s in enumerate(sets):
            out[row, : len(s)] = torch.tensor(s, dtype=torch.float32).reshape(-1, 4)
        return out, torch.tensor([len(s) for s in sets])

    got = matched_iou(*pad([p for p, _ in pairs]), *pad([t for _, t in pairs]))
    want = torch.tensor([slow_matched(p, t) for p, t in pairs])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_boxes_that_are_none_overlap_nothing():
    nan, inf = float("nan"), float("inf")
    bad = torch.tensor([[3.0, 3, 1, 5], [2, 2, 2, 4], [nan, 0, 1, 1], [0, 0, inf, inf], [1e20, 0, 1e20, 1]])
    assert (box_iou(bad, torch.tensor([[0.0, 0, 10, 10]])) == 0).all()
    huge = torch.tensor([[0.0, 0, 1e20, 1e20]])
    assert box_iou(huge, huge) == 1


def test_many_boxes_are_matched_one_to_one():
    truth = torch.arange(40.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    shuffled = truth[torch.randperm(40)]
    count = torch.tensor(40)
    assert matched_iou(shuffled, count, truth, count) == 1
    twice = truth[:1].repeat(40, 1)
    assert matched_iou(twice, count, truth, count) == pytest.approx(1 / 40)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        box_iou(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="counts"):
        matched_iou(torch.zeros(2, 1, 4), torch.ones(3), torch.zeros(2, 1, 4), torch.ones(2))
