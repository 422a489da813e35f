"""Predictions -> metrics with 95 % intervals, over all records and by category, side word and size.

`measures.py` defines the metrics, `bootstrap.py` the intervals. Where records were answered several times (`sample`),
each answer counts for its share of the record's answers, so that metrics are means over samples; `best_of_k` scores
each record by its answer of the largest IoU alone, as if somebody who knows the truth had chosen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from medground.scoring.bootstrap import Group, group_sums, interval, resampled_sums
from medground.scoring.columns import SIDES, Columns, Ints, columns_of, take
from medground.scoring.measures import COUNTS, RATIOS, SIZES, counts_of, denominators, groups_of, ratios
from medground.scoring.prediction import Prediction
from medground.set_iou import Floats

Estimate = dict[str, Any]

RESAMPLES = 10_000
TABLES = ("by_category", "by_side", "by_size")


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
    record = records_of(columns)
    best: list[Group] = []
    if record is not None:
        chosen = take(columns, _best(record, counts["iou"] + counts["rightly empty"]))
        best = group_sums(chosen.patient, np.zeros_like(chosen.patient), 1, _listed(counts_of(chosen, legacy)))
        counts = {name: count / np.bincount(record)[record] for name, count in counts.items()}
    cells, group = _cells(columns)
    groups = [*group_sums(columns.patient, group, len(cells), _listed(counts)), *best]
    drawn = resampled_sums(groups, len(columns.patients), resamples, seed)
    out: dict[str, Any] = {"metrics": {}, **{table: {} for table in TABLES}}
    tables: dict[tuple[str, str], _Part] = {}
    for place, (cell, part) in enumerate(zip(cells, groups, strict=False)):
        found = _Part(part.sums.sum(0), next(drawn))
        for key in cell:
            tables[key] = tables[key] + found if key in tables else found
        # cells are sorted by category: what is complete is not kept
        for key in cell:
            if key[0] == "by_category" and (place + 1 == len(cells) or key not in cells[place + 1]):
                out[key[0]][key[1]] = tables.pop(key).estimates()
    for table, name in sorted(tables, key=_order):
        part_of = tables[table, name].estimates()
        out |= {table: part_of} if table == "metrics" else {table: out[table] | {name: part_of}}
    if best:
        out["best_of_k"] = _Part(best[0].sums.sum(0), next(drawn)).estimates()
    return out


def record_scores(predictions: Sequence[Prediction]) -> dict[str, Floats]:
    """Each metric of each answer by itself: by its name, [answers], nan for those that it does not apply to."""
    values = ratios(np.stack(_listed(counts_of(columns_of(predictions))), axis=1))
    return {name: values[:, m] for m, name in enumerate(RATIOS)}


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


class _Part(NamedTuple):
    """Summed counts of a group of records [S], and in every resample [resamples, S]."""

    sums: Floats
    drawn: Floats

    def __add__(self, other: "_Part") -> "_Part":  # type: ignore[override]
        return _Part(self.sums + other.sums, self.drawn + other.drawn)

    def estimates(self) -> dict[str, Estimate]:
        """Each metric, with its interval."""
        value, n = ratios(self.sums), denominators(self.sums)
        low, high = interval(ratios(self.drawn))
        return {
            name: {"value": float(value[m]), "low": float(low[m]), "high": float(high[m]), "n": round(n[m])}
            if n[m] > 0
            else {"value": None, "low": None, "high": None, "n": 0}
            for m, name in enumerate(RATIOS)
        }


def _cells(columns: Columns) -> tuple[list[list[tuple[str, str]]], Ints]:
    """Records that are in the same group of every table go together: their cell.

    Returns:
        The cells, sorted by category, each as the (table, name) that its records count for; each answer's cell [N].
    """
    tables = groups_of(columns)
    code = np.zeros(len(columns), dtype=np.int64)
    for group, names in tables.values():
        code = code * (len(names) + 1) + group + 1
    kinds, cell = np.unique(code, return_inverse=True)
    cells = []
    for kind in kinds.tolist():
        parts: list[tuple[str, str]] = []
        for table, (_, names) in reversed(tables.items()):
            kind, place = divmod(kind, len(names) + 1)
            parts += [(table, names[place - 1])] if place and names[place - 1] else []
        cells.append([("metrics", ""), *parts])
    return cells, cell


def _order(key: tuple[str, str]) -> tuple[int, int]:
    """Where a (table, name) stands in the output."""
    table, name = key
    return (*TABLES, "metrics").index(table), (*SIDES, *SIZES, "").index(name)


def _listed(counts: dict[str, Floats]) -> list[Floats]:
    return [counts[name] for name in COUNTS]


def _best(record: Ints, iou: Floats) -> Ints:
    """The answer of the largest IoU of each record; the first of several."""
    order = np.lexsort((np.arange(len(iou)), -iou, record))
    return order[np.diff(record[order], prepend=-1) > 0]
