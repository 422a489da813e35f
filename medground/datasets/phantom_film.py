"""The anatomy of a phantom chest film: where a chest lies on the film, and how bright each pixel of it is.

Everything is drawn in the chest's own coordinates: p runs across the chest from the midline (p > 0 is the
patient's left, the image's right), q runs down. One unit is the side of the film, before the pose scales,
tilts and shifts the chest; so one description serves every film size.

Brightness grows with what X-rays have to pass: air is dark, bone and fluid are bright. `Canvas.pixels` is
linear and unbounded while findings are added; `expose` turns it into a film with noise, 0 to 1.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medground.records import Box

Pixels = NDArray[np.floating[Any]]  # float32, all of them

RIBS = 7.0  # posterior ribs between apex and base


@dataclass(frozen=True)
class Chest:
    """One chest on one film: lengths in film sides, before `scale`; the rest as said.

    Attributes:
        shift_x: of the chest's centre from the film's, as a fraction of the film's side.
        shift_y: the same, downwards.
        scale: size of the chest, 1 for one that fills the film.
        tilt: in radians, clockwise.
        apex: q of the tops of the lungs.
        dome_right: q of the top of the patient's right diaphragm, the higher one.
        dome_left: q of the top of the patient's left diaphragm.
        spread: half of the width of the lungs where they are widest.
        heart_ratio: width of the heart over the width of the chest.
        heart_lean: how far the heart's centre lies to the patient's left.
        rib_slope: how much posterior ribs fall on their way outwards.
        rib_phase: position of the first rib, in ribs.
        breadth: half of the width of the body.
    """

    shift_x: float
    shift_y: float
    scale: float
    tilt: float
    apex: float
    dome_right: float
    dome_left: float
    spread: float
    heart_ratio: float
    heart_lean: float
    rib_slope: float
    rib_phase: float
    breadth: float

    def dome(self, side: str) -> float:
        """q of the top of the diaphragm on the patient's `side`."""
        return self.dome_left if side == "left" else self.dome_right


def sample_chest(person: np.random.Generator, film: np.random.Generator, enlarged_heart: bool) -> Chest:
    """A chest: its build comes from the person's generator, its pose and breath from the film's."""
    breath = film.uniform(-0.05, 0.05)
    scale = film.uniform(0.74, 1.06)
    room = 0.49 - 0.39 * scale  # a smaller chest may lie further off the middle
    apex = -0.37 + person.uniform(-0.02, 0.02)
    dome_right = 0.20 + person.uniform(-0.03, 0.03) + breath
    normal, enlarged = person.uniform(0.40, 0.47), person.uniform(0.57, 0.72)
    return Chest(
        shift_x=film.uniform(-room, room),
        shift_y=film.uniform(-room, 0.7 * room),
        scale=scale,
        tilt=film.uniform(-0.12, 0.12),
        apex=apex,
        dome_right=dome_right,
        dome_left=dome_right + person.uniform(0.025, 0.055),
        spread=0.385 * person.uniform(0.90, 1.08),
        heart_ratio=enlarged if enlarged_heart else normal,
        heart_lean=person.uniform(0.045, 0.075),
        rib_slope=person.uniform(0.5, 1.0),
        rib_phase=film.uniform(0.0, 1.0),
        breadth=person.uniform(0.46, 0.54),
    )


@dataclass
class Canvas:
    """A film being drawn; all arrays are [size, size], float32.

    Attributes:
        pixels: brightness so far.
        p: across the chest, of each pixel.
        q: down the chest, of each pixel.
        cage: 1 inside the rib cage, 0 outside, soft at the edge.
        floor: q of the diaphragm under each pixel.
        lung: 1 in the lungs where neither the heart nor the great vessels hide them, 0 outside, soft at the edge.
        heart: the same for the heart.
        texture: smooth noise, about -1 to 1.
        edge: width of a sharp edge: one pixel, in film sides before `scale`.
    """

    chest: Chest
    pixels: Pixels
    p: Pixels
    q: Pixels
    cage: Pixels
    floor: Pixels
    lung: Pixels
    heart: Pixels
    texture: Pixels
    edge: float


