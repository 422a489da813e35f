"""Predictions in forms that other programs read: CSV, COCO results."""

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medground.datasets.inventory import written_whole
from medground.records import Box
from medground.scoring.prediction import Prediction

COLUMNS = (
    "id", "sample", "image", "width", "height", "phrase", "category", "patient", "readable", "truth", "boxes", "iou",
    "logp",
)  # fmt: skip


def write_csv(path: Path, predictions: Iterable[Prediction]) -> None:
    """A row for each answer, in UTF-8 with a header.

    `truth` and `boxes` are JSON lists of [x1, y1, x2, y2] in original pixels, `readable` 1 or 0, `sample` empty where
    the record has one answer.
    """
    with written_whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for p in predictions:
            writer.writerow(
                (
                    p.id, "" if p.sample is None else p.sample, p.image, p.width, p.height, p.phrase, p.category,
                    p.patient, int(p.boxes is not None), json.dumps(p.truth), json.dumps(p.boxes or ()),
                    f"{p.iou:.6f}", p.logp,
                )
            )  # fmt: skip


def write_coco(path: Path, predictions: Iterable[Prediction]) -> list[str]:
    """COCO results, and the annotations that they answer to beside them, in `PATH less its suffix.truth.json`.

    Every answer is an image of its own there, with `record`, `phrase`, `category` and `patient`: two phrases on one
    film are two questions. All scores are 1, since answers have none.

    Returns:
        What the two files cannot say, a sentence each.
    """
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    unreadable, shapeless = 0, 0
    for number, p in enumerate(predictions, 1):
        place = {"image_id": number, "category_id": categories.setdefault(p.category, len(categories) + 1)}
        images.append(
            {
                "id": number, "file_name": p.image, "width": p.width, "height": p.height, "record": p.id,
                "phrase": p.phrase, "category": p.category, "patient": p.patient,
            }
        )  # fmt: skip
        for box in p.truth:
            bbox = _xywh(box)
            annotation = {"id": len(annotations) + 1, **place, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
            annotations.append(annotation)
        drawn = [_xywh(box) for box in p.boxes or ()]
        kept = [box for box in drawn if all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0]
        results += [{**place, "bbox": box, "score": 1.0} for box in kept]
        unreadable += p.boxes is None
        shapeless += len(drawn) - len(kept)
    named = [{"id": number, "name": name} for name, number in categories.items()]
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": named}
    truth_path = path.with_suffix(".truth.json")
    for name, value in ((path, results), (truth_path, truth)):
        with written_whole(name) as file:
            json.dump(value, file, ensure_ascii=False, allow_nan=False)
    notes = [f"{path} answers to {truth_path}"]
    if unreadable:
        notes.append(f"{path}: {unreadable} unreadable answers have no box there, as if nothing had been found")
    if shapeless:
        notes.append(f"{path}: {shapeless} boxes that are inverted, without area or not finite are not in it")
    return notes


def _xywh(box: Box) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]
