"""COCO results and the annotations that they answer to -> columns.

    results      [{"image_id", "category_id", "bbox": [x, y, width, height], "score"}]
    annotations  {"images", "annotations", "categories"}, as COCO has them

A record is an image with a category that has a true or a predicted box on it. All boxes count, whatever their score:
drop those that the model would not have answered with. An image without either is a record without a true box, answered
by nothing found. An image may say who its `patient` (`patient_id`, `subject_id`) is, what its `phrase` and its
`category`, as the files do that `medground score --coco` writes. This form cannot say that an answer was unreadable.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medground.datasets.faults import Faults
from medground.datasets.json_items import read_json
from medground.records import Box
from medground.scoring.columns import Builder
from medground.scoring.reading import Loaded

PATIENTS = ("patient", "patient_id", "subject_id")
Key = tuple[Any, Any]  # image_id, category_id


def read_coco(path: Path, truth_path: Path) -> Loaded:
    """The records of both files.

    Raises:
        ValueError: a file is missing, or not in this form; names the items that are not.
    """
    faults = Faults()
    images, categories, annotations = _annotations(truth_path, faults)
    results = read_json(path)
    if not isinstance(results, list):
        raise ValueError(f"{path}: want a list of results; got {type(results).__name__}")
    faults.raise_if_any(truth_path, "docs/evaluation.md")
    crowds = sum(bool(item.get("iscrowd")) for item in annotations if isinstance(item, dict))
    plain = [item if not isinstance(item, dict) or not item.get("iscrowd") else None for item in annotations]
    truth = _boxes(f"{truth_path}: annotations", plain, images, categories, faults, areas=True)
    answers = _boxes(f"{path}: results", results, images, categories, faults)
    faults.raise_if_any(path, "docs/evaluation.md")
    notes = [f"left out: {crowds} annotations with `iscrowd`, which are no box"] if crowds else []
    named = [_first(image, PATIENTS) for image in images.values()]
    cluster = "patient" if all(named) else "image"
    if not all(named):
        notes.append("not every image names a patient: intervals resample images, and may be too narrow")
    if not all(_extent(image)[0] for image in images.values()):
        notes.append("not every image has width and height: those without are in no table by size, and have no side")
    builder, keys = Builder(), dict.fromkeys([*truth, *answers])
    bare = images.keys() - {image for image, _ in keys}
    for key in [*keys, *((name, None) for name in images if name in bare)]:
        image = images[key[0]]
        category = categories.get(key[1]) or _first(image, ("category",))
        builder.add(
            f"{key[0]}/{key[1]}",
            _first(image, PATIENTS) if cluster == "patient" else str(key[0]),
            category,
            _first(image, ("phrase",)) or category,
            _extent(image),
            truth.get(key, []),
            answers.get(key, []),
        )
    if not len(builder):
        raise ValueError(f"{truth_path}: images: want at least one image; got none")
    return Loaded(builder.columns(), notes=notes, claims={"cluster": cluster})


def _annotations(path: Path, faults: Faults) -> tuple[dict[Any, Mapping[str, Any]], dict[Any, str], list[Any]]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want an object with images, annotations, categories; got {type(value).__name__}")
    for name in ("images", "annotations", "categories"):
        if not isinstance(value.get(name), list):
            raise ValueError(f"{path}: {name}: want a list; got {type(value.get(name)).__name__}")
    found: dict[str, dict[Any, Any]] = {"images": {}, "categories": {}}
    for name, items in found.items():
        for index, item in enumerate(value[name]):
            where = f"{path}: {name}[{index}]"
            key = item.get("id") if isinstance(item, dict) else None
            if type(key) not in (int, str) or key in items:
                faults.add(where, "id", "an object with an id of its own, a number or a text", key)
                continue
            items[key] = item
            if name == "categories" and not (isinstance(item.get("name"), str) and item["name"].strip()):
                faults.add(where, "name", "a text that is not empty", item.get("name"))
    names = {key: str(item.get("name")) for key, item in found["categories"].items()}
    return found["images"], names, value["annotations"]


def _boxes(
    place: str, items: list[Any], images: Mapping[Any, Any], categories: Mapping[Any, str], faults: Faults,
    areas: bool = False,
) -> dict[Key, list[Box]]:  # fmt: skip
    """The boxes of each image and category; None items are left aside; `areas`: width and height have to be > 0."""
    found: dict[Key, list[Box]] = {}
    for index, item in enumerate(items):
        if item is None and areas:
            continue
        where = f"{place}[{index}]"
        if not isinstance(item, dict):
            faults.add(where, "item", "an object", item)
            continue
        before = len(faults)
        for name, known in (("image_id", images), ("category_id", categories)):
            if type(item.get(name)) not in (int, str) or item[name] not in known:
                faults.add(where, name, f"the id of one of the {len(known)} in the annotations", item.get(name))
        box = item.get("bbox")
        numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)
        if not numbers or (areas and not (box[2] > 0 and box[3] > 0)):  # type: ignore[index]
            faults.add(where, "bbox", "four numbers x, y, width, height" + ", both > 0" * areas, box)
        if len(faults) == before:
            x, y, width, height = item["bbox"]
            found.setdefault((item["image_id"], item["category_id"]), []).append((x, y, x + width, y + height))
    return found


def _extent(image: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height, zeros where they are not both whole numbers >= 1."""
    width, height = image.get("width"), image.get("height")
    if type(width) is int and type(height) is int and width >= 1 and height >= 1:
        return width, height
    return 0, 0


def _first(item: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these values that says something, as text."""
    for name in names:
        if isinstance(item.get(name), str | int) and str(item[name]).strip():
            return str(item[name]).strip()
    return ""
