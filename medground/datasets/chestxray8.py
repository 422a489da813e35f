"""ChestX-ray8 (NIH): boxes of eight findings on 1024x1024 films, without phrases (docs/data/chestxray8.md).

The phrase of a box is made from its class by PHRASES. The box list's header, `Bbox [x,y,w,h]`, is itself split at its
commas, so that the columns are called `Bbox [x`, `y`, `w` and `h]`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medground.datasets.faults import Faults
from medground.datasets.films import convert_film
from medground.datasets.gathering import Gathering, Said, box_of_xywh, facts
from medground.datasets.options import DrawnConfig, want
from medground.datasets.preparing import Original, prepare
from medground.datasets.splits import split_of
from medground.datasets.tables import Row, read_table

NAME = "chestxray8"
LICENCE = (
    "ChestX-ray8: free to use; cite Wang et al., CVPR 2017, link to the source, acknowledge the NIH Clinical Center"
)
BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
ENTRY_COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
ALIASES = {"Infiltrate": "Infiltration"}  # the box list has the one, Data_Entry the other
PHRASES = {
    "Atelectasis": "atelectasis",
    "Cardiomegaly": "cardiomegaly",
    "Effusion": "pleural effusion",
    "Infiltration": "pulmonary infiltration",
    "Mass": "lung mass",
    "Nodule": "lung nodule",
    "Pneumonia": "pneumonia",
    "Pneumothorax": "pneumothorax",
}
UNLISTED = "boxes whose finding is not among their image's labels in the entries"


@dataclass(frozen=True, kw_only=True)
class ChestXray8Config(DrawnConfig):
    """Turn the boxes of ChestX-ray8 into a data folder."""

    boxes: str
    """BBox_List_2017.csv."""
    entries: str
    """Data_Entry_2017.csv or Data_Entry_2017_v2020.csv."""
    images: str
    """Folder of the PNG files, or of the twelve unpacked archives (images_001/images/...)."""
    longest_side: int = 0
    """Longest side of the images written, in pixels; 0 keeps the originals' 1024."""

    def __post_init__(self) -> None:
        super().__post_init__()
        want(self.longest_side >= 0, "longest_side", ">= 0", self.longest_side)


def prepare_chestxray8(config: ChestXray8Config) -> None:
    """Write the data folder.

    Raises:
        ValueError: as `prepare`, or a file lacks a column.
    """
    prepare(config, read_chestxray8(config))


def read_chestxray8(config: ChestXray8Config) -> Original:
    """The films of the box list.

    Raises:
        ValueError: a file is missing, or is not such a table.
    """
    rows = list(read_table(Path(config.boxes), BOX_COLUMNS))
    wanted = {row["Image Index"] for row in rows}
    # 112,120 rows: only those of films with boxes are kept
    entries = {
        e["Image Index"]: e for e in read_table(Path(config.entries), ENTRY_COLUMNS) if e["Image Index"] in wanted
    }
    gathering = Gathering()
    for row in rows:
        gathering.take(row.where, partial(_parse, config, entries, gathering, row))
    films = gathering.films(
        Path(config.images), NAME, config.longest_side, name=lambda said: Path(said.image).stem, find=_find
    )
    return Original(
        name=NAME,
        licence=LICENCE,
        settings=config.settings(),
        annotations=[Path(config.boxes), Path(config.entries)],
        jobs=films,
        convert=convert_film,
        **facts(gathering),
    )


def _parse(config: ChestXray8Config, entries: dict[str, Row], gathering: Gathering, row: Row, faults: Faults) -> Said:
    image = row.text("Image Index", faults)
    label = ALIASES.get(row["Finding Label"], row["Finding Label"])
    if label not in PHRASES:
        faults.add(row.where, "Finding Label", f"one of {', '.join(PHRASES)}", row["Finding Label"])
    x, y, w, h = (row.number(name, faults) or 0.0 for name in BOX_COLUMNS[2:])
    entry = entries.get(image)
    patient = image.split("_")[0]
    if entry is None:
        faults.add(row.where, "Image Index", f"an image of {config.entries}", image)
    else:
        if entry["Patient ID"].lstrip("0") != patient.lstrip("0"):
            faults.add(entry.where, "Patient ID", f"the patient of the file's name, {patient}", entry["Patient ID"])
        gathering.notes[UNLISTED] += label not in entry["Finding Labels"].split("|")
    return Said(
        where=row.where,
        image=image,
        phrase=PHRASES.get(label, label),
        category=label,
        box=box_of_xywh(x, y, w, h),
        patient=f"nih-{patient}",
        study=f"nih-{image.rsplit('.', 1)[0]}",
        split=split_of(f"nih-{patient}", config.seed, config.val, config.test),
        size=None,  # the entries have the size before the films were made 1024 wide
    )


def _find(root: Path, image: str) -> str:
    if not (root / image).is_file() and image == Path(image).name:
        for folder in sorted(root.glob("images_*/images")):
            if (folder / image).is_file():
                return str((folder / image).relative_to(root))
    return image
