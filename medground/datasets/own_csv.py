"""People's own data as a CSV file: one row a box (docs/data/records.md).

Columns `image, phrase` and either `x1, y1, x2, y2` or `x, y, w, h`, in pixels of the image; and, where there are such
columns, `category, patient, study, split, width, height`. Rows of one image and phrase are one record. Four empty cells
say that the image does not show it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medground.datasets.faults import Faults
from medground.datasets.films import convert_film
from medground.datasets.gathering import Gathering, Said, box_of_xywh, facts, relative_stem
from medground.datasets.options import DrawnConfig, want
from medground.datasets.preparing import Original, prepare
from medground.datasets.splits import split_of
from medground.datasets.tables import Row, has_column, read_table
from medground.records import Box

NAME = "csv"
CORNERS, SIZES = ("x1", "y1", "x2", "y2"), ("x", "y", "w", "h")
UNNAMED = "rows without a patient: each image counts as a patient of its own"


@dataclass(frozen=True, kw_only=True)
class OwnCsvConfig(DrawnConfig):
    """Turn a CSV file of boxes into a data folder."""

    annotations: str
    """The CSV file: image, phrase, x1, y1, x2, y2 (or x, y, w, h); category, patient, study, split, width, height."""
    images: str
    """Folder that the column `image` is relative to."""
    source: str = "own"
    """Name of the data set."""
    licence: str = "not stated"
    """Note for manifest.json."""
    longest_side: int = 0
    """Longest side of the images written, in pixels; 0 keeps the originals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        want(self.longest_side >= 0, "longest_side", ">= 0", self.longest_side)
        want(bool(self.source.strip()), "source", "a name", self.source)


def prepare_csv(config: OwnCsvConfig) -> None:
    """Write the data folder.

    Raises:
        ValueError: as `prepare`, or a file lacks a column.
    """
    prepare(config, read_csv(config))


def read_csv(config: OwnCsvConfig) -> Original:
    """The films of the CSV file.

    Raises:
        ValueError: it is missing, or is not such a table.
    """
    path = Path(config.annotations)
    corners = has_column(path, "x1")
    columns = CORNERS if corners else SIZES
    gathering = Gathering()
    for row in read_table(path, ("image", "phrase", *columns)):
        gathering.take(row.where, partial(_parse, config, columns, gathering, row))
    films = gathering.films(Path(config.images), config.source, config.longest_side, name=relative_stem)
    return Original(
        name=NAME,
        licence=config.licence,
        settings=config.settings(),
        annotations=[path],
        jobs=films,
        convert=convert_film,
        **facts(gathering),
    )


def _parse(config: OwnCsvConfig, columns: tuple[str, ...], gathering: Gathering, row: Row, faults: Faults) -> Said:
    image, phrase = row.text("image", faults), row.text("phrase", faults)
    size = None
    if row.get("width") or row.get("height"):
        sides = [row.pixels(name, faults) if row.get(name) else None for name in ("width", "height")]
        if None in sides and not faults:
            faults.add(row.where, "width, height", "both or neither", (row.get("width"), row.get("height")))
        size = (sides[0] or 0, sides[1] or 0)
    patient = row.get("patient") or image
    gathering.notes[UNNAMED] += not row.get("patient")
    return Said(
        where=row.where,
        image=image,
        phrase=phrase,
        category=row.get("category") or "finding",
        box=_box(columns, row, faults),
        patient=patient,
        study=row.get("study") or patient,
        split=row.get("split") or split_of(patient, config.seed, config.val, config.test),
        size=size,
    )


def _box(columns: tuple[str, ...], row: Row, faults: Faults) -> Box | None:
    if not any(row[name] for name in columns):
        return None
    a, b, c, d = (row.number(name, faults) or 0.0 for name in columns)
    return (a, b, c, d) if columns == CORNERS else box_of_xywh(a, b, c, d)
