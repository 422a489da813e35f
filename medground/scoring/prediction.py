"""One record and what a model answered; the side that a phrase names."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from medground.records import Box, Example
from medground.set_iou import set_iou


@dataclass(frozen=True)
class Prediction:
    """One record and what the model answered: a line of `eval/*.predictions.jsonl` (docs/run_folder.md).

    Boxes are original. `boxes` is None when the completion has no readable answer and () for "nothing found";
    `logp` is summed over the completion, in nats; `thought_boxes` are those named while thinking; `sample` is the
    number of the completion where a record has several, else None.
    """

    id: str
    image: str
    width: int
    height: int
    phrase: str
    category: str
    patient: str
    truth: tuple[Box, ...]
    boxes: tuple[Box, ...] | None
    completion: str
    logp: float
    thought_boxes: tuple[Box, ...] = ()
    sample: int | None = None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Prediction":
        """What `row` wrote, as JSON gives it back; it is believed (`reading.py` checks files of others)."""
        values = {name: value for name, value in row.items() if name != "iou"}
        for name in ("truth", "boxes", "thought_boxes"):
            if values.get(name) is not None:
                values[name] = tuple(map(tuple, values[name]))
        return cls(**values)

    @classmethod
    def without_model(cls, example: Example, boxes: tuple[Box, ...]) -> "Prediction":
        """An answer to a record that no model gave: no text, and certain."""
        e = example
        return cls(
            e.id, e.image, e.width, e.height, e.phrase, e.category, e.patient, e.boxes, boxes, completion="", logp=0.0
        )

    @cached_property
    def iou(self) -> float:
        """`set_iou` of the answer and the truth."""
        return set_iou(self.boxes, self.truth)

    def row(self) -> dict[str, Any]:
        """The JSON object of the line, `iou` included, `thought_boxes` and `sample` where there are any."""
        row = asdict(self) | {"iou": self.iou}
        if not self.thought_boxes:
            del row["thought_boxes"]
        if self.sample is None:
            del row["sample"]
        return row


def side_word(phrase: str) -> str:
    """'left' or 'right' when the phrase has one of the two words, else ''."""
    words = phrase.lower()
    if "left" not in words and "right" not in words:  # most of a million phrases
        return ""
    found = set(_SIDES.findall(words))
    return found.pop() if len(found) == 1 else ""


_SIDES = re.compile(r"\b(?:left|right)\b")
