"""Format reward: 1 for a completion of exactly the form that the prompt asks for, else 0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medground.records import Answer


def format_reward(answers: Sequence[Sequence[Answer]]) -> Tensor:
    """Score B groups of G answers: [B, G], float32."""
    return torch.tensor([[float(answer.well_formed) for answer in group] for group in answers])
