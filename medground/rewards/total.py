"""The reward of a completion: the weighted sum of its rewards."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from medground.config import RewardConfig
from medground.records import Answer, Box
from medground.rewards.format import format_reward
from medground.rewards.spatial import answer_iou, spatial_reward


class Rewards(NamedTuple):
    """What B groups of G completions earned, all float32 [B, G]: each reward before its weight, their sum."""

    total: Tensor
    format: Tensor
    spatial: Tensor
    iou: Tensor


def score_answers(
    answers: Sequence[Sequence[Answer]], truths: Sequence[Sequence[Box]], config: RewardConfig
) -> Rewards:
    """Score a step's completions.

    Args:
        answers: B groups of G, boxes in original pixels.
        truths: the B prompts' true boxes, in original pixels.
        config: weights and kind of the spatial reward.
    """
    iou = answer_iou(answers, truths)
    form = format_reward(answers)
    spatial = spatial_reward(iou, config.spatial, config.threshold)
    return Rewards(config.format_weight * form + config.spatial_weight * spatial, form, spatial, iou)
