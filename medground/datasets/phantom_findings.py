"""The findings of a phantom film: which ones it has, how each is painted, and the box around its pixels."""

from dataclasses import dataclass

import numpy as np

from medground.datasets.phantom_film import Canvas, Pixels, box_of, lung_edges, soft
from medground.records import Box

LESIONS = ("nodule", "mass", "opacity")  # lie in a zone of one lung
FLUID_AND_AIR = ("effusion", "pneumothorax")  # lie at one end of one lung
HEART = "cardiomegaly"
CATEGORIES = (*LESIONS, *FLUID_AND_AIR, HEART)
SIDES = ("left", "right")
ZONES = ("upper", "mid", "lower")

_WEIGHTS = {"nodule": 0.13, "mass": 0.15, "opacity": 0.22, "effusion": 0.20, "pneumothorax": 0.17, HEART: 0.13}
_SIZES = ("small", "moderate", "large")
# how far down its lung a lesion's centre lies, 0 at the apex and 1 at the dome; gaps keep zones apart
_REACH = {"upper": (0.20, 0.36), "mid": (0.44, 0.63), "lower": (0.71, 0.90)}
# smallest and largest extent, in film sides before the chest's scale
_RADIUS = {"nodule": (0.038, 0.055), "mass": (0.068, 0.105)}
_OPACITY = {"small": (0.065, 0.09), "large": (0.11, 0.17)}
_EFFUSION = {"small": (0.04, 0.09), "moderate": (0.12, 0.19), "large": (0.23, 0.34)}
_AIR = {"small": (0.07, 0.10), "moderate": (0.13, 0.18), "large": (0.22, 0.31)}
_SHOWS = 0.3  # part of its strongest change of the film at which a pixel belongs to a finding's box


@dataclass(frozen=True)
class Plan:
    """A finding to paint. `side` is empty for the heart, `zone` but for lesions, `size` where no word tells it."""

    category: str
    side: str = ""
    zone: str = ""
    size: str = ""


@dataclass(frozen=True)
class Finding:
    """A finding as painted; `side` is the patient's, `box` in pixels of the film, xyxy."""

    category: str
    side: str
    zone: str
    size: str
    box: Box


def plan_findings(rng: np.random.Generator) -> tuple[Plan, ...]:
    """One finding (30 % of the films), two different ones (52 %), or two of a kind (18 %)."""
    draw = rng.random()
    if draw < 0.18:
        return _two_of_a_kind(rng)
    first = _one(rng)
    if draw < 0.48:
        return (first,)
    while _clash(first, second := _one(rng)):
        pass
    return first, second


