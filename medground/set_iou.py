"""Box sets -> IoU: how well a list of boxes answers another, in numpy and float64.

    set IoU = max over one-to-one matchings of the summed IoU / max(boxes predicted, true boxes)

The evaluation's own: it shares no line with the reward that training optimises (`medground_kernels.box_iou`).
"""

from collections.abc import Iterable, Sequence

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


def set_ious(pred: Floats, truth: Floats) -> Floats:
    """Set IoU of [A, p, 4] with [B, t, 4], all pairs: [A, B]; p and t >= 1."""
    (A, p, _), (B, t, _) = pred.shape, truth.shape
    out = np.empty((A, B))
    rows = max(1, _CHUNK // (B * p * t))
    for start in range(0, A, rows):
        part = pred[start : start + rows]
        iou = box_ious(part[:, None, :, None], truth[None, :, None, :])  # [rows, B, p, t]
        out[start : start + rows] = _matched_sum(iou if p <= t else iou.swapaxes(2, 3)) / max(p, t)
    return out


def _matched_sum(iou: Floats) -> Floats:
    """Largest sum of a one-to-one matching in each [..., few, many] matrix, few <= many."""
    few, many = iou.shape[-2:]
    if few == 1:
        return iou.max((-2, -1))
    if few > EXACT_MATCHING:
        flat = iou.reshape(-1, few, many)
        return np.array([_greedy_sum(one) for one in flat]).reshape(iou.shape[:-2])
    # best[mask]: the largest sum that the columns so far give to the rows in mask
    best = np.zeros((1 << few, *iou.shape[:-2]))
    for column in range(many):
        before = best.copy()
        for mask in range(1, 1 << few):
            for row in range(few):
                if mask >> row & 1:
                    best[mask] = np.maximum(best[mask], before[mask & ~(1 << row)] + iou[..., row, column])
    return best[-1]


def _greedy_sum(iou: Floats) -> float:
    iou, total = iou.copy(), 0.0
    for _ in range(min(iou.shape)):
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        total += float(iou[row, column])
        iou[row], iou[:, column] = 0.0, 0.0
    return total
