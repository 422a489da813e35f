"""Files of predictions -> columns, or predictions one by one: lines as in docs/run_folder.md, checked as they are read.

What scoring needs must be there; `image`, `completion`, `logp`, `thought_boxes`, `iou` and `sample` may be. A file has one answer for
each id, or several that `sample` numbers. Every fault is named with its line, and a file with one is not read.
"""

import gzip
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
_NUMBERS = frozenset((float, int))


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
    known = {*REQUIRED, *OPTIONAL}
    for row in _rows(path):
        builder.add(
            row["id"], row["patient"], row["category"], row["phrase"], (row["width"], row["height"]),
            row["truth"], row["boxes"], row.get("sample"),
        )  # fmt: skip
        claimed.append(row.get("iou", np.nan))
        if not row.keys() <= known:
            others.update(row.keys() - known)
    notes = [f"not used: field {name!r}, which {count} lines have" for name, count in sorted(others.items())]
    return Loaded(builder.columns(), np.frombuffer(claimed), notes)


def read_predictions(path: Path) -> Iterator[Prediction]:
    """The answers of a file, one at a time; "" and 0 where `image`, `completion` and `logp` are not given.

    Raises:
        ValueError: as `read_columns`, after the last line that is sound.
    """
    for row in _rows(path):
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


def _rows(path: Path) -> Iterator[Row]:
    faults, seen, count = Faults(), _Seen(), 0
    with _open(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if not line.strip():
                continue
            count += 1
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.add(f"{path}:{number}", "line", f"one JSON object in UTF-8 ({error})", line[:60])
                continue
            if not _sound(row):
                _name_faults(f"{path}:{number}", row, faults)
            elif seen.fits(path, number, row, faults) and not faults:
                yield row
    if not count:
        raise ValueError(f"{path}: want a line for each prediction; got an empty file")
    faults.raise_if_any(path, "docs/run_folder.md")


class _Seen:
    """Which ids and samples there were, and where."""

    def __init__(self) -> None:
        self._alone: dict[str, int] = {}  # id -> line
        self._sampled: dict[str, dict[int, int]] = {}  # id -> sample -> line

    def fits(self, path: Path, number: int, row: Row, faults: Faults) -> bool:
        """Whether no line before is the same answer, or the same record with a sample where this has none."""
        name, sample = row["id"], row.get("sample")
        if sample is None:
            first = next(iter(self._sampled.get(name, {}).values()), None) or self._alone.setdefault(name, number)
        else:
            first = self._alone.get(name) or self._sampled.setdefault(name, {}).setdefault(sample, number)
        if first != number:
            wanted = f"one answer to each id, or several that `sample` numbers (line {first} has the same id)"
            faults.add(f"{path}:{number}", "id", wanted, name if sample is None else (name, sample))
        return first == number


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


def _sound(row: Any) -> bool:
    """Whether a line has all fields in their form. Quick: it runs for every line; `_name_faults` says what is wrong."""
    try:
        truth, boxes = row["truth"], row["boxes"]
        return (
            type(row["id"]) is type(row["phrase"]) is type(row["category"]) is type(row["patient"]) is str
            and row["id"] != "" != row["patient"]
            and type(row["width"]) is type(row["height"]) is int
            and row["width"] >= 1 <= row["height"]
            and type(truth) is list
            and (boxes is None or type(boxes) is list)
            and all(map(_is_true_box, truth))
            and (not boxes or all(map(_is_box, boxes)))
            and _sound_options(row)
        )
    except (KeyError, TypeError):
        return False


def _sound_options(row: Row) -> bool:
    sample = row.get("sample")
    return (
        (sample is None or (type(sample) is int and 0 <= sample < LARGEST))
        and type(row.get("logp", 0.0)) in _NUMBERS
        and type(row.get("iou", 0.0)) in _NUMBERS
        and type(row.get("image", "")) is str
        and type(row.get("completion", "")) is str
        and type(thoughts := row.get("thought_boxes", [])) is list
        and (not thoughts or all(map(_is_box, thoughts)))
    )


def _is_box(box: Any) -> bool:
    # a model may say any number, NaN too; a whole number that no float can hold is none
    if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
        return False
    return all(type(v) is float or -(10**300) < v < 10**300 for v in box) if int in map(type, box) else True


def _is_true_box(box: Any) -> bool:
    if type(box) is not list or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
        return False
    x1, y1, x2, y2 = box
    return -LARGEST < x1 < x2 < LARGEST and -LARGEST < y1 < y2 < LARGEST


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
    sample = row.get("sample")
    if sample is not None and (type(sample) is not int or not 0 <= sample < LARGEST):
        faults.add(where, "sample", "a whole number >= 0", sample)
    for name in ("logp", "iou"):
        if type(row.get(name, 0.0)) not in (int, float):
            faults.add(where, name, "a number", row[name])
    assert len(faults) > before, f"{where}: not sound, and no fault named"


def _name_faulty_boxes(where: str, row: Row, faults: Faults) -> None:
    for name, sound, wanted in (
        ("truth", _is_true_box, "four numbers [x1, y1, x2, y2], x1 < x2 and y1 < y2"),
        ("boxes", _is_box, "four numbers [x1, y1, x2, y2]"),
        ("thought_boxes", _is_box, "four numbers [x1, y1, x2, y2]"),
    ):
        value = row.get(name, [])
        if value is None and name == "boxes":
            continue
        if not isinstance(value, list):
            faults.add(where, name, f"a list of boxes{' or null' * (name == 'boxes')}", value)
            continue
        for index, box in enumerate(value):
            if not sound(box):
                faults.add(where, f"{name}[{index}]", wanted, box)
