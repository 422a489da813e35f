"""Spatial reward: how well the answer's boxes cover the true ones.

soft is the IoU of the two sets (kernels/box_iou.py): for several boxes the best one-to-one matching over
the size of the larger set; for a phrase that the image does not show, the empty answer is right. hard is
1 where that exceeds a threshold: the paper's reward, which tells near misses nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medground.records import Answer, Box
from medground_kernels.box_iou import matched_iou


def answer_iou(answers: Sequence[Sequence[Answer]], truths: Sequence[Sequence[Box]]) -> Tensor:
    """IoU of each answer's boxes with the true ones.

    Args:
        answers: B groups of G, boxes in original pixels.
        truths: the B prompts' true boxes, in original pixels.

    Returns:
        [B, G], float32 in 0..1; an answer that cannot be read earns 0.
    """
    B, G = len(answers), len(answers[0])
    flat = [answer.boxes or () for group in answers for answer in group]
    repeated = [truth for truth in truths for _ in range(G)]
    iou = matched_iou(*_pad(flat), *_pad(repeated))
    readable = torch.tensor([answer.boxes is not None for group in answers for answer in group])
    return (iou * readable).reshape(B, G)


def spatial_reward(iou: Tensor, kind: str, threshold: float) -> Tensor:
    """Turn IoUs [B, G] into rewards [B, G]: soft keeps them, hard is 1 where they exceed `threshold`."""
    return iou if kind == "soft" else (iou > threshold).float()


def _pad(sets: Sequence[Sequence[Box]]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(boxes) for boxes in sets])
    padded = torch.zeros(len(sets), int(counts.max()), 4)
    for row, boxes in enumerate(sets):
        padded[row, : len(boxes)] = torch.tensor(boxes).reshape(-1, 4)
    return padded, counts
