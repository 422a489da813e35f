"""Files of predictions -> columns, or predictions one by one: lines as in docs/run_folder.md, checked as they are read.

What scoring needs must be there (REQUIRED), other fields may be (OPTIONAL). A file has one answer for each id, or
several that `sample` numbers. Every fault is named with its line, and a file with one is not read. Lines are checked
thousands at a time; those among which something is wrong one by one, to name it.
"""

import gzip
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np

from medground.datasets.faults import Faults
from medground.records import Box
from medground.scoring.columns import Builder, Columns
from medground.scoring.prediction import Prediction
from medground.set_iou import Floats

TEXTS = ("id", "phrase", "category", "patient")
REQUIRED = ("id", "width", "height", "phrase", "category", "patient", "truth", "boxes")
OPTIONAL = ("image", "completion", "logp", "thought_boxes", "iou", "sample")
PREDICTIONS = "predictions.jsonl"
LARGEST = 1e9  # pixels; a coordinate of a true box is below

Row = dict[str, Any]
_BATCH = 128  # lines that are checked together: what they hold stays in the cache
_NUMBERS = {float, int}
_KNOWN = {*REQUIRED, *OPTIONAL}
_SCORED = itemgetter(*REQUIRED)


@dataclass(frozen=True)
class Loaded:
    """What a file of predictions holds.

    Attributes:
        columns: its answers, in the order of the file.
        claimed_iou: [N], the file's own `iou`; nan where it has none.
        notes: what a reader of the scores should know, a sentence each.
        claims: what the file says of itself, for formats that do.
    """

    columns: Columns
    claimed_iou: Floats | None = None
    notes: list[str] = field(default_factory=list)
    claims: dict[str, Any] = field(default_factory=dict)


def find_predictions(name: str | Path) -> Path:
    """The file of predictions that a path means: itself, or of a run's or evaluation's folder.

    In a folder: `predictions.jsonl`; else the only `*.predictions.jsonl` in it or in its `eval`; else, of a run's
    evaluations of the whole test split with the true images, the last one.

    Raises:
        ValueError: there is no such file, or it is not clear which; names those there are.
    """
    path = Path(name)
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path}: want a file of predictions, or the folder of a run; got none")
        return path
    if (path / PREDICTIONS).is_file():
        return path / PREDICTIONS
    found = sorted([*path.glob(f"*.{PREDICTIONS}"), *path.glob(f"eval/*.{PREDICTIONS}")])
    whole = [file for file in found if re.fullmatch(rf"step-\d+\.{re.escape(PREDICTIONS)}", file.name)]
    if len(found) == 1 or whole:
        return max(whole or found, key=lambda file: file.name)
    there = ", ".join(str(file.relative_to(path)) for file in found) or "none"
    raise ValueError(f"{path}: want a folder with one file {PREDICTIONS} or *.{PREDICTIONS}; got {there}")


def read_columns(path: Path) -> Loaded:
    """The answers of a file.

    Raises:
        ValueError: the file is missing or empty, or a line is not as docs/run_folder.md has it; names each such line.
    """
    builder, claimed, others = Builder(), array("d"), Counter[str]()
    for rows in _batches(path):
        fields = list(zip(*map(_SCORED, rows), strict=True))
        builder.extend(zip(*fields, [row.get("sample") for row in rows], strict=True))
        claimed.extend([row.get("iou", np.nan) for row in rows])
        for name in set().union(*rows) - _KNOWN:
            others[name] += sum(name in row for row in rows)
    notes = [f"not used: field {name!r}, which {count} lines have" for name, count in sorted(others.items())]
    return Loaded(builder.columns(), np.frombuffer(claimed), notes)


def read_predictions(path: Path) -> Iterator[Prediction]:
    """The answers of a file, one at a time; "" and 0 where `image`, `completion` and `logp` are not given.

    Raises:
        ValueError: as `read_columns`, after the last line that is sound.
    """
    for row in chain.from_iterable(_batches(path)):
        yield Prediction(
            id=row["id"],
            image=row.get("image", ""),
            width=row["width"],
            height=row["height"],
            phrase=row["phrase"],
            category=row["category"],
            patient=row["patient"],
            truth=_boxes(row["truth"]),
            boxes=None if row["boxes"] is None else _boxes(row["boxes"]),
            completion=row.get("completion", ""),
            logp=row.get("logp", 0.0),
            thought_boxes=_boxes(row.get("thought_boxes", [])),
            sample=row.get("sample"),
        )


def _boxes(values: list[list[float]]) -> tuple[Box, ...]:
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in values)


def _batches(path: Path) -> Iterator[list[Row]]:
    """The rows of a file, thousands at a time, as long as all have been sound."""
    faults, seen, some = Faults(), _Seen(path), False
    with _open(path) as file:
        lines = enumerate(_lines(file, path), 1)
        while batch := list(islice(lines, _BATCH)):
            rows, numbers = _parsed(path, batch, faults)
            some = some or bool(rows) or bool(faults)
            if rows and not _sound(rows):
                wrong = [i for i, row in enumerate(rows) if not _sound([row])]
                for i in wrong:
                    _name_faults(f"{path}:{numbers[i]}", rows[i], faults)
                left = {*range(len(rows))} - {*wrong}
                rows, numbers = ([values[i] for i in sorted(left)] for values in (rows, numbers))
            seen.take(rows, numbers, faults)
            if rows and not faults:
                yield rows
    if not some:
        raise ValueError(f"{path}: want a line for each prediction; got an empty file")
    faults.raise_if_any(path, "docs/run_folder.md")


