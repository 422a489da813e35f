"""Warnings about records that are well formed: repeated pairs, sides that contradict the box, classes that miss."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from medground.records import Example
from medground.scoring import side_word

PAIR, SIDE, CLASS, PICTURE, EDITED = "repeated pair", "side", "class", "same picture", "edited"
RARE = 10  # records of a class in training below which its test records say little


@dataclass(frozen=True)
class Suspicion:
    """One suspicion: its kind, the record, image or class that it is about, and why."""

    kind: str
    where: str
    text: str

    def as_json(self) -> dict[str, str]:
        """The object of the JSON file."""
        return asdict(self)


def repeated_pairs(examples: Sequence[Example]) -> Iterator[Suspicion]:
    """One image and phrase (but for case and blanks) in several records."""
    first: dict[tuple[str, str], str] = {}
    for example in examples:
        key = example.image, " ".join(example.phrase.lower().split())
        other = first.setdefault(key, example.id)
        if other != example.id:
            yield Suspicion(PAIR, example.id, f"the image and phrase of {other}: {example.phrase!r}")


def wrong_sides(examples: Sequence[Example]) -> Iterator[Suspicion]:
    """Phrases with one side word whose boxes all lie on the other side.

    The patient's left is on the image's right. A box that reaches over the image's middle says nothing, since the
    patient's middle may lie beside it.
    """
    for example in examples:
        side, middle = side_word(example.phrase), example.width / 2
        if not side or not example.boxes:
            continue
        right_half = all(x1 >= middle for x1, _, _, _ in example.boxes)
        left_half = all(x2 <= middle for _, _, x2, _ in example.boxes)
        if (side == "left" and left_half) or (side == "right" and right_half):
            there = "left" if left_half else "right"
            yield Suspicion(SIDE, example.id, f"{example.phrase!r}, but every box is on the image's {there}")


def unbalanced_classes(examples: Sequence[Example]) -> Iterator[Suspicion]:
    """Categories of val or test with fewer than 10 training records."""
    train = Counter(example.category for example in examples if example.split == "train")
    for split in ("val", "test"):
        held = Counter(example.category for example in examples if example.split == split)
        for category, count in sorted(held.items()):
            if train[category] < RARE:
                yield Suspicion(CLASS, category, f"{count} records in {split}, {train[category]} in train")
