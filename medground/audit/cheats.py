"""Policies that a reward is tried on, as text: those that never learnt to ground, and honest ones.

Every completion is in the template's exact grammar unless the policy is about breaking it. "p off" of an honest one:
each edge of the box is moved by itself, evenly from -p to +p of the box's side along it. Numbers are whole, as the
model says them. Where the image does not show the phrase, a jittered truth is the truth, the empty answer.

The fair policy, of each completion: 40 % the truth 10 % off, 30 % 25 % off, 20 % 50 % off, 10 % the blind prior; where
there is nothing to find, 70 % the empty answer, 30 % the blind prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medground.answers import LARGEST, render_answer
from medground.augmentation import mirror_box
from medground.config import CHAINED, Template
from medground.prompts import question_text, spoken_size, to_spoken
from medground.records import Box, Example, Prompt
from medground.scoring import side_word

TINY = 0.02
"""Sides of a tiny box, in those of the image; one number of the model's coordinates at least."""
GRID, REPEATS = 4, 50
TRUTH, JITTERED, FAIR = "truth", "25 % off", "fair policy"
EMPTY = "empty answer"

Boxes = tuple[Box, ...]


@dataclass(frozen=True)
class Case:
    """One record that policies answer to.

    Attributes:
        prompt: what is asked; of the image only its sizes are looked at.
        template: that completions answer to.
        prior: what the blind baseline answers, original boxes.
        draw: random numbers.
    """

    prompt: Prompt
    template: Template
    prior: Boxes
    draw: np.random.Generator

    @property
    def example(self) -> Example:
        """The record."""
        return self.prompt.example

    @property
    def size(self) -> tuple[int, int]:
        """The whole image's lower right corner, in the model's coordinates."""
        return spoken_size(self.prompt)

    def thought(self) -> str:
        """A thought of the template's form."""
        if self.template not in CHAINED:
            return "The box is around it."
        width, height = self.size
        return f'I look at the image {{"bbox_2d": [0, 0, {width}, {height}], "label": "image"}}.'

    def say(self, boxes: Boxes) -> str:
        """An answer of these boxes, in the model's coordinates."""
        return render_answer(boxes, self.thought())

    def show(self, boxes: Boxes) -> str:
        """An answer of these original boxes."""
        return self.say(tuple(to_spoken(box, self.prompt) for box in boxes))

    def around(self, x: float, y: float, share: float) -> Box:
        """A box about a point in the model's coordinates, its sides a share of the image's, one number at least."""
        half = [max(round(share * side), 1) / 2 for side in self.size]
        left, top = round(x - half[0]), round(y - half[1])
        return (left, top, left + round(2 * half[0]), top + round(2 * half[1]))


class Policy(NamedTuple):
    """How it answers; None where it has no meaning for a record."""

    name: str
    about: str
    complete: Callable[[Case], str | None]


def jittered(boxes: Boxes, off: float, draw: np.random.Generator) -> Boxes:
    """Boxes, each edge moved by up to `off` of the box's side along it, either way."""
    moved = []
    for x1, y1, x2, y2 in boxes:
        a, b, c, d = draw.uniform(-off, off, 4).tolist()
        left, right = sorted((x1 + a * (x2 - x1), x2 + c * (x2 - x1)))
        top, bottom = sorted((y1 + b * (y2 - y1), y2 + d * (y2 - y1)))
        moved.append((left, top, right, bottom))
    return tuple(moved)


def mirrored(example: Example) -> Boxes | None:
    """The true boxes on the film's other side; None unless the phrase names a side and all of them lie on one."""
    middle = example.width / 2
    one_sided = all(x1 >= middle for x1, _, _, _ in example.boxes) or all(x2 <= middle for _, _, x2, _ in example.boxes)
    if not example.boxes or not one_sided or not side_word(example.phrase):
        return None
    return tuple(mirror_box(box, example.width) for box in example.boxes)


def fair(case: Case) -> str:
    """A completion of the fair policy."""
    pick = case.draw.random()
    if not case.example.boxes:
        return case.show(() if pick < 0.7 else case.prior)
    for until, off in ((0.4, 0.1), (0.7, 0.25), (0.9, 0.5)):
        if pick < until:
            return case.show(jittered(case.example.boxes, off, case.draw))
    return case.show(case.prior)


