"""The baseline that never looks at the image: what any model must beat to show that it does."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from medground.records import Box, Example
from medground.scoring.prediction import Prediction, side_word
from medground.scoring.scores import score
from medground.set_iou import Floats, box_array, set_ious

BLIND_CANDIDATES = 256


def blind_baseline(train: Sequence[Example], test: Sequence[Example]) -> dict[str, Any]:
    """How far a constant answer per phrase gets: what any model must beat to show that it looks at the image.

    For each phrase, the answer (in fractions of the image) with the best mean set IoU over the phrase's training
    records; candidates are the answers of those records, at most 256 drawn at random, and the coordinate-wise median
    of those with one box. A phrase that training has not seen takes the answer of its category and side word, else of
    its category, else of all. It always answers with a box, so that `absent` is 0.

    Args:
        train: records to choose from; those without a box are left aside.
        test: records to score.

    Returns:
        As `score`.

    Raises:
        ValueError: no training record has a box, or test is empty.
    """
    predictions = [
        Prediction.without_model(example, boxes)
        for example, boxes in zip(test, blind_answers(train, test), strict=True)
    ]
    return score(predictions)


def blind_answers(train: Sequence[Example], test: Sequence[Example]) -> list[tuple[Box, ...]]:
    """What `blind_baseline` answers to each record of `test`, original boxes.

    Raises:
        ValueError: no training record has a box.
    """
    seen: dict[Hashable, list[Floats]] = {}
    for example in train:
        if example.boxes:
            fractions = box_array(example.boxes) / _extent(example)
            for key in _blind_keys(example):
                seen.setdefault(key, []).append(fractions)
    if not seen:
        raise ValueError(f"want a training record with a box for the blind baseline; got {len(train)} without")
    constants: dict[Hashable, Floats] = {}
    answers = []
    for example in test:
        key = next(key for key in _blind_keys(example) if key in seen)
        if key not in constants:
            constants[key] = _best_constant(seen[key])
        answers.append(tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in (constants[key] * _extent(example)).tolist()))
    return answers


def _extent(example: Example) -> Floats:
    return np.array([example.width, example.height, example.width, example.height], dtype=np.float64)


def _blind_keys(example: Example) -> tuple[Hashable, ...]:
    phrase = example.phrase.strip().lower()
    return ("phrase", phrase), (example.category, side_word(phrase)), (example.category,), ()


def _best_constant(records: list[Floats]) -> Floats:
    """The set of boxes [k, 4] with the best mean set IoU over `records`, each [n, 4], n >= 1."""
    order = np.random.default_rng(0).permutation(len(records))[:BLIND_CANDIDATES]
    candidates = [records[i] for i in order]
    singles = [boxes for boxes in records if len(boxes) == 1]
    if singles:
        candidates.append(np.median(np.stack(singles), axis=0))
    totals = np.zeros(len(candidates))
    for k in {len(boxes) for boxes in candidates}:
        chosen = [i for i, boxes in enumerate(candidates) if len(boxes) == k]
        for n in {len(boxes) for boxes in records}:
            truth = np.stack([boxes for boxes in records if len(boxes) == n])
            totals[chosen] += set_ious(np.stack([candidates[i] for i in chosen]), truth).sum(1)
    return candidates[int(totals.argmax())]