def _parsed(path: Path, lines: list[tuple[int, bytes]], faults: Faults) -> tuple[list[Any], list[int]]:
    """The values of lines that are not blank, and their numbers."""
    rows, numbers = [], []
    for number, line in lines:
        try:
            rows.append(json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            if line.strip():
                faults.add(f"{path}:{number}", "line", f"one JSON object in UTF-8 ({error})", line[:60])
    return rows, numbers


class _Seen:
    """Which ids and samples there were, and where."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._alone: dict[str, int] = {}  # id -> line
        self._sampled: dict[str, dict[int, int]] = {}  # id -> sample -> line

    def take(self, rows: list[Row], numbers: list[int], faults: Faults) -> None:
        """Note sound rows; a fault for each that is the same answer as one before, or one of several without sample."""
        names = {row["id"]: number for row, number in zip(rows, numbers, strict=True)}
        alone = not any("sample" in row for row in rows)
        if alone and len(names) == len(rows) and not self._sampled and self._alone.keys().isdisjoint(names):
            self._alone |= names
            return
        for row, number in zip(rows, numbers, strict=True):
            self._take(row["id"], row.get("sample"), number, faults)

    def _take(self, name: str, sample: int | None, number: int, faults: Faults) -> None:
        if sample is None:
            first = next(iter(self._sampled.get(name, {}).values()), None) or self._alone.setdefault(name, number)
        else:
            first = self._alone.get(name) or self._sampled.setdefault(name, {}).setdefault(sample, number)
        if first != number:
            wanted = f"one answer to each id, or several that `sample` numbers (line {first} has the same id)"
            faults.add(f"{self._path}:{number}", "id", wanted, name if sample is None else (name, sample))


def _open(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise ValueError(f"{path}: want a file that can be read; got {error.strerror}") from None


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError) as error:  # a damaged gzip file
        raise ValueError(f"{path}: want a file that can be read; got {error}") from None


def _sound(rows: list[Any]) -> bool:
    """Whether all lines have all fields in their form; `_name_faults` says what is wrong."""
    try:
        names, widths, heights, phrases, categories, patients, truth, boxes = zip(*map(_SCORED, rows), strict=True)
    except (KeyError, TypeError):
        return False
    return (
        all({*map(type, texts)} == {str} for texts in (names, phrases, categories, patients))
        and all(names)
        and all(patients)
        and all({*map(type, sides)} == {int} and min(sides) >= 1 for sides in (widths, heights))
        and {*map(type, truth)} == {list}
        and {*map(type, boxes)} <= {list, NoneType}
        and _are_true_boxes(list(chain.from_iterable(truth)))
        and _are_boxes(list(chain.from_iterable(filter(None, boxes))))
        and _sound_options(rows)
    )


def _sound_options(rows: list[Row]) -> bool:
    thoughts = [row["thought_boxes"] for row in rows if "thought_boxes" in row]
    return (
        all({type(row.get(name, 0.0)) for row in rows} <= _NUMBERS for name in ("logp", "iou"))
        and all({type(row.get(name, "")) for row in rows} == {str} for name in ("image", "completion"))
        and all(_is_sample(row["sample"]) for row in rows if "sample" in row)
        and {*map(type, thoughts)} <= {list}
        and _are_boxes(list(chain.from_iterable(thoughts)))
    )


def _is_sample(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < LARGEST)


def _are_boxes(boxes: list[Any]) -> bool:
    """Whether each is four numbers: any, NaN too, since a model may say them, save one that no float can hold."""
    if not {*map(type, boxes)} <= {list} or not {*map(len, boxes)} <= {4}:
        return False
    numbers = list(chain.from_iterable(boxes))
    return {*map(type, numbers)} <= _NUMBERS and all(abs(v) < 10**300 for v in numbers if type(v) is int)


def _are_true_boxes(boxes: list[Any]) -> bool:
    if not _are_boxes(boxes):
        return False
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return bool((np.abs(corners) < LARGEST).all() and (corners[:, :2] < corners[:, 2:]).all())


def _name_faults(where: str, row: Any, faults: Faults) -> None:
    before = len(faults)
    if not isinstance(row, dict):
        faults.add(where, "line", "one JSON object", row)
        return
    for name in REQUIRED:
        if name not in row:
            faults.say(f"{where}: {name}: missing; a prediction has {', '.join(REQUIRED)}")
    for name in (*TEXTS, "image", "completion"):
        value = row.get(name, "?")
        if type(value) is not str or (not value and name in ("id", "patient")):
            faults.add(where, name, "a text" + " that is not empty" * (name in ("id", "patient")), value)
    for name in ("width", "height"):
        if type(row.get(name, 1)) is not int or row.get(name, 1) < 1:
            faults.add(where, name, "a whole number of pixels >= 1", row[name])
    _name_faulty_boxes(where, row, faults)
    if not _is_sample(row.get("sample")):
        faults.add(where, "sample", "a whole number >= 0", row["sample"])
    for name in ("logp", "iou"):
        if type(row.get(name, 0.0)) not in (int, float):
            faults.add(where, name, "a number", row[name])
    assert len(faults) > before, f"{where}: not sound, and no fault named"


def _name_faulty_boxes(where: str, row: Row, faults: Faults) -> None:
    for name, sound, wanted in (
        ("truth", _are_true_boxes, "four numbers [x1, y1, x2, y2], x1 < x2 and y1 < y2"),
        ("boxes", _are_boxes, "four numbers [x1, y1, x2, y2]"),
        ("thought_boxes", _are_boxes, "four numbers [x1, y1, x2, y2]"),
    ):
        value = row.get(name, [])
        if value is None and name == "boxes":
            continue
        if not isinstance(value, list):
            faults.add(where, name, f"a list of boxes{' or null' * (name == 'boxes')}", value)
            continue
        for index, box in enumerate(value):
            if not sound([box]):
                faults.add(where, f"{name}[{index}]", wanted, box)
