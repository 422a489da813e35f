"""Predictions -> metrics with 95 % intervals, over all records and by category, side word and size.

`measures.py` defines the metrics, `bootstrap.py` the intervals. Where records were answered several times (`sample`),
each answer counts for its share of the record's answers, so that metrics are means over samples; `best_of_k` scores
each record by its answer of the largest IoU alone, as if somebody who knows the truth had chosen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medground.scoring.bootstrap import Group, group_sums, interval, resampled_sums
from medground.scoring.columns import Columns, Ints, columns_of, take
from medground.scoring.measures import COUNTS, RATIOS, counts_of, denominators, groups_of, ratios
from medground.scoring.prediction import Prediction
from medground.set_iou import Floats

Estimate = dict[str, Any]

RESAMPLES = 10_000


def score(predictions: Sequence[Prediction], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Every metric of measures.py, each with its interval.

    Args:
        predictions: of one evaluation.
        resamples: bootstrap resamples, >= 1.
        seed: of the bootstrap.

    Returns:
        {"metrics": {name: estimate}, "by_category": {category: {name: estimate}}, "by_side": {"none", "left", "right":
        likewise}, "by_size": {"small", "medium", "large": likewise}} with estimate = {"value", "low", "high", "n"}:
        value over n records (boxes for precision, recall and F1) and the bounds of its 95 % interval; these three are
        None where n is 0. A group without records is left out. With one patient the interval is the value: nothing is
        known of the spread. Where records have several answers, "best_of_k" has metrics, too.

    Raises:
        ValueError: there are no predictions, resamples < 1, or the answers of a record disagree about its truth.
    """
    if not predictions:
        raise ValueError("want at least one prediction to score; got none")
    return score_columns(columns_of(predictions), resamples, seed)


def score_columns(columns: Columns, resamples: int = RESAMPLES, seed: int = 0, legacy: bool = False) -> dict[str, Any]:
    """`score` of columns.

    Args:
        columns: of one record or more.
        resamples: as `score`.
        seed: as `score`.
        legacy: as `overlap`.

    Raises:
        ValueError: as `score` and `overlap`.
    """
    if resamples < 1:
        raise ValueError(f"want resamples >= 1; got {resamples}")
    counts = counts_of(columns, legacy)
    sampled = records_of(columns)
    groups = {"metrics": _whole(columns, counts)}
    if sampled is not None:
        best = take(columns, _best(sampled, counts["iou"] + counts["rightly empty"]))
        best_counts = counts_of(best, legacy)
        counts = {name: count / np.bincount(sampled)[sampled] for name, count in counts.items()}
        groups = {"metrics": _whole(columns, counts), "best_of_k": _whole(best, best_counts)}
    tables: list[tuple[str, str]] = []
    split: list[Group] = []
    for table, (group, names) in groups_of(columns).items():
        found = group_sums(columns.patient, group, len(names), [counts[name] for name in COUNTS])
        kept = [(name, part) for name, part in zip(names, found, strict=True) if name and len(part.patients)]
        tables += [(table, name) for name, _ in kept]
        split += [part for _, part in kept]
    every = [*groups.values(), *split]
    estimates = [
        _estimates(group, drawn)
        for group, drawn in zip(every, resampled_sums(every, len(columns.patients), resamples, seed), strict=True)
    ]
    out: dict[str, Any] = dict(zip(groups, estimates, strict=False))
    out |= {table: {} for table in ("by_category", "by_side", "by_size")}
    for (table, name), estimate in zip(tables, estimates[len(groups) :], strict=True):
        out[table][name] = estimate
    return out


def records_of(columns: Columns) -> Ints | None:
    """[N], number of the record of each answer, by first appearance; None where each record has one answer.

    Answers without a sample number are records of their own, whatever their ids.

    Raises:
        ValueError: answers of one record disagree about its truth or its patient.
    """
    if not (columns.sample >= 0).any():
        return None
    first: dict[str, int] = {}
    record = np.arange(len(columns))
    for row in np.flatnonzero(columns.sample >= 0).tolist():
        record[row] = first.setdefault(columns.ids[row], row)
    other = np.flatnonzero(record != np.arange(len(columns)))
    if not other.size:
        return None
    for row, origin in zip(other.tolist(), record[other].tolist(), strict=True):
        if not same_truth(columns, row, columns, origin):
            name = columns.ids[row]
            raise ValueError(f"record {name!r}: want one truth and one patient for all its answers; got several")
    return np.unique(record, return_inverse=True)[1]


def same_truth(a: Columns, i: int, b: Columns, j: int) -> bool:
    """Whether answer i of a and j of b speak of a record with the same true boxes and the same patient."""
    ours, theirs = (c.truth[c.truth_at[k] : c.truth_at[k + 1]] for c, k in ((a, i), (b, j)))
    return np.array_equal(ours, theirs) and a.patients[a.patient[i]] == b.patients[b.patient[j]]


def _whole(columns: Columns, counts: dict[str, Floats]) -> Group:
    (group,) = group_sums(columns.patient, np.zeros(len(columns), dtype=np.int64), 1, [counts[name] for name in COUNTS])
    return group


def _best(record: Ints, iou: Floats) -> Ints:
    """The answer of the largest IoU of each record; the first of several."""
    order = np.lexsort((np.arange(len(iou)), -iou, record))
    return order[np.diff(record[order], prepend=-1) > 0]


def _estimates(group: Group, drawn: Floats) -> dict[str, Estimate]:
    """Each metric of a group, with its interval over the resamples [resamples, S]."""
    total = group.sums.sum(0)
    value, n = ratios(total), denominators(total)
    low, high = interval(ratios(drawn))
    return {
        name: {"value": float(value[m]), "low": float(low[m]), "high": float(high[m]), "n": round(n[m])}
        if n[m] > 0
        else {"value": None, "low": None, "high": None, "n": 0}
        for m, name in enumerate(RATIOS)
    }
