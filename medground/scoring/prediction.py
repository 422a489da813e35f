"""One record and what a model answered; the side that a phrase names."""

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from medground.records import Box
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
