"""Predictions -> metrics with 95 % intervals; and the baseline that never looks at the image.

All metrics are means of a score per record over the records they apply to:

    miou              set IoU, over records with at least one true box
    acc@0.3 0.5 0.7   set IoU > threshold (strict), over the same records
    centre_hit        the first predicted box's centre lies in a true box, over the same records
    false_empty       answered by the empty list, over the same records
    side              the first predicted box's centre lies on the same half of the image as the first true box's
                      centre, over records with a true box and a phrase with one of the words left and right, not both
    absent            answered by the empty list, over records without a true box
    parse_failures    unreadable, over all records

A centre on the midline lies on neither half: as a prediction it is wrong; such a truth has no side to get right.
Intervals: percentile bootstrap that resamples patients, since findings of one patient are not independent
(Efron & Tibshirani 1993, chapters 8 and 13).
"""

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from medground.records import Box, Example
from medground.set_iou import Floats, box_array, box_ious, set_iou, set_ious

__all__ = ["Prediction", "blind_answers", "blind_baseline", "clustered_means", "score", "set_iou", "side_word"]

THRESHOLDS = (0.3, 0.5, 0.7)
CATEGORY_METRICS = ("miou", "acc@0.5")
BLIND_CANDIDATES = 256
_CHUNK = 2_000_000  # elements of a temporary array: 16 MB


@dataclass(frozen=True)
class Prediction:
    """One record and what the model answered: a line of `eval/*.predictions.jsonl` (docs/run_folder.md).

    Boxes are original. `boxes` is None when the completion has no readable answer and () for "nothing found";
    `logp` is summed over the completion, in nats.
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

    @cached_property
    def iou(self) -> float:
        """`set_iou` of the answer and the truth."""
        return set_iou(self.boxes, self.truth)

    def row(self) -> dict[str, Any]:
        """The JSON object of the line, `iou` included."""
        return asdict(self) | {"iou": self.iou}


def score(predictions: Sequence[Prediction], resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Every metric of the module docstring, each with its interval.

    Args:
        predictions: of one evaluation.
        resamples: bootstrap resamples, >= 1.
        seed: of the bootstrap.

    Returns:
        {"metrics": {name: estimate}, "by_category": {category: {"miou": estimate, "acc@0.5": estimate}}} with
        estimate = {"value", "low", "high", "n"}: mean over n records and the bounds of its 95 % interval; these three
        are None where n is 0. With one patient the interval is the value: nothing is known of the spread.

    Raises:
        ValueError: there are no predictions, or resamples < 1.
    """
    if not predictions:
        raise ValueError("want at least one prediction to score; got none")
    if resamples < 1:
        raise ValueError(f"want resamples >= 1; got {resamples}")
    columns = {name: np.array([rule(p) for p in predictions], dtype=np.float64) for name, rule in _METRICS.items()}
    of_category = np.array([p.category for p in predictions])
    categories = sorted(set(of_category.tolist()))
    parts = [(category, name) for category in categories for name in CATEGORY_METRICS]
    split = [np.where(of_category == category, columns[name], np.nan) for category, name in parts]
    patients = [p.patient for p in predictions]
    estimates = clustered_means(np.stack([*columns.values(), *split], axis=1), patients, resamples, seed)
    by_category: dict[str, dict[str, Any]] = {category: {} for category in categories}
    for (category, name), estimate in zip(parts, estimates[len(columns) :], strict=True):
        by_category[category][name] = estimate
    return {"metrics": dict(zip(columns, estimates, strict=False)), "by_category": by_category}


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
        Prediction(
            example.id, example.image, example.width, example.height, example.phrase, example.category,
            example.patient, example.boxes, boxes, "", 0.0,
        )
        for example, boxes in zip(test, blind_answers(train, test), strict=True)
    ]  # fmt: skip
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


def side_word(phrase: str) -> str:
    """'left' or 'right' when the phrase has one of the two words, else ''."""
    found = {word for word in re.findall(r"\w+", phrase.lower()) if word in ("left", "right")}
    return found.pop() if len(found) == 1 else ""


def _first_centre(boxes: Sequence[Box] | None) -> tuple[float, float] | None:
    if not boxes or not box_ious(box := box_array(boxes[:1]), box)[0]:
        return None
    x1, y1, x2, y2 = box[0].tolist()
    return (x1 + x2) / 2, (y1 + y2) / 2


def _centre_hit(p: Prediction) -> float:
    centre = _first_centre(p.boxes)
    if centre is None:
        return 0.0
    return float(any(x1 <= centre[0] <= x2 and y1 <= centre[1] <= y2 for x1, y1, x2, y2 in p.truth))


def _side(p: Prediction) -> float:
    truth, answer = _first_centre(p.truth), _first_centre(p.boxes)
    if truth is None or truth[0] == p.width / 2 or not side_word(p.phrase):
        return float("nan")
    return float(answer is not None and (answer[0] - p.width / 2) * (truth[0] - p.width / 2) > 0)


def _when(applies: Callable[[Prediction], bool], rule: Callable[[Prediction], float]) -> Callable[[Prediction], float]:
    """`rule`, nan for the records that it does not apply to."""
    return lambda p: float(rule(p)) if applies(p) else float("nan")


def _present(p: Prediction) -> bool:
    return bool(p.truth)


def _above(threshold: float) -> Callable[[Prediction], float]:
    return lambda p: p.iou > threshold


_METRICS: dict[str, Callable[[Prediction], float]] = {
    "miou": _when(_present, lambda p: p.iou),
    **{f"acc@{threshold}": _when(_present, _above(threshold)) for threshold in THRESHOLDS},
    "side": _side,
    "centre_hit": _when(_present, _centre_hit),
    "absent": _when(lambda p: not p.truth, lambda p: p.boxes == ()),
    "false_empty": _when(_present, lambda p: p.boxes == ()),
    "parse_failures": lambda p: float(p.boxes is None),
}


def clustered_means(scores: Floats, patients: Sequence[str], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Mean and 95 % interval of each column, resampled by patient.

    Args:
        scores: [records, M], float64; nan where a metric does not apply.
        patients: of each record.
        resamples: bootstrap resamples, >= 1.
        seed: of the bootstrap.

    Returns:
        An estimate of each column, as `score` has them.
    """
    names, cluster = np.unique(np.array(patients), return_inverse=True)
    M, patients_count = scores.shape[1], len(names)
    applies = ~np.isnan(scores)
    sums = np.zeros((patients_count, 2 * M))  # per patient: totals, then counts
    np.add.at(sums, cluster, np.concatenate([np.where(applies, scores, 0.0), applies], axis=1))
    total, count = sums[:, :M].sum(0), sums[:, M:].sum(0)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, 2 * M))
    rows = max(1, _CHUNK // patients_count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        # multinomial weights: how often each resample draws each patient
        picks = rng.integers(patients_count, size=(size, patients_count)) + np.arange(size)[:, None] * patients_count
        weights = np.bincount(picks.ravel(), minlength=size * patients_count).reshape(size, patients_count)
        drawn[start : start + size] = weights.astype(np.float64) @ sums
    out: list[dict[str, Any]] = []
    for m in range(M):
        if not count[m]:
            out.append({"value": None, "low": None, "high": None, "n": 0})
            continue
        # a resample may hold no record that the metric applies to: it says nothing about the metric
        kept = drawn[drawn[:, M + m] > 0]
        low, high = np.percentile(kept[:, m] / kept[:, M + m], [2.5, 97.5])
        out.append({"value": float(total[m] / count[m]), "low": float(low), "high": float(high), "n": int(count[m])})
    return out


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
