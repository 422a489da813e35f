"""Length reward: what a completion pays for coming close to the token limit.

    0 up to limit - buffer tokens, then falling evenly to -1 at the limit

The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, equation 13).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def length_reward(lengths: Sequence[Sequence[int]], limit: int, buffer: int) -> Tensor:
    """Score B groups of G completions: [B, G], float32 in -1..0.

    Args:
        lengths: tokens of each completion.
        limit: most tokens that a completion can have.
        buffer: tokens before the limit over which the penalty grows, >= 1.
    """
    return ((limit - buffer - torch.tensor(lengths, dtype=torch.float32)) / buffer).clamp(-1, 0)
