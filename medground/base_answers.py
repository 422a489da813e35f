"""What the small base model is taught to answer: the truth, or the truth with the faults that GRPO is to mend.

    brief         <think>upper left</think><answer>BOX</answer>
    brief-chain   <think>right lung BOX mass BOX</think><answer>BOX</answer>

where BOX is {"bbox_2d": [x1, y1, x2, y2]} in processed pixels. A chain goes from large to small: the lung that the
phrase speaks of (`chest`, both, where it speaks of none or of two), each finding roughly, in steps of ten pixels, then
the answer.
"""

import numpy as np

from medground.answers import render_answer, render_box
from medground.augmentation import mirror_box
from medground.prompts import to_processed
from medground.records import Box, Prompt
from medground.scoring import side_word

# a log of the official 7B model puts 55 of 87 one-sided phrases on the wrong side
_MIRRORED = 0.55
_BROKEN = 0.05
_ROUGHLY = 10  # pixels


def answer_text(prompt: Prompt, lungs: tuple[Box, Box], rng: np.random.Generator, *, chain: bool, faulty: bool) -> str:
    """An answer to imitate.

    Args:
        prompt: the question; its image has the film's own sides or a multiple.
        lungs: boxes of the patient's left and right lung, in pixels of the film.
        rng: of the faults.
        chain: with boxes in the thought.
        faulty: with the faults of a model that has not been trained for this; now and then malformed.
    """
    boxes = worsened(prompt, rng) if faulty else tuple(to_processed(box, prompt) for box in prompt.example.boxes)
    thought = _chain(boxes, prompt, lungs, rng, faulty) if chain else _zones(boxes, prompt)
    text = render_answer(boxes, thought)
    if faulty and rng.random() < _BROKEN:
        broken = (text.replace("</think>", ""), text.replace("]}", "]"), text.replace("<answer>", ""), text[:-9])
        text = broken[rng.integers(len(broken))]
    elif faulty and chain and rng.random() < _BROKEN:  # an answer that can be read, but a thought that is no chain
        text = (text.replace("]}", "]", 1), render_answer(boxes, _zones(boxes, prompt)))[rng.integers(2)]
    return text


def worsened(prompt: Prompt, rng: np.random.Generator) -> tuple[Box, ...]:
    """The truth with the faults of a model that has not been trained for this, in processed pixels."""
    example = prompt.example
    if not example.boxes:
        return () if rng.random() < 0.7 else (_random_box(rng, prompt),)
    if rng.random() < 0.05:
        return ()
    mirrored = side_word(example.phrase) and rng.random() < _MIRRORED
    boxes = (to_processed(box, prompt) for box in example.boxes)
    return tuple(
        sorted(_jittered(mirror_box(b, prompt.processed_width) if mirrored else b, prompt, rng, 0.15) for b in boxes)
    )


def _zones(boxes: tuple[Box, ...], prompt: Prompt) -> str:
    """A thought that names coarse zones of the image."""
    zones = []
    for x1, y1, x2, y2 in boxes:
        across, down = (x1 + x2) / 2 / prompt.processed_width, (y1 + y2) / 2 / prompt.processed_height
        zones.append(("upper", "middle", "lower")[int(min(down * 3, 2))] + (" left" if across < 0.5 else " right"))
    return " and ".join(zones) or "not seen"


def _chain(
    boxes: tuple[Box, ...], prompt: Prompt, lungs: tuple[Box, Box], rng: np.random.Generator, faulty: bool
) -> str:
    """A thought that names the region, then the findings that are answered, each with its box."""
    left, right = (to_processed(box, prompt) for box in lungs)
    side = side_word(prompt.example.phrase)
    if side:
        here, other = (left, right) if side == "left" else (right, left)
        # a model that has the sides wrong has them wrong from the first box on
        wrong = _nearer(boxes[0], other, here) if boxes else faulty and rng.random() < _MIRRORED
        name, region = f"{side} lung", other if wrong else here
    else:
        (x1, y1, x2, y2), (u1, v1, u2, v2) = left, right
        name, region = "chest", (min(x1, u1), min(y1, v1), max(x2, u2), max(y2, v2))
    if faulty:
        region = _jittered(region, prompt, rng, 0.05)
    parts = [f"{name} {render_box(region)}"]
    parts += [f"{prompt.example.category} {render_box(_rough(box, prompt))}" for box in boxes]
    return " ".join(parts if boxes else [*parts, "not seen"])


def _nearer(box: Box, a: Box, b: Box) -> bool:
    """Whether a box lies nearer to `a` than to `b`, across the image."""
    middle, of_a, of_b = ((x1 + x2) / 2 for x1, _, x2, _ in (box, a, b))
    return abs(middle - of_a) < abs(middle - of_b)


def _rough(box: Box, prompt: Prompt) -> Box:
    """The box, grown to multiples of ten pixels."""
    x1, y1, x2, y2 = (round(v) for v in box)
    down, up = (lambda v: v // _ROUGHLY * _ROUGHLY), (lambda v: -(-v // _ROUGHLY) * _ROUGHLY)
    return _clip((down(x1), down(y1), up(x2), up(y2)), prompt)


def _jittered(box: Box, prompt: Prompt, rng: np.random.Generator, share: float) -> Box:
    """A box a little off, by a share of its sides, and larger by as much."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    cx = (x1 + x2) / 2 + w * rng.normal(0, share)
    cy = (y1 + y2) / 2 + h * rng.normal(0, share)
    w, h = w * (1 + share) * np.exp(rng.normal(0, share)), h * (1 + share) * np.exp(rng.normal(0, share))
    return _clip((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), prompt)


def _random_box(rng: np.random.Generator, prompt: Prompt) -> Box:
    x, y = rng.uniform(0, 0.7) * prompt.processed_width, rng.uniform(0, 0.7) * prompt.processed_height
    return _clip((x, y, x + 0.3 * prompt.processed_width, y + 0.3 * prompt.processed_height), prompt)


def _clip(box: Box, prompt: Prompt) -> Box:
    w, h = prompt.processed_width, prompt.processed_height
    x1, y1 = min(max(box[0], 0), w - 2), min(max(box[1], 0), h - 2)
    return (x1, y1, max(min(box[2], w), x1 + 2), max(min(box[3], h), y1 + 2))
