"""MS-CXR: phrases of chest X-ray reports with their boxes, on images of MIMIC-CXR-JPG (docs/data/ms-cxr.md).

One row of the CSV is one box: rows with the same image and phrase are one phrase with several boxes. Boxes are in
pixels of the original image. Left and right are the patient's.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from medground.datasets.faults import Faults
from medground.datasets.films import Film, convert_film
from medground.datasets.gathering import Gathering, Said, box_of_xywh, facts
from medground.datasets.options import PrepareConfig, want
from medground.datasets.preparing import Original, prepare
from medground.datasets.splits import split_of
from medground.datasets.tables import Row, has_column, read_table

NAME = "ms-cxr"
LICENCE = (
    "MS-CXR and MIMIC-CXR-JPG: PhysioNet Credentialed Health Data License and data use agreement; not to be passed on, "
    "nor sent to services of third parties"
)
COLUMNS = ("dicom_id", "subject_id", "study_id", "path", "category_name", "label_text", "x", "y", "w", "h",
           "image_width", "image_height")  # fmt: skip
MIMIC_SPLIT = "mimic-cxr-2.0.0-split.csv"
MEDRPG_VAL, MEDRPG_TEST = 85 / 890, 167 / 890  # MedRPG's fractions: 638, 85 and 167 records of 890


@dataclass(frozen=True, kw_only=True)
class MsCxrConfig(PrepareConfig):
    """Turn MS-CXR and MIMIC-CXR-JPG into a data folder."""

    annotations: str
    """MS_CXR_Local_Alignment_v1.1.0.csv, or v1.0.0 with another split than `official`."""
    images: str
    """Folder of MIMIC-CXR-JPG: the one that holds files/."""
    split: Literal["official", "medrpg-like", "mimic"] = "official"
    """`official`: the column of v1.1.0. `mimic`: that of mimic-cxr-2.0.0-split.csv(.gz) in `images`. `medrpg-like`:
    phrases of one box only, drawn by patient in MedRPG's proportions with `seed`; not MedRPG's own lists."""
    seed: int = 0
    """Seed of --split medrpg-like."""
    longest_side: int = 640
    """Longest side of the images written, in pixels (MedRPG's and MedGround-R1's); 0 keeps the originals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        want(self.longest_side >= 0, "longest_side", ">= 0", self.longest_side)


def prepare_ms_cxr(config: MsCxrConfig) -> None:
    """Write the data folder.

    Raises:
        ValueError: as `prepare`, or a file lacks a column.
    """
    prepare(config, read_ms_cxr(config))


def read_ms_cxr(config: MsCxrConfig) -> Original:
    """The films of the CSV.

    Raises:
        ValueError: a file is missing, or is not such a table.
    """
    path, root = Path(config.annotations), Path(config.images)
    columns: tuple[str, ...] = COLUMNS
    mimic: Path | None = None
    if config.split == "official":
        if not has_column(path, "split"):
            raise ValueError(
                f"{path}:1: header: want the column split, which v1.1.0 has, for --split official; "
                "v1.0.0 goes with --split medrpg-like or mimic"
            )
        columns = (*COLUMNS, "split")
    elif config.split == "mimic":
        mimic = _mimic_file(root)
    rows = list(read_table(path, columns))
    splits = _mimic_splits(mimic, {row["dicom_id"] for row in rows}) if mimic else {}
    gathering = Gathering()
    for row in rows:
        gathering.take(row.where, partial(_parse, config, splits, row))
    films = gathering.films(root, NAME, config.longest_side, name=lambda said: Path(said.image).stem)
    if config.split == "medrpg-like":
        films = _single_boxes(films, gathering)
    annotations = [path, *([mimic] if mimic else [])]
    return Original(
        name=NAME,
        licence=LICENCE,
        settings=config.settings(),
        annotations=annotations,
        jobs=films,
        convert=convert_film,
        **facts(gathering),
    )


def _parse(config: MsCxrConfig, splits: dict[str, str], row: Row, faults: Faults) -> Said:
    numbers = [row.number(name, faults) for name in ("x", "y", "w", "h")]
    sides = [row.pixels(name, faults) for name in ("image_width", "image_height")]
    texts = {name: row.text(name, faults) for name in
             ("dicom_id", "subject_id", "study_id", "path", "category_name", "label_text")}  # fmt: skip
    patient = f"mimic-{texts['subject_id']}"
    if config.split == "official":
        split = {"validate": "val"}.get(row["split"], row["split"])
    elif config.split == "mimic":
        split = splits.get(texts["dicom_id"], "")
        if not split:
            faults.add(row.where, "dicom_id", f"an image of {MIMIC_SPLIT}", texts["dicom_id"])
    else:
        split = split_of(patient, config.seed, MEDRPG_VAL, MEDRPG_TEST)
    x, y, w, h = (value or 0.0 for value in numbers)
    return Said(
        where=row.where,
        image=texts["path"],
        phrase=texts["label_text"],
        category=texts["category_name"],
        box=box_of_xywh(x, y, w, h),
        patient=patient,
        study=f"mimic-{texts['study_id']}",
        split=split,
        size=(sides[0] or 0, sides[1] or 0),
    )


def _mimic_file(root: Path) -> Path:
    for name in (f"{MIMIC_SPLIT}.gz", MIMIC_SPLIT):
        if (root / name).is_file():
            return root / name
    raise ValueError(f"{root}: want {MIMIC_SPLIT} or {MIMIC_SPLIT}.gz in it for --split mimic; it has neither")


def _mimic_splits(path: Path, wanted: set[str]) -> dict[str, str]:
    rows = read_table(path, ("dicom_id", "split"))  # 377,110 rows: only those of MS-CXR are kept
    return {r["dicom_id"]: {"validate": "val"}.get(r["split"], r["split"]) for r in rows if r["dicom_id"] in wanted}


def _single_boxes(films: list[Film], gathering: Gathering) -> list[Film]:
    kept = []
    for film in films:
        single = tuple(statement for statement in film.statements if len(statement.boxes) == 1)
        for statement in film.statements:
            if len(statement.boxes) != 1:
                why = f"box: --split medrpg-like wants phrases of one box; got {len(statement.boxes)}"
                gathering.leave_out(statement.rows, why)
        if single:
            kept.append(replace(film, statements=single))
    return kept
