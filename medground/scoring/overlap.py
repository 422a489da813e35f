"""Set IoU, set GIoU and matched boxes of every record at once: records with equal numbers of boxes go together.

    set GIoU = (sum of the GIoUs of the best one-to-one matching - boxes left over) / max(boxes predicted, true boxes)

The best matching is the one with the largest sum of GIoUs; a box left over counts -1, the worst that a GIoU can be,
as does a box that is inverted, without area or not finite. So the value lies from -1 to 1, and is 1 for equal sets.
An answer that is empty or cannot be read gives -1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from medground.scoring.columns import Columns, Ints
from medground.set_iou import EXACT_MATCHING, Floats, box_gious, box_ious, matched_count, matched_sum

MATCHED = 0.5  # a matched box has an IoU above this
_CHUNK = 2_000_000  # elements of a temporary array: 16 MB


class Overlap(NamedTuple):
    """Of each record [N], float64: set IoU, set GIoU, and boxes matched with IoU > 0.5.

    `matched` is the largest number of one-to-one pairs above the threshold. Two empty sets have IoU and GIoU 1. With
    more than 8 boxes on both sides matchings are greedy, as in `set_iou`.
    """

    iou: Floats
    giou: Floats
    matched: Floats


def overlap(columns: Columns, legacy: bool = False) -> Overlap:
    """Overlap of the predicted and the true boxes of every record.

    Args:
        columns: of N records.
        legacy: IoU in the form of VLM-R1 (`legacy_ious`), in place of the plain one; GIoU is the plain one.

    Raises:
        ValueError: legacy, and a record has two boxes or more, true or predicted; names the first such.
    """
    p, t = np.diff(columns.boxes_at), np.diff(columns.truth_at)
    if legacy and (several := np.flatnonzero((p > 1) | (t > 1))).size:
        first = several[0]
        raise ValueError(
            f"--legacy-iou: want one box at most, predicted and true; got {p[first]} and {t[first]} in record "
            f"{columns.ids[first]!r} ({several.size} such records)"
        )
    agree = columns.readable & (p == 0) & (t == 0)
    found = Overlap(agree.astype(np.float64), np.where(agree, 1.0, -1.0), np.zeros(len(p)))
    for rows, few, many in _alike(p, t):
        pred = columns.boxes[columns.boxes_at[rows][:, None] + np.arange(few)][:, :, None]
        truth = columns.truth[columns.truth_at[rows][:, None] + np.arange(many)][:, None]
        iou = legacy_ious(pred, truth) if legacy else box_ious(pred, truth)
        larger = max(few, many)
        found.iou[rows] = matched_sum(iou) / larger
        # a box left over adds nothing to the sum of 1 + GIoU
        found.giou[rows] = matched_sum(1 + box_gious(pred, truth)) / larger - 1
        found.matched[rows] = matched_count(iou, MATCHED)
    return found


def legacy_ious(a: Floats, b: Floats) -> Floats:
    """The IoU of VLM-R1's reward and evaluation, shapes as `box_ious`; 0 where it would divide by nothing.

    It takes 1 from the right and lower edges, compares, and adds 1 again. What remains of it: boxes that overlap by a
    pixel or less in width or height do not overlap. Elsewhere it is the plain IoU.
    """
    with np.errstate(all="ignore"):
        low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:] - 1, b[..., 2:] - 1)
        shared = np.where((low < high).all(-1), (high - low + 1).prod(-1), 0.0)
        iou = shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared)
    return np.where(np.isfinite(iou), iou, 0.0)


def _alike(p: Ints, t: Ints) -> Iterator[tuple[Ints, int, int]]:
    """(records, boxes predicted, true boxes) that have both, as many together as memory should hold."""
    both = np.flatnonzero((p > 0) & (t > 0))
    order = both[np.lexsort((t[both], p[both]))]
    ends = np.flatnonzero(np.diff(p[order], append=-1) | np.diff(t[order], append=-1)) + 1
    start = 0
    for end in ends.tolist():
        few, many = int(p[order[start]]), int(t[order[start]])
        each = 8 * few * many + (1 << min(few, many, EXACT_MATCHING))
        for first in range(start, end, step := max(1, _CHUNK // each)):
            yield order[first : min(first + step, end)], few, many
        start = end