def soft(distance: Pixels, width: float) -> Pixels:
    """0 where `distance` is well below zero, 1 well above, a straight ramp of `width` between."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


def lung_edges(chest: Chest, q: Pixels, dome: Pixels | float) -> tuple[Pixels, Pixels]:
    """|p| of the inner and the outer edge of a lung at height q; equal at the apex."""
    t = np.clip((q - chest.apex) * (1 / (dome - chest.apex)), 0, 1)
    middle = 0.17 + 0.055 * t
    narrow = np.maximum(1 - t * (1 / 0.62), 0)
    half = (chest.spread - middle) * np.sqrt(1 - narrow**2.6)
    return middle - half * 0.86, middle + half


def draw_anatomy(chest: Chest, film: np.random.Generator, size: int) -> Canvas:
    """A chest without findings, but with its heart as `chest` has it."""
    x, y = _grid(size)
    x, y = x - np.float32(chest.shift_x), y - np.float32(chest.shift_y)
    cos, sin = np.float32(np.cos(chest.tilt) / chest.scale), np.float32(np.sin(chest.tilt) / chest.scale)
    p, q = cos * x + sin * y, cos * y - sin * x
    a = np.abs(p)
    edge = 1 / (size * chest.scale)
    dome = np.where(p > 0, np.float32(chest.dome_left), np.float32(chest.dome_right))
    floor = dome + np.where(a > 0.2, np.float32(3.4), np.float32(1.2)) * (a - 0.2) ** 2
    inner, outer = lung_edges(chest, q, dome)
    cage = soft(outer - a, 2 * edge + 0.01)
    below = soft(q - floor, 2 * edge + 0.008)
    lung = cage * soft(a - inner, 2 * edge + 0.02) * (1 - below)
    lung *= q > chest.apex - edge
    heart = _heart(chest, p, q, edge)
    texture = _texture(film, size, 9)
    canvas = Canvas(chest, np.full_like(p, 0.03), p, q, cage, floor, lung, heart, texture, edge)
    _soft_tissue(canvas, a, below, film)
    _lung_markings(canvas, a, film)
    _bones(canvas, a, outer, film)
    _marker(canvas, film)
    return canvas


def expose(canvas: Canvas, film: np.random.Generator) -> Pixels:
    """[size, size] film of what is drawn: its own gamma, contrast and noise; darkest pixel 0, brightest 1."""
    size = len(canvas.pixels)
    noise = film.standard_normal((size, size), dtype=np.float32)
    pixels = canvas.pixels + np.float32(film.uniform(0.010, 0.028)) * noise
    low, high = film.uniform(0.0, 0.06), film.uniform(0.86, 1.0)
    pixels = np.clip((pixels - low) * (1 / (high - low)), 0, 1) ** np.float32(film.uniform(0.75, 1.2))
    low, high = float(pixels.min()), float(pixels.max())
    return (pixels - low) * np.float32(1 / (high - low))


def box_of(mask: NDArray[np.bool_]) -> Box | None:
    """Smallest xyxy box in pixels around the true pixels of `mask`, None when there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def lung_boxes(canvas: Canvas) -> tuple[Box, Box]:
    """Boxes, in pixels, around what is seen of the patient's left and right lung."""
    seen = canvas.lung > 0.5
    left, right = box_of(seen & (canvas.p > 0)), box_of(seen & (canvas.p < 0))
    assert left and right, f"a lung lies beyond the film: {canvas.chest}"
    return left, right


def _heart(chest: Chest, p: Pixels, q: Pixels, edge: float) -> Pixels:
    # an egg that leans to the patient's left, its thick end down and outwards, and rests on the diaphragm
    across = chest.heart_ratio * chest.spread
    down = 0.60 * across + 0.055
    lean = chest.heart_lean * chest.heart_ratio / 0.45
    dp, dq = p - np.float32(lean), q - np.float32(chest.dome_left + 0.03 - 0.84 * down)
    turn = np.float32(0.30)
    u, v = (dp - turn * dq) * (1 / across), (dq + np.float32(0.22) * dp) * (1 / down)
    u = u / (1 + np.float32(0.25) * np.clip(v, -1, 1))
    return soft(1 - np.sqrt(u * u + v * v), (2 * edge + 0.012) / down)


def _soft_tissue(canvas: Canvas, a: Pixels, below: Pixels, film: np.random.Generator) -> None:
    q, lung, chest = canvas.q, canvas.lung, canvas.chest
    # neck, sloping shoulders, then straight sides
    slope = np.maximum(q - np.float32(chest.apex - 0.12), 0)
    half = np.minimum(0.105 + 2.2 * slope, np.float32(chest.breadth) + 0.18 * (slope - 0.17))
    body = soft(np.minimum(half, np.float32(chest.breadth)) - a, 0.07)
    chin = np.sqrt(a * a + (q - np.float32(chest.apex - 0.34)) ** 2)
    body = np.maximum(body, soft(0.165 - chin, 0.05))
    canvas.pixels += body * (np.float32(0.52) - np.float32(0.35) * a)
    canvas.pixels -= lung * np.float32(film.uniform(0.27, 0.33))
    canvas.pixels += (body * below) * np.float32(film.uniform(0.10, 0.17))
    spine = np.exp(-((a * (1 / 0.06)) ** 2)) + np.float32(0.5) * soft(0.034 - a, 0.014)
    canvas.pixels += spine * (body * np.float32(0.12))
    trachea = np.exp(-(((canvas.p - 0.004) * (1 / 0.020)) ** 2)) * soft(-0.13 - q, 0.06)
    canvas.pixels -= trachea * (body * np.float32(0.15))
    # great vessels: a band that widens down to the heart, and the aortic knob on the patient's left
    width = 0.048 + 0.16 * np.clip(q + 0.32, 0, 0.3) ** 1.5 + 0.008 * (canvas.p > 0)
    knob = ((canvas.p - 0.05) * (1 / 0.036)) ** 2 + ((q - np.float32(chest.apex + 0.19)) * (1 / 0.045)) ** 2
    middle = np.maximum(soft(width - a, 0.025) * soft(q - chest.apex, 0.1), soft(1 - knob, 0.7))
    solid = np.maximum(canvas.heart, middle) * lung
    canvas.pixels += solid * np.float32(0.28) + canvas.heart * np.float32(0.085)
    canvas.lung = lung - solid
    if film.random() < 0.6:  # gastric bubble under the patient's left diaphragm
        dp, dq = canvas.p - film.uniform(0.13, 0.19), q - chest.dome_left - film.uniform(0.06, 0.08)
        bubble = (dp * (1 / 0.06)) ** 2 + (dq * (1 / 0.032)) ** 2
        canvas.pixels -= np.exp(-(bubble * bubble)) * (below * np.float32(0.2))
    canvas.pixels += canvas.texture * (body * np.float32(0.025))


