"""Rewards against obvious cases, and their weighted sum."""

import pytest
import torch

from medground.config import RewardConfig
from medground.records import Answer
from medground.rewards.format import format_reward
from medground.rewards.spatial import answer_iou, spatial_reward
from medground.rewards.total import score_answers

BOX = (0.0, 0.0, 10.0, 10.0)
HALF = (0.0, 0.0, 10.0, 5.0)
FAR = (50.0, 50.0, 60.0, 60.0)


def answers(*box_sets, well_formed=True):
    return [Answer(boxes, well_formed) for boxes in box_sets]


def test_iou_of_answers():
    got = answer_iou(
        [
            answers((BOX,), (HALF,), (), None),
            answers((BOX,), (BOX, FAR), (FAR, BOX), ((10.0, 10.0, 0.0, 0.0),)),
            answers((), (BOX,), None, ()),
        ],
        [(BOX,), (BOX, FAR), ()],
    )
    want = [[1, 0.5, 0, 0], [0.5, 1, 1, 0], [1, 0, 0, 1]]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32))


def test_extra_boxes_cost():
    many = tuple((float(i), 0.0, i + 1.0, 1.0) for i in range(50))
    assert answer_iou([answers((BOX, *many))], [(BOX,)])[0, 0] == pytest.approx(1 / 51)


def test_hard_is_strictly_above_the_threshold():
    iou = torch.tensor([[0.5, 0.51, 0.0]])
    assert spatial_reward(iou, "hard", 0.5).tolist() == [[0, 1, 0]]
    assert spatial_reward(iou, "soft", 0.5) is iou


def test_total_is_the_weighted_sum():
    groups = [[Answer((BOX,), True), Answer((HALF,), False)], [Answer(None, False), Answer((), True)]]
    rewards = score_answers(groups, [(BOX,), ()], RewardConfig(format_weight=0.25, spatial_weight=2.0))
    assert rewards.format.tolist() == format_reward(groups).tolist() == [[1, 0], [0, 1]]
    torch.testing.assert_close(rewards.total, torch.tensor([[2.25, 1.0], [0.0, 2.25]]))
