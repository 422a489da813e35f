"""What an evaluation is held against: what comes of it where the image says nothing, or says the same in a mirror.

Asked of the model:

    shuffled   each phrase with another patient's image: what it scores there it scores without looking
    blank      each phrase with a grey image of the same size: likewise, and nothing on it can be mistaken for a finding
    flipped    each image mirrored, left and right swapped in the phrase where that is safe (augmentation.py). Its boxes
               are mirrored back, so that truth and side are those of the film. A model that reads film and phrase
               answers as it does to the plain film; one that knows where findings use to be does not

and of nobody:

    whole      one box, the whole image
    centre     one box, the middle half of width and height
    blind      the best constant box per phrase of the training records (`scoring.blind_baseline`)

The last three answer every record with a box: their `absent` is 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from medground.loading import Question
from medground.records import Example
from medground.scoring import Prediction

Asked = Literal["true", "shuffled", "blank", "flipped"]
Constant = Literal["whole", "centre"]

ASKED: tuple[Asked, ...] = ("shuffled", "blank", "flipped")
CONSTANT: tuple[Constant, ...] = get_args(Constant)


def questions(examples: Sequence[Example], control: Asked) -> list[Question]:
    """What is asked about each example, in their order: with its own image where it is "true".

    Raises:
        ValueError: images are to be shuffled and are all of one patient.
    """
    if control == "shuffled":
        return [Question(e, image) for e, image in zip(examples, _other_images(examples), strict=True)]
    if control == "true":
        return [Question(e, e.image) for e in examples]
    return [Question(e, e.image, change=control) for e in examples]


def constant_answers(examples: Sequence[Example], control: Constant) -> list[Prediction]:
    """The same fractions of every image."""
    low, high = {"whole": (0.0, 1.0), "centre": (0.25, 0.75)}[control]
    return [
        Prediction.without_model(e, ((low * e.width, low * e.height, high * e.width, high * e.height),))
        for e in examples
    ]


def agreement(plain: Sequence[Prediction], flipped: Sequence[Prediction]) -> list[Prediction]:
    """The answers to mirrored films with, as truth, those to the films themselves: to be scored.

    Each pair is a record of its own. Where a plain answer is unreadable there is nothing to agree with: it is left out.
    """
    pairs = list(zip(plain, flipped, strict=True))
    assert all((a.id, a.sample) == (b.id, b.sample) for a, b in pairs)
    return [
        replace(b, id=f"{b.id}/{b.sample or 0}", sample=None, truth=a.boxes) for a, b in pairs if a.boxes is not None
    ]


def _other_images(examples: Sequence[Example]) -> list[str]:
    n = len(examples)
    others = []
    for i, example in enumerate(examples):
        # half the list away: neighbours may share a film
        candidates = (examples[(i + n // 2 + k) % n] for k in range(n))
        other = next((c for c in candidates if c.patient != example.patient), None)
        if other is None:
            raise ValueError(f"shuffled images: want records of two patients or more; got only {example.patient}")
        others.append(other.image)
    return others
