"""What a reader would say about a phantom film: phrases, each with the boxes of what it names.

Sides are the patient's: on the film, the patient's left is on the right. A phrase of one box fits one finding of
its film only; a phrase of no box fits none.
"""

from dataclasses import dataclass

import numpy as np

from medground.datasets.phantom_findings import CATEGORIES, FLUID_AND_AIR, HEART, LESIONS, SIDES, ZONES, Finding
from medground.records import Box

_NAMES = {"effusion": "pleural effusion", "pneumothorax": "apical pneumothorax"}
_ENDS = {"effusion": "pleural effusion at the {side} base", "pneumothorax": "pneumothorax at the {side} apex"}


@dataclass(frozen=True)
class Statement:
    """A phrase about one film; boxes are in pixels of the film, from its left to its right."""

    phrase: str
    category: str
    boxes: tuple[Box, ...]


def statements(findings: tuple[Finding, ...], rng: np.random.Generator) -> list[Statement]:
    """One or two statements about a film of one or two findings."""
    if len(findings) == 2 and findings[0].category == findings[1].category and _pair(findings):
        said = [_statement(_pair(findings), findings)]
        draw = rng.random()
        if draw < 0.45:
            said.append(_describe(findings[rng.integers(2)], rng))
        elif draw < 0.60:
            said.append(_absent(findings, rng))
        return said
    said = [_describe(finding, rng) for finding in findings]
    if len(findings) == 1 and rng.random() < 0.3:
        said.append(_absent(findings, rng))
    return said


def _statement(phrase: str, findings: tuple[Finding, ...]) -> Statement:
    return Statement(phrase, findings[0].category, tuple(sorted(finding.box for finding in findings)))


def _pair(findings: tuple[Finding, ...]) -> str:
    """The phrase that names two findings of one category at once; empty when there is none."""
    a, b = findings
    if a.category == "effusion" and a.side != b.side:
        return "bilateral pleural effusions"
    if a.category == "opacity" and a.side != b.side and a.zone == b.zone:
        return f"bilateral {a.zone} zone opacities"
    if a.category == "nodule" and a.side == b.side:
        return f"two nodules in the {a.side} lung"
    return ""


def _describe(finding: Finding, rng: np.random.Generator) -> Statement:
    phrase = _phrase(finding.category, finding.side, finding.zone, finding.size, rng)
    return _statement(phrase, (finding,))


def _phrase(category: str, side: str, zone: str, size: str, rng: np.random.Generator) -> str:
    if category == HEART:
        return ("cardiomegaly", "enlarged heart")[rng.integers(2)]
    if category in FLUID_AND_AIR:
        if rng.random() < 0.25:
            return _ENDS[category].format(side=side)
        return " ".join(word for word in (_sized(size, rng), side, _NAMES[category]) if word)
    if rng.random() < 0.5:
        return " ".join(word for word in (_sized(size, rng), category, f"in the {side} {zone} zone") if word)
    return " ".join(word for word in (_sized(size, rng), side, zone, "zone", category) if word)


def _sized(size: str, rng: np.random.Generator) -> str:
    return size if rng.random() < 0.6 else ""


def _absent(findings: tuple[Finding, ...], rng: np.random.Generator) -> Statement:
    """A phrase for something that this film does not show."""
    shown = {(finding.category, finding.side) for finding in findings}
    # a mass might pass for an opacity: no lesion is denied where any lesion is
    shown |= {(lesion, side) for category, side in shown if category in LESIONS for lesion in LESIONS}
    absent = [(category, side) for category in CATEGORIES for side in SIDES if (category, side) not in shown]
    if any(finding.category == HEART for finding in findings):
        absent = [pair for pair in absent if pair[0] != HEART]
    category, side = absent[rng.integers(len(absent))]
    zone = ZONES[rng.integers(3)] if category in LESIONS else ""
    return Statement(_phrase(category, side, zone, "", rng), category, ())
