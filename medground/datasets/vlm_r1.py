"""JSON and JSONL files of VLM-R1 and MedGround-R1 -> data folder (docs/data/records.md).

Two forms of an item, both with `image`, a path:

    {"image", "problem": phrase or question, "solution": [x1, y1, x2, y2] or a list of such}
    {"image", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": box as JSON}]}

Boxes are in pixels of the image. Of a question in VLM-R1's words only the phrase is kept. `normalized_solution` is not
read: `solution` says the same in pixels.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medground.datasets.faults import Faults
from medground.datasets.films import convert_film
from medground.datasets.gathering import Gathering, Said, facts, relative_stem
from medground.datasets.json_items import four_numbers, read_items, text
from medground.datasets.options import DrawnConfig, want
from medground.datasets.own_csv import UNNAMED
from medground.datasets.preparing import Original, prepare
from medground.datasets.splits import split_of, split_of_file
from medground.records import Box

NAME = "vlm-r1"
_QUESTION = re.compile(r"the region this sentence describes:\s*(.*?)\.?\s*(?:First output .*)?$", re.DOTALL)
_MIMIC = re.compile(r"(?:^|/)p(\d{8})/s(\d{8})/")


@dataclass(frozen=True, kw_only=True)
class VlmR1Config(DrawnConfig):
    """Turn annotations of VLM-R1 or MedGround-R1 into a data folder."""

    annotations: tuple[str, ...]
    """JSON or JSONL files."""
    images: str
    """Folder that `image` is relative to."""
    split: Literal["patient", "files"] = "patient"
    """`patient`: drawn by patient with `seed` (by image, where neither `patient` nor a path of MIMIC-CXR tells).
    `files`: by train, val or test in the file's name."""
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


def prepare_vlm_r1(config: VlmR1Config) -> None:
    """Write the data folder.

    Raises:
        ValueError: as `prepare`, or a file is no such list.
    """
    prepare(config, read_vlm_r1(config))


def read_vlm_r1(config: VlmR1Config) -> Original:
    """The films of the files.

    Raises:
        ValueError: a file is missing, or is no such list.
    """
    gathering = Gathering()
    for path in map(Path, config.annotations):
        split = split_of_file(path) if config.split == "files" else ""
        for where, item in read_items(path):
            _take(config, gathering, split, where, item)
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


def _take(config: VlmR1Config, gathering: Gathering, split: str, where: str, item: Any) -> None:
    """An item of several boxes counts as several rows."""
    faults = Faults()
    said = _parse(config, split, where, item, faults)
    boxes = _boxes(where, item, faults)
    if faults:
        gathering.read += 1
        gathering.faults += [{"rows": [where] * (not i), "why": line} for i, line in enumerate(faults.lines)]
        return
    gathering.notes[UNNAMED] += said["patient"] == said["image"]
    for number, box in enumerate(boxes or [None]):
        place = where if len(boxes) < 2 else f"{where}#{number}"
        gathering.take(place, partial(_said, said | {"where": place, "box": box}))


def _said(values: dict[str, Any], faults: Faults) -> Said:
    return Said(**values)


def _parse(config: VlmR1Config, split: str, where: str, item: Any, faults: Faults) -> dict[str, Any]:
    if not isinstance(item, dict):
        faults.add(where, "item", "an object", item)
        return {}
    image = item.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    image = text(where, "image", image, faults)
    if "conversations" in item:
        question = text(where, "conversations[0].value", _turn(item, 0), faults).replace("<image>", "").strip()
    else:
        question = text(where, "problem", item.get("problem"), faults)
    found = _QUESTION.search(question)
    mimic = _MIMIC.search(image)
    patient = item.get("patient") or (f"mimic-{mimic[1]}" if mimic else image)
    study = item.get("study") or (f"mimic-{mimic[2]}" if mimic else patient)
    for name, value in (("patient", patient), ("study", study)):
        if not faults:
            text(where, name, value, faults)
    return {
        "image": image,
        "phrase": found[1].strip() if found and found[1].strip() else question,
        "category": item.get("category") if isinstance(item.get("category"), str) else "finding",
        "patient": patient,
        "study": study,
        "split": split or split_of(str(patient), config.seed, config.val, config.test),
        "size": None,
    }


def _turn(item: dict[str, Any], number: int) -> Any:
    turns = item["conversations"]
    turn = turns[number] if isinstance(turns, list) and len(turns) > number else None
    return turn.get("value") if isinstance(turn, dict) else None


def _boxes(where: str, item: Any, faults: Faults) -> list[Box]:
    if not isinstance(item, dict):
        return []
    field = "conversations[1].value" if "conversations" in item else "solution"
    value = _turn(item, 1) if "conversations" in item else item.get("solution")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            faults.add(where, field, "a box [x1, y1, x2, y2] or a list of boxes", value)
            return []
    if not isinstance(value, list):
        faults.add(where, field, "a box [x1, y1, x2, y2] or a list of boxes", value)
        return []
    items = value if all(isinstance(one, list | dict) for one in value) else [value]
    return [four_numbers(where, field, one.get("bbox_2d") if isinstance(one, dict) else one, faults) for one in items]
