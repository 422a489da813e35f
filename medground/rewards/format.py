"""Format reward: 1 for a completion of exactly the form that the prompt asks for, else 0.

    <think>T</think> <answer>A</answer>     and white space around them, no more

A is strict JSON: an object with `bbox_2d` of four numbers, or a list of such. Under chain-of-box and brief-chain T also
names a box or more, and nothing in it only looks like one: a malformed box in the thought voids the reward, as in
MedGround-R1 (arXiv:2507.02994).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medground.config import CHAINED, Template
from medground.records import Answer


def format_reward(answers: Sequence[Sequence[Answer]], template: Template = "patient-side") -> Tensor:
    """Score B groups of G answers to a template: [B, G], float32, 0 or 1."""
    if template in CHAINED:
        return torch.tensor([[float(answer.chained) for answer in group] for group in answers])
    return torch.tensor([[float(answer.well_formed) for answer in group] for group in answers])