def _off(share: float) -> Policy:
    name = f"{share:.0%} off".replace("%", " %")
    about = f"the truth, each edge up to {share:.0%} of its side off".replace("%", " %")
    return Policy(name, about, lambda case: case.show(jittered(case.example.boxes, share, case.draw)))


def _whole(case: Case) -> str:
    return case.say(((0, 0, *case.size),))


def _middle(case: Case) -> tuple[float, float]:
    return case.size[0] / 2, case.size[1] / 2


def _in_place(case: Case) -> str:
    if not case.example.boxes:
        return case.say((case.around(*_middle(case), TINY),))
    spoken = [to_spoken(box, case.prompt) for box in case.example.boxes]
    return case.say(tuple(case.around((x1 + x2) / 2, (y1 + y2) / 2, TINY) for x1, y1, x2, y2 in spoken))


def _random(case: Case) -> str:
    (x1, x2), (y1, y2) = (sorted(case.draw.integers(0, side + 1, 2).tolist()) for side in case.size)
    return case.say(((x1, y1, x2, y2),))


def _mirror(case: Case) -> str | None:
    other = mirrored(case.example)
    return None if other is None else case.show(other)


def _both_sides(case: Case) -> str | None:
    other = mirrored(case.example)
    return None if other is None else case.show((*case.example.boxes, *other))


def _many(case: Case) -> str:
    width, height = (side / GRID for side in case.size)
    return case.say(
        tuple((x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(GRID) for x in range(GRID))
    )


def _thought_alone(case: Case) -> str:
    box = render_answer(tuple(to_spoken(b, case.prompt) for b in (case.example.boxes or case.prior)[:1]), "")
    said = box.partition("<answer>")[2].removesuffix("</answer>")
    return f"<think>{case.thought()} It is {said}</think><answer></answer>"


def _blocks(case: Case) -> str:
    thought, tag, answer = case.show(case.prior).partition("<answer>")
    return thought + (tag + answer) * REPEATS


def _huge(case: Case) -> str:
    most = LARGEST - 1
    return case.say(((-most, -most, most, most),))


def _below_zero(case: Case) -> str:
    width, height = case.size
    return case.say(((-width, -height, -1, -1),))


HONEST = (
    Policy(TRUTH, "the true boxes", lambda case: case.show(case.example.boxes)),
    *(_off(share) for share in (0.05, 0.1, 0.25, 0.5)),
)
CHEATS = (
    Policy("whole image", "one box, the whole image", _whole),
    Policy("tiny box", "2 % of the sides, at the image's centre", lambda c: c.say((c.around(*_middle(c), TINY),))),
    Policy("tiny box in place", "2 % of the sides, at each true box's centre", _in_place),
    Policy("centre box", "half of the sides, at the image's centre", lambda c: c.say((c.around(*_middle(c), 0.5),))),
    Policy("random box", "any two corners", _random),
    Policy("blind prior", "the best constant of its phrase, or category and side", lambda c: c.show(c.prior)),
    Policy("mirror side", "the truth on the other side, where the phrase names one", _mirror),
    Policy("both sides", "the truth and its mirror image, where the phrase names a side", _both_sides),
    Policy("many boxes", f"{GRID} x {GRID} boxes, all of the image", _many),
    Policy("same box 50 times", "the blind prior, listed 50 times", lambda c: c.show(c.prior[:1] * REPEATS)),
    Policy("copied prompt", "what was asked", lambda c: question_text(c.example.phrase, c.template)),
    Policy(EMPTY, "nothing found", lambda c: c.say(())),
    Policy("thought alone", "the true box in the thought, an answer without text", _thought_alone),
    Policy("answer 50 times", "the blind prior's answer in 50 blocks", _blocks),
    Policy("huge numbers", "from -999999 to 999999", _huge),
    Policy("negative numbers", "a box above and left of the image", _below_zero),
)  # fmt: skip
"""Degenerate policies; the empty answer is honest where there is nothing to find."""


def completions(case: Case, policies: Sequence[Policy], fairs: int) -> list[str | None]:
    """What each policy says to a record, then `fairs` completions of the fair policy."""
    return [policy.complete(case) for policy in policies] + [fair(case) for _ in range(fairs)]
