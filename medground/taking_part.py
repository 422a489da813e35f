"""Which completions the update learns from, and what each is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medground.config import LossConfig
from medground.records import Group
from medground_kernels.group_advantage import group_advantage

if TYPE_CHECKING:
    from medground.rewards.total import Rewards


def advantages_of(rewards: Rewards, config: LossConfig) -> Tensor:
    """Advantage of each completion over its group: [B, G], float32."""
    if not config.per_reward:
        return group_advantage(rewards.total, normalize=config.advantage)
    parts, weights = rewards.stacked()
    return group_advantage(parts, weights=weights, normalize=config.advantage, per_reward=True)


def taking_part(groups: Sequence[Group], rewards: Rewards, config: LossConfig) -> Tensor:
    """Which completions of this rank are in the update: [B, G], bool.

    Left out where it is asked for: groups without spread (`loss.drop_zero_spread`; their policy gradient is 0, but not
    their KL term) and completions that were cut at the token limit (`loss.mask_truncated`, DAPO's overlong filtering;
    they stay in their group's mean).
    """
    kept = torch.ones(rewards.total.shape, dtype=torch.bool)
    if config.drop_zero_spread:
        kept &= rewards.spread[:, None]
    if config.mask_truncated:
        kept &= torch.tensor([[rollout.finished for rollout in group.rollouts] for group in groups])
    return kept
