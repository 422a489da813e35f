"""Predictions as arrays: boxes of all records flat, one after another, and where each record's begin."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medground.records import Box
from medground.scoring.prediction import Prediction, side_word
from medground.set_iou import Floats

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SIDES = ("none", "left", "right")
"""The side word of a phrase by its code: `none` where the phrase has neither word, or both."""
Taken = tuple[str, int, int, str, str, str, Sequence[Box], Sequence[Box] | None, int | None]
_BATCH = 128  # answers that become arrays together
_SIDE = {"": 0, "left": 1, "right": 2}


@dataclass(frozen=True)
class Columns:
    """N answers; T true boxes and P predicted boxes of all of them.

    Attributes:
        ids: [N] of the records.
        sample: [N], number of the answer among those of its record; -1 where the record was asked once.
        patient: [N], position in `patients`.
        patients: their names, sorted.
        category: [N], position in `categories`.
        categories: their names, sorted.
        side: [N], position in SIDES.
        extent: [N, 2], width and height of the image in pixels; 0 where they are not known.
        readable: [N], whether the answer could be read.
        truth: [T, 4], original xyxy.
        truth_at: [N + 1]; record i's true boxes are truth[truth_at[i] : truth_at[i + 1]].
        boxes: [P, 4], likewise.
        boxes_at: [N + 1].
    """

    ids: list[str]
    sample: Ints
    patient: Ints
    patients: list[str]
    category: Ints
    categories: list[str]
    side: Ints
    extent: Floats
    readable: Bools
    truth: Floats
    truth_at: Ints
    boxes: Floats
    boxes_at: Ints

    def __len__(self) -> int:
        return len(self.ids)


class Builder:
    """Takes answers; some 150 bytes each, and 32 a box."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._patients: dict[str, int] = {}  # name -> its number by first appearance
        self._categories: dict[str, int] = {}
        self._parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
        self._waiting: list[Taken] = []

    def __len__(self) -> int:
        return len(self._ids) + len(self._waiting)

    def add(
        self, name: str, patient: str, category: str, phrase: str, extent: tuple[int, int],
        truth: Sequence[Box], boxes: Sequence[Box] | None, sample: int | None = None,
    ) -> None:  # fmt: skip
        """Take an answer; arguments as the fields of `Prediction`, extent the image's width and height."""
        self._waiting.append((name, *extent, phrase, category, patient, truth, boxes, sample))
        if len(self._waiting) == _BATCH:
            self._take_waiting()

    def extend(self, answers: Iterable[Taken]) -> None:
        """Take many answers: (id, width, height, phrase, category, patient, truth, boxes, sample) of each."""
        columns = list(zip(*answers, strict=True))
        if not columns:
            return
        names, width, height, phrases, categories, patients, truth, boxes, samples = columns
        self._ids += names
        codes = {
            "width": width,
            "height": height,
            "side": [_SIDE[side_word(phrase)] for phrase in phrases],
            "category": [self._categories.setdefault(c, len(self._categories)) for c in categories],
            "patient": [self._patients.setdefault(p, len(self._patients)) for p in patients],
            "readable": [answer is not None for answer in boxes],
            "sample": [-1 if sample is None else sample for sample in samples],
        }
        for name, values in codes.items():
            self._parts[name].append(np.array(values, dtype=np.int64))
        for name, sets in (("truth", truth), ("boxes", [answer or () for answer in boxes])):
            self._parts[f"{name} counts"].append(np.fromiter(map(len, sets), np.int64, len(sets)))
            flat = list(chain.from_iterable(chain.from_iterable(sets)))
            self._parts[name].append(np.array(flat, dtype=np.float64).reshape(-1, 4))

    def columns(self) -> Columns:
        """All that was taken; the builder is not to be used after."""
        self._take_waiting()
        assert self._ids, "no answers were taken"
        found = {name: np.concatenate(self._parts.pop(name)) for name in list(self._parts)}
        patients, patient = _sorted(self._patients, found["patient"])
        categories, category = _sorted(self._categories, found["category"])
        return Columns(
            ids=self._ids,
            sample=found["sample"],
            patient=patient,
            patients=patients,
            category=category,
            categories=categories,
            side=found["side"],
            extent=np.stack([found["width"], found["height"]], axis=1).astype(np.float64),
            readable=found["readable"] > 0,
            truth=found["truth"],
            truth_at=np.concatenate([[0], np.cumsum(found["truth counts"])]),
            boxes=found["boxes"],
            boxes_at=np.concatenate([[0], np.cumsum(found["boxes counts"])]),
        )

    def _take_waiting(self) -> None:
        self.extend(self._waiting)
        self._waiting = []


def columns_of(predictions: Iterable[Prediction]) -> Columns:
    """Predictions as columns, in their order."""
    builder = Builder()
    for p in predictions:
        builder.add(p.id, p.patient, p.category, p.phrase, (p.width, p.height), p.truth, p.boxes, p.sample)
    return builder.columns()


def take(columns: Columns, rows: Ints) -> Columns:
    """The answers `rows`, in that order."""
    truth, truth_at = _take_boxes(columns.truth, columns.truth_at, rows)
    boxes, boxes_at = _take_boxes(columns.boxes, columns.boxes_at, rows)
    return Columns(
        ids=[columns.ids[row] for row in rows.tolist()],
        sample=columns.sample[rows],
        patient=columns.patient[rows],
        patients=columns.patients,
        category=columns.category[rows],
        categories=columns.categories,
        side=columns.side[rows],
        extent=columns.extent[rows],
        readable=columns.readable[rows],
        truth=truth,
        truth_at=truth_at,
        boxes=boxes,
        boxes_at=boxes_at,
    )


def _take_boxes(boxes: Floats, at: Ints, rows: Ints) -> tuple[Floats, Ints]:
    counts = at[rows + 1] - at[rows]
    new = np.concatenate([[0], np.cumsum(counts)])
    # position in `boxes` of each box kept: its record's start there, plus its place within the record
    return boxes[np.repeat(at[rows] - new[:-1], counts) + np.arange(new[-1])], new


def _sorted(codes: dict[str, int], column: Ints) -> tuple[list[str], Ints]:
    """Names in order, and the column with each name's place in that order."""
    names = sorted(codes)
    places = np.empty(len(names), dtype=np.int64)
    places[[codes[name] for name in names]] = np.arange(len(names))
    return names, places[column]
