"""Write, read and check `records.jsonl`, the one form of every data set (docs/data/records.md).

The whole data set is checked before anything uses it, and every offender is named.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medground.datasets.faults import Faults
from medground.datasets.images import image_size
from medground.datasets.inventory import json_line, read_images, read_manifest, written_whole
from medground.datasets.paths import fault_of_path
from medground.records import Box, Example

RECORDS = "records.jsonl"
SPLITS = ("train", "val", "test")

_A = {"patient": "a patient", "study": "a study", "image": "an image"}
_TEXTS = ("id", "image", "phrase", "category", "patient", "study", "source", "split")
_FIELDS = ("id", "image", "width", "height", "phrase", "boxes", "category", "patient", "study", "source", "split")


def write_records(folder: str | Path, examples: Iterable[Example]) -> None:
    """Write `records.jsonl` into `folder`, all of it or nothing: a reader never meets half a file.

    Args:
        folder: of the data set; made when missing.
        examples: in the order of the lines.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / RECORDS) as file:
        for example in examples:
            file.write(json_line({name: getattr(example, name) for name in _FIELDS}))


def load_records(folder: str | Path) -> list[Example]:
    """Read and check all records of a data set, images' headers included.

    Args:
        folder: that holds records.jsonl.

    Returns:
        One Example a line, in the order of the lines.

    Raises:
        ValueError: the file is missing or empty, or any record is not as docs/data/records.md has it;
            lists the offenders as file:line, field, what was wanted and what came.
    """
    examples, faults = check_records(folder)
    faults.raise_if_any(Path(folder) / RECORDS, "docs/data/records.md")
    return examples


def check_records(folder: str | Path) -> tuple[list[Example], Faults]:
    """Read all records of a data set: those without a fault, and the faults.

    Args: as `load_records`.

    Raises:
        ValueError: the file is missing or empty, or manifest.json or images.jsonl is damaged.
    """
    path = Path(folder) / RECORDS
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such data folder (want a folder that holds {RECORDS})")
    if not path.is_file():
        raise ValueError(f"{path}: no such file (a data folder holds {RECORDS}; docs/data/records.md)")
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        del lines[-1]
    if not lines:
        raise ValueError(f"{path}: want at least one record; got an empty file")
    read_manifest(Path(folder))  # of a schema that this version reads, where there is one
    checker = _Checker(path)
    examples = [example for number, line in enumerate(lines, 1) if (example := checker.check(number, line))]
    return examples, checker.faults


def select(examples: Sequence[Example], split: str, folder: str | Path) -> list[Example]:
    """The examples of one split, in their order.

    Raises:
        ValueError: there are none; names `folder`, the split wanted and those present.
    """
    chosen = [example for example in examples if example.split == split]
    if not chosen:
        present = ", ".join(sorted({example.split for example in examples})) or "none"
        raise ValueError(f"{folder}: want records of split {split!r}; got splits: {present}")
    return chosen


def records_hash(folder: str | Path) -> str:
    """SHA-256 of the folder's records.jsonl, in hexadecimal."""
    return hashlib.sha256((Path(folder) / RECORDS).read_bytes()).hexdigest()


