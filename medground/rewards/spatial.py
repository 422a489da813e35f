"""Spatial reward: how well the answer's boxes cover the true ones.

    soft        iou, of the two sets of boxes
    hard        1[iou > threshold]                     the paper's, which tells near misses nothing
    stepped     mean over thresholds t of 1[iou > t]
    curriculum  1[iou > tau], tau raised as the policy improves (curriculum.py)
    giou        (1 + GIoU) / 2 in place of IoU         also says how far off a box is that touches nothing

iou = largest sum over one-to-one matchings / boxes in the larger set (kernels/box_iou.py): a box too many costs as much
as one that is missing. For a phrase that the image does not show the empty answer is right: 1, and any box earns 0. An
answer that cannot be read earns 0 throughout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medground.config import RewardConfig
from medground.records import Answer, Box
from medground.rewards.assignment import best_total
from medground_kernels.box_iou import box_iou, matched_iou


def answer_iou(
    answers: Sequence[Sequence[Answer]], truths: Sequence[Sequence[Box]], device: torch.device | str = "cpu"
) -> Tensor:
    """IoU of each answer's boxes with the true ones, in one launch.

    Args:
        answers: B groups of G, boxes in original pixels.
        truths: the B prompts' true boxes, in original pixels.
        device: where it is computed.

    Returns:
        [B, G], float32 in 0..1, on the device; an answer that cannot be read earns 0.
    """
    pred, pred_count, truth, truth_count, readable = _sets(answers, truths, device)
    return (matched_iou(pred, pred_count, truth, truth_count) * readable).view(len(answers), -1)


def answer_giou(
    answers: Sequence[Sequence[Answer]], truths: Sequence[Sequence[Box]], device: torch.device | str = "cpu"
) -> Tensor:
    """The same with (1 + GIoU) / 2 of each pair; boxes that are none have 0. [B, G], float32 in 0..1, on the CPU."""
    pred, pred_count, truth, truth_count, readable = _sets(answers, truths, "cpu")
    pairs = (1 + box_iou(pred.to(device), truth.to(device), kind="giou")).div(2).tolist()
    totals = []
    for scores, n, m in zip(pairs, pred_count.tolist(), truth_count.tolist(), strict=True):
        totals.append(best_total([row[:m] for row in scores[:n]]) / max(n, m) if max(n, m) else 1.0)
    return (torch.tensor(totals) * readable).view(len(answers), -1)


def spatial_reward(iou: Tensor, config: RewardConfig, tau: float) -> Tensor:
    """Turn IoUs [B, G] into rewards [B, G], float32; for giou they are what `answer_giou` gives.

    Args:
        iou: of each answer.
        config: the kind and its thresholds.
        tau: the threshold where a curriculum is; of no meaning for the other kinds.
    """
    if config.spatial == "hard":
        return (iou > config.threshold).float()
    if config.spatial == "curriculum":
        return (iou > tau).float()
    if config.spatial == "stepped":
        return (iou[..., None] > torch.tensor(config.thresholds, device=iou.device)).float().mean(-1)
    return iou


def _sets(
    answers: Sequence[Sequence[Answer]], truths: Sequence[Sequence[Box]], device: torch.device | str
) -> list[Tensor]:
    """Predicted boxes [S, P, 4], their counts [S], true boxes [S, M, 4], their counts [S], and who can be read [S]."""
    G = len(answers[0])
    flat = [answer.boxes or () for group in answers for answer in group]
    readable = torch.tensor([answer.boxes is not None for group in answers for answer in group])
    sets = [*_pad(flat), *(part.repeat_interleave(G, 0) for part in _pad(truths)), readable]
    return [part.to(device, non_blocking=True) for part in sets]


def _pad(sets: Sequence[Sequence[Box]]) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([len(boxes) for boxes in sets])
    padded = torch.zeros(len(sets), int(counts.max()), 4)
    here = torch.arange(padded.shape[1]) < counts[:, None]
    padded[here] = torch.tensor([box for boxes in sets for box in boxes], dtype=torch.float32).reshape(-1, 4)
    return padded, counts
