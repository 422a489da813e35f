"""COCO detection JSON -> data folder (docs/data/records.md).

`bbox` is x, y, width, height in pixels. The phrase of an annotation is its `phrase`, `caption` or `label_text`, else
the name of its category; annotations of one image and phrase are one record. Crowds (`iscrowd` 1) are left out and
listed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medground.datasets.faults import Faults
from medground.datasets.films import convert_film
from medground.datasets.gathering import Gathering, Said, box_of_xywh, facts, relative_stem
from medground.datasets.json_items import four_numbers, read_json, text
from medground.datasets.options import DrawnConfig, want
from medground.datasets.own_csv import UNNAMED
from medground.datasets.preparing import Original, prepare
from medground.datasets.splits import split_of, split_of_file

NAME = "coco"
PHRASES = ("phrase", "caption", "label_text")
PATIENTS, STUDIES = ("patient", "patient_id", "subject_id"), ("study", "study_id")
BARE = "images without an annotation, which give no record"


@dataclass(frozen=True, kw_only=True)
class CocoConfig(DrawnConfig):
    """Turn COCO annotations into a data folder."""

    annotations: tuple[str, ...]
    """JSON files with `images`, `annotations` and `categories`."""
    images: str
    """Folder that `file_name` is relative to."""
    split: Literal["patient", "files"] = "patient"
    """`patient`: drawn with `seed`, by the image's `patient`, `patient_id` or `subject_id` where it has one, else by
    image. `files`: by train, val or test in the file's name."""
    source: str = NAME
    """Name of the data set."""
    licence: str = "not stated"
    """Note for manifest.json."""
    longest_side: int = 0
    """Longest side of the images written, in pixels; 0 keeps the originals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        want(bool(self.annotations), "annotations", "one file or more", self.annotations)
        want(self.longest_side >= 0, "longest_side", ">= 0", self.longest_side)
        want(bool(self.source.strip()), "source", "a name", self.source)


def prepare_coco(config: CocoConfig) -> None:
    """Write the data folder.

    Raises:
        ValueError: as `prepare`, or a file is no such object.
    """
    prepare(config, read_coco(config))


def read_coco(config: CocoConfig) -> Original:
    """The films of the files.

    Raises:
        ValueError: a file is missing, or is no such object.
    """
    gathering = Gathering()
    for path in map(Path, config.annotations):
        _read_file(config, gathering, path)
    films = gathering.films(Path(config.images), config.source, config.longest_side, name=relative_stem)
    return Original(
        name=NAME,
        licence=config.licence,
        settings=config.settings(),
        annotations=[*map(Path, config.annotations)],
        jobs=films,
        convert=convert_film,
        **facts(gathering),
    )


def _read_file(config: CocoConfig, gathering: Gathering, path: Path) -> None:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want an object with images and annotations; got {type(value).__name__}")
    lists: dict[str, list[dict[str, Any]]] = {}
    for name in ("images", "annotations"):
        items = value.get(name)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{path}: {name}: want a list of objects; got {type(items).__name__}")
        lists[name] = items
    categories = {c.get("id"): c.get("name") for c in value.get("categories") or [] if isinstance(c, dict)}
    images = {}
    for index, image in enumerate(lists["images"]):
        if not isinstance(image.get("id"), int | str) or image["id"] in images:
            raise ValueError(f"{path}: images[{index}].id: want an id of its own; got {image.get('id')!r}")
        images[image["id"]] = image
    split = split_of_file(path) if config.split == "files" else ""
    used = set()
    for index, item in enumerate(lists["annotations"]):
        where = f"{path}: annotations[{index}]"
        film = images.get(item["image_id"]) if isinstance(item.get("image_id"), int | str) else None
        used.add(id(film))
        if item.get("iscrowd"):
            gathering.read += 1
            gathering.leave_out((where,), "iscrowd: a crowd is no box")
        else:
            gathering.take(where, partial(_parse, config, gathering, split, categories, film, where, item))
    gathering.notes[BARE] += sum(id(film) not in used for film in images.values())


def _parse(
    config: CocoConfig,
    gathering: Gathering,
    split: str,
    categories: Mapping[Any, Any],
    image: Mapping[str, Any] | None,
    where: str,
    item: Mapping[str, Any],
    faults: Faults,
) -> Said:
    if image is None:
        faults.add(where, "image_id", "the id of an image", item.get("image_id"))
    film: Mapping[str, Any] = image or {"file_name": "?"}
    name = text(where, "file_name", film.get("file_name"), faults)
    key = item.get("category_id")
    category = text(where, "category_id", categories.get(key) if isinstance(key, int | str) else None, faults)
    phrase = _first(item, PHRASES) or category
    patient = _first(film, PATIENTS) or name
    gathering.notes[UNNAMED] += not _first(film, PATIENTS)
    size = film.get("width"), film.get("height")
    if size != (None, None) and not all(type(side) is int and side >= 1 for side in size):
        faults.add(where, "width, height", "whole numbers of pixels >= 1", size)
    return Said(
        where=where,
        image=name,
        phrase=phrase,
        category=category,
        box=box_of_xywh(*four_numbers(where, "bbox", item.get("bbox"), faults)),
        patient=patient,
        study=_first(film, STUDIES) or patient,
        split=split or split_of(patient, config.seed, config.val, config.test),
        size=None if size == (None, None) else (size[0], size[1]),  # type: ignore[arg-type]
    )


def _first(item: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these values that says something, as text."""
    for name in names:
        if isinstance(item.get(name), str | int) and str(item[name]).strip():
            return str(item[name]).strip()
    return ""