class _Checker:
    """Checks record after record, remembers what concerns several of them, and collects complaints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path.parent.resolve()
        self.faults = Faults()
        self.ids: dict[str, int] = {}  # id -> line
        self.hashes = {name: row["sha256"] for name, row in read_images(path.parent).items()}
        # what may lie in one split only: (field, value) -> split, line
        self.places: dict[tuple[str, str], tuple[str, int]] = {}
        self.images: dict[str, tuple[int, int] | str] = {}  # image -> its size, or what is wrong with it
        self.folders: dict[str, str] = {}  # those of images, links followed

    def check(self, number: int, line: bytes) -> Example | None:
        before = len(self.faults)
        values = self._parse(number, line)
        if values is None or not self._types(number, values):
            return None
        boxes = self._boxes(number, values)
        self._texts(number, values)
        self._image(number, values)
        if len(self.faults) > before:
            return None
        return Example(**(values | {"boxes": boxes}))

    def _complain(self, number: int, field: str, wanted: str, got: object) -> None:
        self.faults.add(f"{self.path}:{number}", field, wanted, got)

    def _parse(self, number: int, line: bytes) -> dict[str, Any] | None:
        try:
            values = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self._complain(number, "line", f"one JSON object in UTF-8 ({error})", line[:60].decode("utf-8", "replace"))
            return None
        if not isinstance(values, dict):
            self._complain(number, "line", "one JSON object", values)
            return None
        return values

    def _types(self, number: int, values: dict[str, Any]) -> bool:
        before = len(self.faults)
        for name in _FIELDS:
            if name not in values:
                self.faults.say(f"{self.path}:{number}: {name}: missing; a record has {', '.join(_FIELDS)}")
            elif name in _TEXTS and not isinstance(values[name], str):
                self._complain(number, name, "a string", values[name])
            elif name in ("width", "height") and (type(values[name]) is not int or values[name] < 1):
                self._complain(number, name, "a whole number of pixels >= 1", values[name])
            elif name == "boxes" and not isinstance(values[name], list):
                self._complain(number, name, "a list of boxes [x1, y1, x2, y2]", values[name])
        for name in values:
            if name not in _FIELDS:
                self.faults.say(f"{self.path}:{number}: {name}: unknown field; a record has {', '.join(_FIELDS)}")
        return len(self.faults) == before

    def _boxes(self, number: int, values: dict[str, Any]) -> tuple[Box, ...]:
        width, height = values["width"], values["height"]
        kept: dict[Box, None] = {}
        for index, box in enumerate(values["boxes"]):
            if not _is_box(box):
                self._complain(number, f"boxes[{index}]", "four finite numbers [x1, y1, x2, y2]", box)
                continue
            x1, y1, x2, y2 = box
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                wanted = f"0 <= x1 < x2 <= width ({width}) and 0 <= y1 < y2 <= height ({height})"
                self._complain(number, f"boxes[{index}]", wanted, box)
                continue
            corners = float(x1), float(y1), float(x2), float(y2)
            if corners in kept:
                self._complain(number, f"boxes[{index}]", "each box once", box)
            kept[corners] = None
        return tuple(kept)

    def _texts(self, number: int, values: dict[str, Any]) -> None:
        for name in _TEXTS:
            if not values[name].strip():
                self._complain(number, name, "a text that is not empty", values[name])
            elif not values[name].isascii() and any("\ud800" <= letter <= "\udfff" for letter in values[name]):
                self._complain(number, name, "text that UTF-8 can hold (a lone surrogate)", ascii(values[name]))
        first = self.ids.setdefault(values["id"], number)
        if first != number:
            self._complain(number, "id", f"an id of its own (line {first} has the same)", values["id"])
        if values["split"] not in SPLITS:
            self._complain(number, "split", f"one of {', '.join(SPLITS)}", values["split"])
            return
        for field in ("patient", "study", "image"):
            if not self._alone(number, field, values[field], repr(values[field]), values["split"]):
                return
        if digest := self.hashes.get(values["image"]):
            self._alone(number, "image", digest, f"the content of {values['image']!r}", values["split"])

    def _alone(self, number: int, field: str, value: str, name: str, split: str) -> bool:
        """Whether what has this value has been in this split only, so far."""
        first, line = self.places.setdefault((field, value), (split, number))
        if first != split:
            wanted = f"{_A[field]} of one split only ({name} is in {first!r} at line {line})"
            self._complain(number, field, wanted, split)
        return first == split

    def _image(self, number: int, values: dict[str, Any]) -> None:
        name = values["image"]
        if name not in self.images:
            self.images[name] = self._measure(name)
        size = self.images[name]
        if isinstance(size, str):
            self._complain(number, "image", size, name)
        elif size != (values["width"], values["height"]):
            wanted = f"the size of {name}, {size[0]}x{size[1]}"
            self._complain(number, "width, height", wanted, f"{values['width']}x{values['height']}")

    def _measure(self, name: str) -> tuple[int, int] | str:
        if wanted := fault_of_path(self.root, name, "the data folder", self.folders):
            return wanted
        try:
            return image_size(f"{self.root}/{name}")
        except ValueError as error:
            return f"a readable image ({error})"


def _is_box(box: Any) -> bool:
    # comparing is false for NaN and safe for a whole number that no float can hold
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in (int, float) and abs(value) < 1e9 for value in box)
    )