def paint(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> Finding | None:
    """Paint a finding on the canvas; None when too little of it lies on the film to be seen.

    Its box holds the pixels that it changes: what the heart or the diaphragm hides of it does not count.
    """
    if plan.category == HEART:
        mask = canvas.heart > 0.5  # the anatomy drew it
    else:
        before = canvas.pixels.copy()
        _PAINTERS[plan.category](canvas, plan, rng)
        change = np.abs(canvas.pixels - before)
        mask = change > _SHOWS * change.max()
    box = box_of(mask)
    least = 4 * len(mask) / 112
    if box is None or box[2] - box[0] < least or box[3] - box[1] < least:
        return None
    return Finding(plan.category, plan.side, plan.zone, plan.size, box)


def _one(rng: np.random.Generator) -> Plan:
    category = str(rng.choice(CATEGORIES, p=[_WEIGHTS[name] for name in CATEGORIES]))
    if category == HEART:
        return Plan(category)
    side = SIDES[rng.integers(2)]
    if category in FLUID_AND_AIR:
        return Plan(category, side, size=_SIZES[rng.integers(3)])
    return Plan(category, side, ZONES[rng.integers(3)], _size(category, rng))


def _size(category: str, rng: np.random.Generator) -> str:
    return ("small", "large")[rng.integers(2)] if category == "opacity" else ""


def _two_of_a_kind(rng: np.random.Generator) -> tuple[Plan, ...]:
    kind = rng.random()
    if kind < 0.4:
        return tuple(Plan("effusion", side, size=_SIZES[rng.integers(3)]) for side in SIDES)
    if kind < 0.7:
        zone = ZONES[rng.integers(3)]
        return tuple(Plan("opacity", side, zone, _size("opacity", rng)) for side in SIDES)
    side = SIDES[rng.integers(2)]
    return tuple(Plan("nodule", side, zone) for zone in ("upper", "lower"))


def _clash(a: Plan, b: Plan) -> bool:
    """Whether two findings would lie on each other, or one phrase could mean either."""
    if a.category == b.category and a.side == b.side:
        return True
    if HEART in (a.category, b.category):  # an enlarged heart and what lies beside it hide each other
        left = [plan for plan in (a, b) if plan.side == "left"]
        return any(
            plan.zone in ("mid", "lower") or (plan.category == "effusion" and plan.size != "small") for plan in left
        )
    if a.side != b.side:
        return False
    return _reached(a) & _reached(b) != set()


def _reached(plan: Plan) -> set[str]:
    # zones of its lung that a finding may reach into
    if plan.category in FLUID_AND_AIR:
        end = "lower" if plan.category == "effusion" else "upper"
        return {end, "mid"} if plan.size == "large" else {end}
    if plan.category == "nodule":
        return {plan.zone}
    at = ZONES.index(plan.zone)
    return set(ZONES[max(at - 1, 0) : at + 2])


def _sign(side: str) -> int:
    return 1 if side == "left" else -1  # the patient's left has p > 0


def _own_lung(canvas: Canvas, side: str) -> Pixels:
    return canvas.lung * (canvas.p * _sign(side) > 0)


def _centre(canvas: Canvas, plan: Plan, rng: np.random.Generator, radius: float) -> tuple[float, float]:
    chest = canvas.chest
    dome = chest.dome(plan.side)
    q = chest.apex + (dome - chest.apex) * rng.uniform(*_REACH[plan.zone])
    inner, outer = (float(edge) for edge in lung_edges(chest, np.array(q, np.float32), dome))
    low, high = max(inner + 0.7 * radius, 0.09 + 0.5 * radius), outer - 0.8 * radius
    if plan.side == "left" and plan.zone != "upper":  # beside the heart, not on it
        low = max(low, 0.22 if plan.zone == "lower" else 0.16)
    return _sign(plan.side) * (rng.uniform(low, high) if low < high else (low + high) / 2), q


def _paint_round(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    radius = rng.uniform(*_RADIUS[plan.category])
    p, q = _centre(canvas, plan, rng, radius)
    stretch = rng.uniform(0.85, 1.18)
    dp, dq = (canvas.p - np.float32(p)) * np.float32(stretch), (canvas.q - np.float32(q)) * np.float32(1 / stretch)
    distance = np.sqrt(dp * dp + dq * dq)
    if plan.category == "mass":
        distance = distance * (1 + 0.14 * canvas.texture)
    strength = soft(radius - distance, 1.5 * canvas.edge + 0.12 * radius)
    canvas.pixels += strength * np.float32(rng.uniform(0.26, 0.36))


def _paint_opacity(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    low, high = _OPACITY[plan.size]
    across, down = rng.uniform(low, min(high, 0.14)), rng.uniform(low, min(high, 0.145))
    p, q = _centre(canvas, plan, rng, across)
    dp, dq = (canvas.p - np.float32(p)) * np.float32(1 / across), (canvas.q - np.float32(q)) * np.float32(1 / down)
    # 1 in the middle, 0.3 on the ellipse of semi-axes across and down; texture makes the rim ragged
    strength = soft(1.05 - np.sqrt(dp * dp + dq * dq) + 0.14 * canvas.texture, 0.8) * _own_lung(canvas, plan.side)
    canvas.pixels += strength * np.float32(rng.uniform(0.24, 0.34)) * (1 + np.float32(0.25) * canvas.texture)


def _paint_effusion(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    height = rng.uniform(*_EFFUSION[plan.size])
    a = np.abs(canvas.p)
    # the meniscus climbs towards the chest wall
    climb = np.maximum(a - 0.12, 0) * np.float32(1 / 0.25)
    level = np.float32(canvas.chest.dome(plan.side) + 0.02 - height) + np.float32(0.035) - climb**2 * np.float32(0.07)
    # down to a little below the diaphragm, which it hides
    space = canvas.cage * soft(canvas.floor + 0.012 - canvas.q, 0.01 + canvas.edge) * soft(a - 0.05, 0.02)
    fluid = soft(canvas.q - level, 2 * canvas.edge + 0.012) * space * (canvas.p * _sign(plan.side) > 0)
    canvas.pixels += fluid * (np.float32(rng.uniform(0.64, 0.70)) - canvas.pixels) * np.float32(0.88)


def _paint_pneumothorax(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    depth = rng.uniform(*_AIR[plan.size])
    a = np.abs(canvas.p)
    offset = (a - np.float32(0.185)) * np.float32(1 / 0.16)
    # the collapsed lung keeps the shape of a dome, its pleura a thin bright line
    above = np.float32(canvas.chest.apex + depth) + np.float32(rng.uniform(0.03, 0.07)) * offset * offset - canvas.q
    own = _own_lung(canvas, plan.side)
    air = soft(above, 1.5 * canvas.edge + 0.004) * own
    line = np.maximum(1 - np.abs(above) * (1 / (0.006 + 0.7 * canvas.edge)), 0) * own
    canvas.pixels -= air * (canvas.pixels * np.float32(0.55) + np.float32(0.03))
    canvas.pixels += line * np.float32(0.22)


_PAINTERS = {
    "nodule": _paint_round,
    "mass": _paint_round,
    "opacity": _paint_opacity,
    "effusion": _paint_effusion,
    "pneumothorax": _paint_pneumothorax,
}
