"""`medground eval compare`: how two files of predictions over the same records differ, with paired intervals.

Both sides of a resample draw the same patients (bootstrap.py), so that what makes a patient hard for both cancels.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from medground.scoring.bootstrap import group_sums, interval, resampled_sums
from medground.scoring.columns import Columns, Ints
from medground.scoring.measures import COUNTS, RATIOS, counts_of, denominators, ratios
from medground.scoring.reading import find_predictions, read_columns
from medground.scoring.scores import RESAMPLES, records_of, same_truth
from medground.scoring.text import render_comparison
from medground.set_iou import Floats

SHOWN = 20  # ids of a list in an error; the rest are counted


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Differences B - A of every metric between two files of predictions over the same records."""

    a: tyro.conf.Positional[str]
    """Predictions as in docs/run_folder.md, or the folder of a run or an evaluation."""
    b: tyro.conf.Positional[str]
    """The same of what is compared with A."""
    json: bool = False
    """Print everything as JSON."""
    resamples: int = RESAMPLES
    """Bootstrap resamples."""
    seed: int = 0
    """Of the bootstrap."""


def run_compare(config: CompareConfig) -> None:
    """Compare the files and print.

    Raises:
        ValueError: a file is not as docs/run_folder.md has it, or they are not over the same records.
    """
    found = compare(find_predictions(config.a), find_predictions(config.b), config.resamples, config.seed)
    text = json.dumps(found, indent=1, allow_nan=False) if config.json else render_comparison(found)
    sys.stdout.write(text + "\n")


def compare(a: Path, b: Path, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Every metric of both files and its difference.

    Args:
        a: a file of predictions.
        b: another, over the same ids in any order, with the same truth and patients. Where a record has several
            answers, their mean counts.
        resamples: bootstrap resamples, >= 1.
        seed: of the bootstrap.

    Returns:
        {"a", "b", "n": records, "patients", "resamples", "seed", "notes", "metrics": {name: {"a", "b", "difference":
        b - a, "low", "high", "n": what A's value is over, "n_b"}}}; difference and bounds None where a side has none.

    Raises:
        ValueError: as `run_compare`; lists ids that either side lacks.
    """
    if resamples < 1:
        raise ValueError(f"--resamples: want >= 1; got {resamples}")
    loaded = [read_columns(path) for path in (a, b)]
    left, right = (one.columns for one in loaded)
    order = _paired((a, left), (b, right))
    patient = left.patient[_first_rows(left, order[0])]
    sums = [
        np.stack([np.bincount(record, count) / np.bincount(record) for count in _counts(columns)])
        for columns, record in zip((left, right), order, strict=True)
    ]
    (group,) = group_sums(patient, np.zeros_like(patient), 1, [*sums[0], *sums[1]])
    (drawn,) = resampled_sums([group], len(left.patients), resamples, seed)
    return {
        "a": str(a),
        "b": str(b),
        "n": len(patient),
        "patients": len(left.patients),
        "resamples": resamples,
        "seed": seed,
        "metrics": _differences(group.sums.sum(0), drawn),
        "notes": [f"{path}: {note}" for path, one in zip((a, b), loaded, strict=True) for note in one.notes],
    }


def _differences(total: Floats, drawn: Floats) -> dict[str, Any]:
    half = len(COUNTS)
    (value_a, value_b), (n_a, n_b) = (
        [rule(s) for s in (total[:half], total[half:])] for rule in (ratios, denominators)
    )
    low, high = interval(ratios(drawn[:, half:]) - ratios(drawn[:, :half]))
    known = ~np.isnan(value_a) & ~np.isnan(value_b)
    return {
        name: {
            "a": None if np.isnan(value_a[m]) else float(value_a[m]),
            "b": None if np.isnan(value_b[m]) else float(value_b[m]),
            "difference": float(value_b[m] - value_a[m]) if known[m] else None,
            "low": float(low[m]) if known[m] else None,
            "high": float(high[m]) if known[m] else None,
            "n": round(n_a[m]),
            "n_b": round(n_b[m]),
        }
        for m, name in enumerate(RATIOS)
    }


def _paired(*sides: tuple[Path, Columns]) -> tuple[Ints, Ints]:
    """Number of the record of each answer of either side, by the order of A's ids.

    Raises:
        ValueError: an id is missing on a side, or the sides disagree about a record.
    """
    (a, left), (b, right) = sides
    for path, columns in sides:
        try:
            records_of(columns)  # its answers agree with each other
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    number = {name: i for i, name in enumerate(dict.fromkeys(left.ids))}
    theirs = dict.fromkeys(right.ids)
    missing = [
        f"{path}: {len(names)} ids are missing that {other} has: {_listed(names)}"
        for path, other, names in (
            (b, a, [name for name in number if name not in theirs]),
            (a, b, [name for name in theirs if name not in number]),
        )
        if names
    ]
    if missing:
        raise ValueError("\n".join(["compare: want the same ids in both files", *missing]))
    order = tuple(np.array([number[name] for name in columns.ids]) for _, columns in sides)
    rows = [_first_rows(columns, record) for (_, columns), record in zip(sides, order, strict=True)]
    others = [
        left.ids[i] for i, j in zip(*(r.tolist() for r in rows), strict=True) if not same_truth(left, i, right, j)
    ]
    if others:
        raise ValueError(
            f"compare: want the same true boxes and patients in {a} and {b}; they differ in {len(others)} records: "
            f"{_listed(others)}"
        )
    return order[0], order[1]


def _counts(columns: Columns) -> list[Floats]:
    counts = counts_of(columns)
    return [counts[name] for name in COUNTS]


def _first_rows(columns: Columns, record: Ints) -> Ints:
    """[records], the first answer of each."""
    assert len(record) == len(columns)
    return np.unique(record, return_index=True)[1]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
