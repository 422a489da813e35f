"""M3D-RefSeg: findings in CT volumes with their masks -> axial slices with boxes (docs/data/m3d-refseg.md).

Each mask id of a case is a region. Its slice of largest area (or every k-th) is shown by a window of Hounsfield units,
in square pixels; the connected parts of the mask there are its boxes. Splits are by case, never by slice.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medground.datasets.faults import Faults
from medground.datasets.m3d_cases import Case, Region, convert_case
from medground.datasets.options import DrawnConfig, want
from medground.datasets.paths import fault_of_path, need_folder
from medground.datasets.preparing import Original, prepare
from medground.datasets.splits import split_of, split_of_file
from medground.datasets.tables import Row, read_table
from medground.datasets.volumes import Window

NAME = "m3d-refseg"
LICENCE = "M3D-RefSeg: card says Apache-2.0; volumes are TotalSegmentator's, on its own terms; cite both"
COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")
TEXTS = "text.json"


@dataclass(frozen=True, kw_only=True)
class M3dRefSegConfig(DrawnConfig):
    """Turn M3D-RefSeg into a data folder of axial slices."""

    csv: tuple[str, ...]
    """M3D_RefSeg_train.csv, M3D_RefSeg_test.csv or both."""
    volumes: str
    """Folder of the cases: s0000/ct.nii.gz, mask.nii.gz, text.json, ..."""
    split: Literal["case", "files"] = "case"
    """`case`: drawn by case with `seed`. `files`: train or test by the name of the CSV file."""
    window: Window = "soft-tissue"
    """Hounsfield units that are black and white; `auto`: percentiles 0.5 and 99.5 of the volume."""
    slices: str = "largest"
    """`largest`: the slice where a region is largest. `every:k`: every k-th slice of the volume, from the lowest, where
    it has a tenth of its largest area or more."""
    phrases: Literal["finding", "question"] = "finding"
    """`finding`: text.json's sentence for the region. `question`: the CSV's questions."""
    min_pixels: int = 9
    """Parts of a mask with fewer voxels in a slice are specks and no boxes, unless all are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        want(bool(self.csv), "csv", "one file or more", self.csv)
        want(self.min_pixels >= 1, "min_pixels", ">= 1", self.min_pixels)
        step_of(self.slices)


def step_of(slices: str) -> int:
    """`largest` -> 0, `every:k` -> k.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"every:([1-9]\d{0,3})", slices)
    want(slices == "largest" or found is not None, "slices", "largest or every:k with k from 1 to 9999", slices)
    return int(found[1]) if found else 0


def prepare_m3d_refseg(config: M3dRefSegConfig) -> None:
    """Write the data folder.

    Raises:
        ValueError: as `prepare`, or a file lacks a column.
    """
    prepare(config, read_m3d_refseg(config))


def read_m3d_refseg(config: M3dRefSegConfig) -> Original:
    """The cases of the CSV files.

    Raises:
        ValueError: a file is missing, or is not such a table.
    """
    reading = _Reading(config)
    for path in map(Path, config.csv):
        for row in read_table(path, COLUMNS):
            reading.take(path, row)
    return Original(
        name=NAME,
        licence=LICENCE,
        settings=config.settings(),
        annotations=[Path(path) for path in config.csv],
        jobs=reading.cases(),
        convert=convert_case,
        read=reading.read,
        faults=reading.faults,
    )


class _Reading:
    """Takes rows, gives cases: case -> mask id -> phrase -> rows."""

    def __init__(self, config: M3dRefSegConfig) -> None:
        self.config = config
        self.root = need_folder(Path(config.volumes), "volumes")
        self.read = 0
        self.faults: list[dict[str, Any]] = []
        self._files: dict[str, tuple[str, str, str]] = {}  # case -> ct, mask, split
        self._regions: dict[str, dict[int, dict[str, list[str]]]] = {}
        self._texts: dict[str, dict[str, str] | str] = {}

    def take(self, path: Path, row: Row) -> None:
        self.read += 1
        faults = Faults()
        ct, mask = (self._find(row, column, faults) for column in ("Image", "Mask"))
        number = row.number("Mask_ID", faults)
        if number is not None and (number != int(number) or number < 1):
            faults.add(row.where, "Mask_ID", "a whole number >= 1", row["Mask_ID"])
        question = row.text("Question", faults)
        case, mask_id = Path(ct).parent.name, int(number or 0)
        if not faults and not case:
            faults.add(row.where, "Image", "a volume in the folder of its case", row["Image"])
        if not faults:
            files = ct, mask, self._split(path, case)
            first = self._files.setdefault(case, files)
            if first != files:
                faults.add(row.where, "Image, Mask, split", f"one of each for case {case}, {first}", files)
            phrase = question if self.config.phrases == "question" else self._finding(row, ct, mask_id, faults)
        if faults:
            self.faults += [{"rows": [row.where] * (not i), "why": line} for i, line in enumerate(faults.lines)]
        else:
            self._regions.setdefault(case, {}).setdefault(mask_id, {}).setdefault(phrase, []).append(row.where)

    def cases(self) -> list[Case]:
        config = self.config
        return [
            Case(
                key=case,
                ct=str(self.root / self._files[case][0]),
                mask=str(self.root / self._files[case][1]),
                source=NAME,
                split=self._files[case][2],
                window=config.window,
                step=step_of(config.slices),
                min_pixels=config.min_pixels,
                regions=tuple(
                    Region(mask_id, tuple((phrase, tuple(rows)) for phrase, rows in phrases.items()))
                    for mask_id, phrases in regions.items()
                ),
            )
            for case, regions in self._regions.items()
        ]

    def _find(self, row: Row, column: str, faults: Faults) -> str:
        """The file of a cell, relative to the folder of volumes: its whole path there, or case and file name alone."""
        name = row.text(column, faults)
        parts = Path(name).parts
        short = "/".join(parts[-2:])
        for candidate in (name, short):
            if not fault_of_path(self.root, candidate, "the folder of volumes"):
                return candidate
        if name:
            wanted = fault_of_path(self.root, name if ".." in parts else short, "the folder of volumes")
            faults.add(row.where, column, wanted, name)
        return ""

    def _split(self, path: Path, case: str) -> str:
        if self.config.split == "case":
            return split_of(f"m3d-{case}", self.config.seed, self.config.val, self.config.test)
        return split_of_file(path)

    def _finding(self, row: Row, ct: str, mask_id: int, faults: Faults) -> str:
        path = (self.root / ct).parent / TEXTS
        if ct not in self._texts:
            self._texts[ct] = _read_texts(path)
        texts = self._texts[ct]
        if isinstance(texts, str):
            faults.say(f"{row.where}: Mask_ID: {texts}")
            return ""
        phrase = texts.get(str(mask_id), "")
        if not phrase:
            faults.add(row.where, "Mask_ID", f"one with a text in {path}: {_some(texts)}", row["Mask_ID"])
        return phrase


def _read_texts(path: Path) -> dict[str, str] | str:
    """text.json, {mask id: finding}; what is wrong with it as a text."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"want {path}, an object of texts by mask id; got {error}"
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        return f"want {path}, an object of texts by mask id; got something else"
    return {key.strip(): " ".join(text.split()) for key, text in value.items()}


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:10]) or "none"
