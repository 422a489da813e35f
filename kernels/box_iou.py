"""Overlap of boxes, and of sets of boxes.

    IoU(a, b) = area(a & b) / area(a | b),    boxes xyxy in continuous coordinates

The IoU of two sets is the best one-to-one matching's total IoU over the size of the larger set, so
that a box too many costs as much as a box missed. Two empty sets agree: 1.
"""

import torch
from torch import Tensor

_EXACT_UP_TO = 8  # boxes in the smaller set; 2**8 partial matchings


def box_iou(pred: Tensor, truth: Tensor) -> Tensor:
    """IoU of every pair of boxes.

    Args:
        pred: [..., P, 4], float32 xyxy, any unit.
        truth: [..., M, 4], the same unit and leading shape.

    Returns:
        [..., P, M], float32; 0 for a box that is empty, inverted, NaN or infinite.

    Raises:
        ValueError: shapes are not as above.
    """
    if pred.shape[-1:] != (4,) or truth.shape[-1:] != (4,) or pred.shape[:-2] != truth.shape[:-2]:
        raise ValueError(f"want pred [..., P, 4], truth [..., M, 4]; got {tuple(pred.shape)}, {tuple(truth.shape)}")
    # float64: the area of a box with sides of 1e20 pixels passes float32
    a, a_valid = _valid(pred.double())
    b, b_valid = _valid(truth.double())
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = sides.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    valid = a_valid.unsqueeze(-1) & b_valid.unsqueeze(-2)
    return (overlap / union.where(valid, torch.ones_like(union))).where(valid, torch.zeros_like(union)).float()


def matched_iou(pred: Tensor, pred_count: Tensor, truth: Tensor, truth_count: Tensor) -> Tensor:
    """IoU of sets of boxes under their best one-to-one matching.

    Args:
        pred: [..., P, 4], float32 xyxy; boxes past the count are ignored.
        pred_count: [...], int64, boxes predicted.
        truth: [..., M, 4], the same unit.
        truth_count: [...], int64, true boxes.

    Returns:
        [...], float32 in 0..1. The matching is the best one while the smaller of P and M is at most
        8; beyond, pairs are taken in order of their IoU.

    Raises:
        ValueError: shapes are not as above.
    """
    if pred.shape[:-2] != pred_count.shape or truth.shape[:-2] != truth_count.shape:
        raise ValueError(
            f"want counts of the boxes' leading shape; got {tuple(pred.shape)}, {tuple(pred_count.shape)}, "
            f"{tuple(truth.shape)}, {tuple(truth_count.shape)}"
        )
    iou = box_iou(pred, truth)
    P, M = iou.shape[-2:]
    here = torch.arange(P, device=iou.device) < pred_count[..., None]
    there = torch.arange(M, device=iou.device) < truth_count[..., None]
    iou = iou * (here[..., :, None] & there[..., None, :])
    total = _best_matching(iou if P >= M else iou.transpose(-1, -2))
    larger = torch.maximum(pred_count, truth_count)
    return torch.where(larger > 0, total / larger.clamp(min=1), torch.ones_like(total))


def _valid(boxes: Tensor) -> tuple[Tensor, Tensor]:
    finite = boxes.isfinite().all(-1)
    boxes = boxes.where(finite[..., None], torch.zeros_like(boxes))
    return boxes, finite & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def _best_matching(iou: Tensor) -> Tensor:
    """[..., P, M] with P >= M -> [...], the largest total IoU of a one-to-one matching."""
    M = iou.shape[-1]
    if M > _EXACT_UP_TO:
        return _greedy_matching(iou)
    # best[mask]: the largest total over the rows seen so far that uses exactly the columns in mask
    best = iou.new_full((*iou.shape[:-2], 1 << M), -torch.inf)
    best[..., 0] = 0.0
    for row in iou.unbind(-2):
        grown = best.clone()
        for m in range(M):
            without = [mask for mask in range(1 << M) if not mask >> m & 1]
            with_m = [mask | 1 << m for mask in without]
            grown[..., with_m] = torch.maximum(grown[..., with_m], best[..., without] + row[..., m, None])
        best = grown
    return best.amax(-1)


def _greedy_matching(iou: Tensor) -> Tensor:
    left = iou.clone()
    M = left.shape[-1]
    total = left.new_zeros(left.shape[:-2])
    for _ in range(M):
        value, index = left.flatten(-2).max(-1)
        total = total + value
        row, column = index // M, index % M
        left.scatter_(-2, row[..., None, None].expand(*row.shape, 1, M), 0.0)
        left.scatter_(-1, column[..., None, None].expand(*column.shape, left.shape[-2], 1), 0.0)
    return total