def _lung_markings(canvas: Canvas, a: Pixels, film: np.random.Generator) -> None:
    # vessels leave each hilum like spokes, bent by the texture, thinner and fainter outwards
    da, dq = a - np.float32(0.085), canvas.q - np.float32(canvas.chest.apex + 0.30)
    radius = np.sqrt(da * da + dq * dq)
    angle = np.arctan2(dq, da) * np.float32(film.uniform(5, 8)) + (canvas.p > 0) * np.float32(1.7)
    spokes = np.cos(angle + canvas.texture * np.float32(2.5) + radius * np.float32(film.uniform(-25, 25)))
    fade = np.exp(radius * np.float32(-1 / 0.11))
    vessels = np.maximum(spokes, 0) * np.clip(radius * 12, 0, 1) * np.float32(0.13) + np.float32(0.10)
    canvas.pixels += vessels * (fade * canvas.lung)
    canvas.pixels += _texture(film, len(a), 28) * (canvas.lung * np.float32(0.018))


def _bones(canvas: Canvas, a: Pixels, outer: Pixels, film: np.random.Generator) -> None:
    chest, q = canvas.chest, canvas.q
    pitch = (chest.dome_right - chest.apex) / RIBS
    within = soft(outer + 0.025 - a, 0.02) * soft(a - 0.03, 0.03) * soft(q - chest.apex + 0.01, 0.03)
    within *= 1 - soft(q - chest.dome_left - 0.08, 0.10)
    # posterior ribs rise from the spine and fall outwards; cos draws them all at once
    line = q - np.float32(chest.rib_slope) * (a - 0.10) * (a * np.float32(2.2) + np.float32(0.2))
    ribs = np.cos(line * np.float32(2 * np.pi / pitch) + np.float32(2 * np.pi * chest.rib_phase))
    bright = np.float32(film.uniform(0.045, 0.075))
    canvas.pixels += soft(ribs - 0.25, 0.8) * within * bright
    # anterior ribs, fainter, fall inwards on the outer half of the lungs
    front = np.cos((q + np.float32(0.85) * a) * np.float32(2 * np.pi / (1.3 * pitch)))
    canvas.pixels += soft(front - 0.35, 0.6) * within * soft(a - 0.19, 0.12) * (bright * np.float32(0.4))
    rise = film.uniform(0.10, 0.28)
    clavicle = q - np.float32(chest.apex + 0.085) + np.float32(rise) * (a - 0.05) + 0.02 * np.sin(a * np.float32(16))
    band = soft(0.013 - np.abs(clavicle), 0.008 + canvas.edge) * soft(a - 0.035, 0.03) * soft(0.40 - a, 0.05)
    canvas.pixels += band * np.float32(film.uniform(0.09, 0.14))


def _marker(canvas: Canvas, film: np.random.Generator) -> None:
    # the letter L in lead, on the side that is the patient's left
    size = len(canvas.pixels)
    tall, thick = max(5, size // 14), max(1, size // 56)
    top, left = (int(film.uniform(low, low + 0.06) * size) for low in (0.03, 0.86))
    if film.random() < 0.6 and not canvas.cage[top : top + tall, left:].any():
        canvas.pixels[top : top + tall, left : left + thick] = 1
        canvas.pixels[top + tall - thick : top + tall, left : left + tall * 3 // 5] = 1


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Pixels, Pixels]:
    # centres of the pixels, in film sides from the film's centre
    line = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    return np.meshgrid(line, line)


@lru_cache(maxsize=8)
def _interpolation(size: int, knots: int) -> Pixels:
    # [size, knots]: linear interpolation as a product, so that smooth noise costs two small products
    at = (np.arange(size) + 0.5) / size * (knots - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(knots)), 0).astype(np.float32)


def _texture(film: np.random.Generator, size: int, knots: int) -> Pixels:
    weights = _interpolation(size, knots)
    return weights @ film.uniform(-1, 1, (knots, knots)).astype(np.float32) @ weights.T
