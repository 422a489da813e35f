"""What is counted of each answer, and the metrics as ratios of sums of these counts.

    miou              set IoU, over records with at least one true box
    acc@0.3 0.5 0.7   set IoU > threshold (strict), over the same records
    giou              set GIoU (overlap.py), over the same records
    centre_hit        the first predicted box's centre lies in a true box, over the same records
    false_empty       answered by the empty list, over the same records
    side              the first predicted box's centre lies on the same half of the image as the first true box's
                      centre, over records with a true box, an image of known width and a phrase with one of the words
                      left and right, not both; 1 - side is the wrong-side rate
    absent            answered by the empty list, over records without a true box
    parse_failures    unreadable, over all records
    precision@0.5     boxes matched with IoU > 0.5 / boxes predicted, summed over all records
    recall@0.5        boxes matched / true boxes
    f1@0.5            2 boxes matched / (boxes predicted + true boxes)

The first eleven are means of a score per record; the last three are ratios of sums of boxes over all records, those
without a true box included, whose boxes are all too many. A centre on the midline lies on neither half: as a prediction
it is wrong; such a truth has no side to get right.
"""

import numpy as np

from medground.scoring.columns import SIDES, Bools, Columns, Ints
from medground.scoring.overlap import MATCHED, overlap
from medground.set_iou import Floats, box_ious

THRESHOLDS = (0.3, 0.5, 0.7)

SIZES = ("small", "medium", "large")
SIZE_LIMITS = (0.01, 0.1)
"""A record is small where its true boxes cover, on average, less than the first share of the image's area each, and
large from the second on."""

RATIOS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "miou": (("iou",), ("present",)),
    **{f"acc@{threshold}": ((f"above {threshold}",), ("present",)) for threshold in THRESHOLDS},
    "side": (("right side",), ("sided",)),
    "centre_hit": (("hit",), ("present",)),
    "absent": (("rightly empty",), ("without",)),
    "false_empty": (("wrongly empty",), ("present",)),
    "parse_failures": (("unreadable",), ("records",)),
    "giou": (("giou",), ("present",)),
    f"precision@{MATCHED}": (("matched",), ("predicted",)),
    f"recall@{MATCHED}": (("matched",), ("true",)),
    f"f1@{MATCHED}": (("matched", "matched"), ("predicted", "true")),
}
"""Metric -> counts whose sum is divided by the sum of the other counts."""

COUNTS = tuple(dict.fromkeys(name for pair in RATIOS.values() for part in pair for name in part))


def counts_of(columns: Columns, legacy: bool = False) -> dict[str, Floats]:
    """The counts of every answer: {name of COUNTS: [N], float64}.

    Args:
        columns: of N answers.
        legacy: as `overlap`.
    """
    found = overlap(columns, legacy)
    p, t = np.diff(columns.boxes_at), np.diff(columns.truth_at)
    present, empty = t > 0, columns.readable & (p == 0)
    answer, truth = _first_centres(columns.boxes, columns.boxes_at), _first_centres(columns.truth, columns.truth_at)
    width = columns.extent[:, 0]
    half, aimed = np.sign(truth[:, 0] - width / 2), np.sign(answer[:, 0] - width / 2)
    sided = present & (columns.side > 0) & (width > 0) & (np.abs(half) == 1)  # nan is no side
    counts = {
        "iou": np.where(present, found.iou, 0.0),
        **{f"above {threshold}": present & (found.iou > threshold) for threshold in THRESHOLDS},
        "giou": np.where(present, found.giou, 0.0),
        "present": present,
        "right side": sided & (half == aimed),
        "sided": sided,
        "hit": present & _hits(answer, columns),
        "rightly empty": ~present & empty,
        "without": ~present,
        "wrongly empty": present & empty,
        "unreadable": ~columns.readable,
        "records": np.ones(len(columns)),
        "matched": found.matched,
        "predicted": p,
        "true": t,
    }
    assert counts.keys() == set(COUNTS)
    return {name: count.astype(np.float64, copy=False) for name, count in counts.items()}


def ratios(sums: Floats) -> Floats:
    """Metrics of summed counts: [..., len(COUNTS)] -> [..., len(RATIOS)]; nan where nothing is divided by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        below = denominators(sums)
        return np.where(below > 0, sums @ _OVER / below, np.nan)


def denominators(sums: Floats) -> Floats:
    """What each metric is divided by, shapes as `ratios`: a number of records, or of boxes."""
    return sums @ _BELOW


def sizes(columns: Columns) -> Ints:
    """[N], position in SIZES; -1 without a true box, or where the image's size is not known."""
    t = np.diff(columns.truth_at)
    areas = (columns.truth[:, 2:] - columns.truth[:, :2]).prod(1)
    record = np.repeat(np.arange(len(t)), t)
    image = columns.extent.prod(1)
    known = (t > 0) & (image > 0)
    with np.errstate(all="ignore"):
        share = np.bincount(record, areas, minlength=len(t)) / t / image
    return np.where(known & np.isfinite(share), np.searchsorted(SIZE_LIMITS, share, side="right"), -1)


def groups_of(columns: Columns) -> dict[str, tuple[Ints, tuple[str, ...]]]:
    """Table -> (group of each answer [N], -1 for none; names of the groups)."""
    return {
        "by_category": (columns.category, tuple(columns.categories)),
        "by_side": (columns.side, SIDES),
        "by_size": (sizes(columns), SIZES),
    }


def _first_centres(boxes: Floats, at: Ints) -> Floats:
    """[N, 2], centre of each record's first box; nan where there is none, or none with an area."""
    has = np.diff(at) > 0
    first = boxes[at[:-1][has]]
    with np.errstate(all="ignore"):
        centre = np.where(box_ious(first, first)[:, None] > 0, (first[:, :2] + first[:, 2:]) / 2, np.nan)
    out = np.full((len(has), 2), np.nan)
    out[has] = centre
    return out


def _hits(centre: Floats, columns: Columns) -> Bools:
    t = np.diff(columns.truth_at)
    record = np.repeat(np.arange(len(t)), t)
    point = centre[record]
    inside = ((columns.truth[:, :2] <= point) & (point <= columns.truth[:, 2:])).all(1)
    return np.bincount(record, inside, minlength=len(t)) > 0


def _weights(part: int) -> Floats:
    """[len(COUNTS), len(RATIOS)], how often each count is in the upper (0) or lower (1) sum of each metric."""
    return np.array([[pair[part].count(name) for pair in RATIOS.values()] for name in COUNTS], dtype=np.float64)


_OVER, _BELOW = _weights(0), _weights(1)
