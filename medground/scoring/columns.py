"""Predictions as arrays: boxes of all records flat, one after another, and where each record's begin."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medground.records import Box
from medground.scoring.prediction import Prediction, side_word
from medground.set_iou import Floats

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SIDES = ("none", "left", "right")
"""The side word of a phrase by its code: `none` where the phrase has neither word, or both."""
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
    """Takes one answer after another; some 130 bytes each, and 32 a box."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._patients: dict[str, int] = {}  # name -> its number by first appearance
        self._categories: dict[str, int] = {}
        self._codes = array("q")  # of each answer: sample, patient, category, side, true and predicted boxes so far
        self._extent = array("d")
        self._readable = array("b")
        self._truth = array("d")
        self._boxes = array("d")

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self, name: str, patient: str, category: str, phrase: str, extent: Sequence[float],
        truth: Sequence[Box], boxes: Sequence[Box] | None, sample: int | None = None,
    ) -> None:  # fmt: skip
        """Take an answer; arguments as the fields of `Prediction`, extent the image's width and height."""
        self._ids.append(name)
        self._extent.extend(extent)
        self._readable.append(boxes is not None)
        for box in truth:
            self._truth.extend(box)
        for box in boxes or ():
            self._boxes.extend(box)
        self._codes.extend(
            (
                -1 if sample is None else sample,
                self._patients.setdefault(patient, len(self._patients)),
                self._categories.setdefault(category, len(self._categories)),
                _SIDE[side_word(phrase)],
                len(self._truth) // 4,
                len(self._boxes) // 4,
            )
        )

    def columns(self) -> Columns:
        """All that was taken; the builder is not to be used after."""
        codes = np.frombuffer(self._codes, dtype=np.int64).reshape(-1, 6)
        sample, patient, category, side, truth_at, boxes_at = (codes[:, i].copy() for i in range(6))
        patients, patient = _sorted(self._patients, patient)
        categories, category = _sorted(self._categories, category)
        return Columns(
            ids=self._ids,
            sample=sample,
            patient=patient,
            patients=patients,
            category=category,
            categories=categories,
            side=side,
            extent=np.frombuffer(self._extent).reshape(-1, 2),
            readable=np.frombuffer(self._readable, dtype=np.bool_),
            truth=np.frombuffer(self._truth).reshape(-1, 4),
            truth_at=np.concatenate([[0], truth_at]),
            boxes=np.frombuffer(self._boxes).reshape(-1, 4),
            boxes_at=np.concatenate([[0], boxes_at]),
        )


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
