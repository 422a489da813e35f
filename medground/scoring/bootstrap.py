"""Percentile bootstrap that draws patients, since findings of one patient are not independent.

Efron & Tibshirani 1993, chapters 8 and 13. A resample draws as many patients as there are, with replacement, each with
all its records; every group of records sees the same draws.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from medground.scoring.columns import Ints
from medground.set_iou import Floats

LEVEL = (2.5, 97.5)  # percentiles of the resamples that bound the interval
_WEIGHTS = 8_000_000  # numbers of draws held at a time: 64 MB
_TILE = 512  # patients turned at a time
_DRAWN = 16_000_000  # sums of resamples held at a time: 128 MB


class Group(NamedTuple):
    """A group of records by patient: `patients` [k] that have records in it, rising, and their summed counts [k, S]."""

    patients: Ints
    sums: Floats


def group_sums(patient: Ints, groups: Ints, count: int, counts: Sequence[Floats]) -> list[Group]:
    """The records of each group 0..count-1, summed by patient.

    Args:
        patient: [N], of each record.
        groups: [N], group of each record; -1 for none.
        count: how many groups there are.
        counts: S times [N].
    """
    inside = groups >= 0
    everywhere = bool(inside.all())
    size = int(patient.max(initial=0)) + 1
    keys = groups * size + patient
    cells, cell = np.unique(keys if everywhere else keys[inside], return_inverse=True)
    sums = np.empty((len(cells), len(counts)))
    for s, values in enumerate(counts):
        sums[:, s] = np.bincount(cell, values if everywhere else values[inside], minlength=len(cells))
    bounds = np.searchsorted(cells, np.arange(count + 1) * size)
    return [
        Group(cells[start:end] - group * size, sums[start:end]) for group, (start, end) in enumerate(pairwise(bounds))
    ]


def resampled_sums(groups: Sequence[Group], patients: int, resamples: int, seed: int) -> Iterator[Floats]:
    """For each group in turn, its sums in every resample, [resamples, S].

    Args:
        groups: of records.
        patients: how many there are, over all groups.
        resamples: >= 1.
        seed: of the draws.
    """
    columns = max((group.sums.shape[1] for group in groups), default=1)
    together = max(1, _DRAWN // (resamples * columns))
    for start in range(0, len(groups), together):
        block = groups[start : start + together]
        drawn = [np.empty((resamples, group.sums.shape[1])) for group in block]
        for first, weights in _draws(patients, resamples, seed):  # the same draws for every block
            for group, out in zip(block, drawn, strict=True):
                mine = weights if len(group.patients) == patients else weights[group.patients]
                out[first : first + weights.shape[1]] = mine.T @ group.sums
        yield from drawn


def interval(values: Floats) -> tuple[Floats, Floats]:
    """Bounds of the 95 % interval of each column of [resamples, M]; nan, which says nothing, is left out.

    A resample may hold no record that a metric applies to. A column of nan alone has bounds nan.
    """
    ordered = np.sort(values, axis=0)  # nan last
    last = np.maximum(np.count_nonzero(~np.isnan(values), axis=0) - 1, 0)
    bounds = []
    for percent in LEVEL:
        place = percent / 100 * last
        below = np.floor(place).astype(np.int64)
        low, high = (np.take_along_axis(ordered, at[None], 0)[0] for at in (below, np.minimum(below + 1, last)))
        bounds.append(low + (high - low) * (place - below))
    return bounds[0], bounds[1]


def clustered_means(scores: Floats, patients: Sequence[str], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Mean and 95 % interval of each column, resampled by patient.

    Args:
        scores: [records, M], float64; nan where a metric does not apply.
        patients: of each record.
        resamples: bootstrap resamples, >= 1.
        seed: of the bootstrap.

    Returns:
        An estimate of each column, as `scores.score` has them.
    """
    names, patient = np.unique(np.array(patients), return_inverse=True)
    M, applies = scores.shape[1], ~np.isnan(scores)
    counts = np.concatenate([np.where(applies, scores, 0.0), applies], axis=1)
    (group,) = group_sums(patient, np.zeros_like(patient), 1, list(counts.T))
    (drawn,) = resampled_sums([group], len(names), resamples, seed)
    with np.errstate(invalid="ignore"):
        low, high = interval(drawn[:, :M] / drawn[:, M:])
    total, n = group.sums[:, :M].sum(0), group.sums[:, M:].sum(0)
    return [
        {"value": float(total[m] / n[m]), "low": float(low[m]), "high": float(high[m]), "n": int(n[m])}
        if n[m]
        else {"value": None, "low": None, "high": None, "n": 0}
        for m in range(M)
    ]


def _draws(patients: int, resamples: int, seed: int) -> Iterator[tuple[int, Floats]]:
    """(number of the first resample, how often each of the next resamples draws each patient [patients, rows]).

    Patients are rows, so that those of a group are copied whole rows at a time, ten times faster than columns.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS // patients)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        picks = rng.integers(patients, size=(size, patients))
        picks += np.arange(size)[:, None] * patients
        counts = np.bincount(picks.ravel(), minlength=size * patients).reshape(size, patients)
        weights = np.empty((patients, size))
        for first in range(0, patients, _TILE):  # a tile fits the cache: turned at once it takes three times as long
            weights[first : first + _TILE] = counts[:, first : first + _TILE].T
        yield start, weights
