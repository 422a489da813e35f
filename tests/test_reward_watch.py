"""The watch on rewards: rank correlation, sizes of boxes over ranks, and when a warning is due."""

import json

import numpy as np
import pytest
import torch

from medground.records import Answer, Example, Group, Prompt
from medground.reward_watch import WINDOW, RewardWatch, answer_metrics, rank_correlation
from medground.rewards.total import Rewards


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([1, 2, 3], [10, 20, 1000], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486833),  # ties share their mean rank
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_rank_correlation(a, b, want):
    assert rank_correlation(a, b) == (None if want is None else pytest.approx(want))


class TwoRanks:
    """Gathers what this rank has and what another one had."""

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        self.mine = value
        return [value, self.other] if self.other else [value]


def step(boxes, total, iou):
    none = torch.empty(0)
    example = Example("r", "a.png", 100, 50, "mass", (), "mass", "p", "s", "t", "train")
    group = Group(Prompt(example, none, none, none, none, (), 112, 56), ())
    rewards = Rewards(torch.tensor([total]), {}, {}, torch.tensor([iou]))
    return [group], [[Answer(b) for b in boxes]], rewards


def test_boxes_of_all_ranks_are_counted():
    whole, half, dot = (0.0, 0.0, 100.0, 50.0), (0.0, 0.0, 50.0, 50.0), (9.0, 9.0, 10.0, 10.0)
    first = TwoRanks(None)
    alone = answer_metrics(*step([(whole,), None, ()], [0.0, 1.0, 2.0], [0.0, 0.1, 0.2]), first)
    assert alone == {"box_area": 1.0, "whole_boxes": 1.0, "tiny_boxes": 0.0, "reward_iou_corr": pytest.approx(1)}
    both = answer_metrics(*step([(half, dot), (dot,)], [3.0, 4.0], [-1.0, -2.0]), TwoRanks(first.mine))
    assert both["box_area"] == pytest.approx((1 + 0.5 + 2 / 5000) / 4)
    assert both["whole_boxes"] == 0.25 and both["tiny_boxes"] == 0.5
    assert both["reward_iou_corr"] == pytest.approx(rank_correlation([0, 1, 2, 3, 4], [0, 0.1, 0.2, -1, -2]))


def test_nothing_drawn_has_no_size():
    found = answer_metrics(*step([None, ()], [1.0, 1.0], [0.0, 0.0]), TwoRanks(None))
    assert set(found.values()) == {None}
    inverted = answer_metrics(*step([((60.0, 40.0, 20.0, 10.0),)], [1.0], [0.0]), TwoRanks(None))
    assert inverted["box_area"] == 0 and inverted["tiny_boxes"] == 1


def told(rewards, ious, watch=None):
    watch = watch or RewardWatch()
    return [s for s, pair in enumerate(zip(rewards, ious, strict=True)) if watch.observe(*pair)]


def noisy(slope, seed, steps=60):
    return np.random.default_rng(seed).normal(0, 0.02, steps) + slope * np.arange(steps)


def test_a_rising_reward_and_a_falling_iou_are_told():
    (first, *more) = told(0.5 + noisy(0.004, 0), 0.5 + noisy(-0.004, 1))
    assert 2 * WINDOW - 1 <= first < 2 * WINDOW + 5
    assert all(b - a >= 2 * WINDOW for a, b in zip([first, *more], more, strict=False))  # one turn is told once


@pytest.mark.parametrize(
    ("reward", "iou"), [(0.004, 0.004), (-0.004, -0.004), (-0.004, 0.004), (0.004, 0), (0, -0.004)]
)
def test_other_turns_are_not_told(reward, iou):
    assert not told(0.5 + noisy(reward, 2), 0.5 + noisy(iou, 3))


def test_noise_alone_is_seldom_told():
    alarms = sum(bool(told(noisy(0, 2 * seed, 200), noisy(0, 2 * seed + 1, 200))) for seed in range(50))
    assert alarms <= 1  # of fifty runs of 200 steps whose reward and IoU know nothing of one another


def test_the_state_goes_on_where_it_was():
    rewards, ious = 0.5 + noisy(0.004, 0), 0.5 + noisy(-0.004, 1)
    straight = told(rewards, ious)
    first = RewardWatch()
    part = told(rewards[:15], ious[:15], first)
    second = RewardWatch()
    second.load(json.loads(json.dumps({"skipped": 0} | first.state())))
    assert part + [15 + s for s in told(rewards[15:], ious[15:], second)] == straight
    RewardWatch().load({})
