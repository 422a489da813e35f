"""Box sets -> IoU: how well a list of boxes answers another, in numpy and float64.

    set IoU = max over one-to-one matchings of the summed IoU / max(boxes predicted, true boxes)

The evaluation's own: it shares no line with the reward that training optimises (`medground_kernels.box_iou`).
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from medground.records import Box

Floats = NDArray[np.float64]

EXACT_MATCHING = 8  # boxes on the smaller side up to which the matching is exact: 2**8 subsets
_CHUNK = 2_000_000  # elements of a temporary array: 16 MB


def set_iou(pred: Sequence[Box] | None, truth: Sequence[Box]) -> float:
    """Sum of the IoUs of the best one-to-one matching, divided by the larger number of boxes.

    Both sets empty give 1, an unreadable answer (None) gives 0. A box that is inverted, without area, or not
    finite overlaps nothing but counts as a box. With more than 8 boxes on both sides, pairs are matched greedily,
    largest IoU first: no better than the optimum, and at least half of it.

    Args:
        pred: boxes, xyxy, any unit; None when unreadable.
        truth: boxes in the same unit.

    Returns:
        From 0 to 1.
    """
    if pred is None:
        return 0.0
    if not pred or not truth:
        return float(not pred and not truth)
    return float(set_ious(box_array(pred)[None], box_array(truth)[None])[0, 0])


def box_array(boxes: Iterable[Box]) -> Floats:
    """Boxes as an array, [n, 4]."""
    return np.array(list(boxes), dtype=np.float64).reshape(-1, 4)


def box_ious(a: Floats, b: Floats) -> Floats:
    """[..., 4] against [..., 4], broadcast, to [...]; 0 where a box is inverted, without area or not finite."""
    with np.errstate(all="ignore"):
        valid = [(box[..., :2] < box[..., 2:]).all(-1) for box in (a, b)]
        shared = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
        union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
        iou = shared / union
    # a comparison with nan is false; areas that are infinite or beyond float64 give 0 or nan
    return np.where(valid[0] & valid[1] & np.isfinite(iou), iou, 0.0)


def box_gious(a: Floats, b: Floats) -> Floats:
    """Generalised IoU (Rezatofighi et al. 2019, arXiv:1902.09630), shapes as `box_ious`.

    giou = iou - (|c| - |a | b|) / |c|, c the smallest box around a and b; above -1, at most 1. It is -1 where a box is
    inverted, without area or not finite.
    """
    iou = box_ious(a, b)
    with np.errstate(all="ignore"):
        areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
        around = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
        valid = (a[..., :2] < a[..., 2:]).all(-1) & (b[..., :2] < b[..., 2:]).all(-1)
        giou = iou - (around - areas / (1 + iou)) / around  # |a | b| = (|a| + |b|) / (1 + iou)
    return np.where(valid & np.isfinite(giou), giou, -1.0)


def set_ious(pred: Floats, truth: Floats) -> Floats:
    """Set IoU of [A, p, 4] with [B, t, 4], all pairs: [A, B]; p and t >= 1."""
    (A, p, _), (B, t, _) = pred.shape, truth.shape
    out = np.empty((A, B))
    rows = max(1, _CHUNK // (B * p * t))
    for start in range(0, A, rows):
        part = pred[start : start + rows]
        iou = box_ious(part[:, None, :, None], truth[None, :, None, :])  # [rows, B, p, t]
        out[start : start + rows] = matched_sum(iou) / max(p, t)
    return out


def matched_sum(worth: Floats) -> Floats:
    """Largest sum of a one-to-one matching in each [..., p, t] matrix of numbers >= 0; greedy as `set_iou` says."""
    few, many = sorted(worth.shape[-2:])
    if few == 1:
        return worth.max((-2, -1))
    if few > EXACT_MATCHING:
        return _each(lambda one: float(sum(_greedy_picks(one))), worth)
    iou = worth if worth.shape[-1] == many else worth.swapaxes(-2, -1)
    # best[mask]: the largest sum that the columns so far give to the rows in mask
    best = np.zeros((1 << few, *iou.shape[:-2]))
    for column in range(many):
        before = best.copy()
        for mask in range(1, 1 << few):
            for row in range(few):
                if mask >> row & 1:
                    best[mask] = np.maximum(best[mask], before[mask & ~(1 << row)] + iou[..., row, column])
    return best[-1]


def matched_count(iou: Floats, threshold: float) -> Floats:
    """Most pairs with IoU > threshold of a one-to-one matching in each [..., p, t] matrix; greedy as `set_iou` says."""
    above = np.where(iou > threshold, iou, 0.0)
    if min(iou.shape[-2:]) > EXACT_MATCHING:
        return _each(lambda one: float(np.count_nonzero(_greedy_picks(one))), above)
    return matched_sum((above > 0).astype(np.float64))


def _each(rule: Callable[[Floats], float], matrices: Floats) -> Floats:
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return np.array([rule(one) for one in flat]).reshape(matrices.shape[:-2])


def _greedy_picks(worth: Floats) -> list[float]:
    worth, picks = worth.copy(), []
    for _ in range(min(worth.shape)):
        row, column = np.unravel_index(worth.argmax(), worth.shape)
        picks.append(float(worth[row, column]))
        worth[row], worth[:, column] = 0.0, 0.0
    return picks
