"""The points of an axis, and what the phases of a step take at each.

An axis varies one size of a group and leaves the others at the base, `random_model.SIZES`: P tokens of the prompt, G
completions, C tokens of each, V columns of the head. Two thirds of every prompt are its image's, as at the base, so P
grows with the image, whose side is rounded down to whole merged patches; text makes up the rest.
    prefill   the engine runs the prompt, image included
    decode    the engine's other time: G completions of C tokens, C - 1 steps
    score     log-probabilities without a gradient
    update    forward and backward pass of the GRPO loss, the vision tower trained
    rows      the same update on transformers' G padded rows
All points of an axis are visited in each round, to and fro, so that what drifts with the machine drops out.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench import timing
from bench.packed_sides import (
    Case,
    case_of,
    clear,
    limits_of,
    make_engine,
    make_model,
    our_loss,
    our_rollout,
    our_score,
    their_loss,
)
from bench.random_model import ARCHITECTURES, MERGE, SIZES, Size
from medground.costs import network_of, row_operations, sizes_of, step_operations
from medground.rollout.engine import Engine

PHASES = ("prefill", "decode", "score", "update")
AXES = {
    "G": (1, 2, 4, 8, 16, 32),
    "P": (100, 300, 600, 1000, 2000, 4000),
    "C": (16, 64, 128, 256, 512, 1024),
    "V": (512, 2048, 8192, 32_768),
}
LARGE_V = (8192, 32_768, 151_936)
"""V on CUDA, where models are larger."""
MOST_ROWS = 8
"""Completions of the largest group that is also measured as padded rows."""


@dataclass
class Point:
    """A place on an axis.

    Attributes:
        value: there.
        case: what runs.
        engine: what decodes it.
        with_rows: whether padded rows run too.
        seconds: of each phase, a sample a round.
    """

    value: int
    case: Case
    engine: Engine
    with_rows: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it: sizes, operations and calls of each phase, samples."""
        case, network = self.case, network_of(self.case.policy)
        groups = sizes_of([case.group])
        operations = step_operations(network, groups, scorings=1) | {"rows": row_operations(network, groups)}
        return {
            "value": self.value,
            "size": case.size._asdict() | {"image_tokens": case.size.image_tokens, "V": case.shape.V},
            "operations": operations,
            "calls": dict.fromkeys((*PHASES, "rows"), 1) | {"decode": case.size.C - 1},
            "seconds": self.seconds,
        }


def size_at(base: Size, axis: str, value: int) -> Size:
    """The base with one size changed."""
    if axis == "V":
        return base
    if axis == "P":
        merged = math.isqrt(value * base.image_tokens // base.P)
        return base._replace(P=value, side=merged * MERGE)
    return base._replace(**{axis: value})


def make_points(name: str, device: torch.device, axis: str, values: Iterable[int]) -> list[Point]:
    """Cases of a model; those of one vocabulary share its weights.

    Raises:
        ValueError: a prompt is too short for an image and a phrase.
    """
    shape, base = ARCHITECTURES[name], SIZES[name]
    points: list[Point] = []
    for value in values:
        if axis == "V":
            shape = replace(shape, V=value)
        if axis == "V" or not points:
            vlm, first = make_model(shape, device), None
        case = case_of(name, shape, size_at(base, axis, value), vlm)
        first = first or make_engine(case, 1)
        engine = copy.copy(first)  # making one lays the weights out anew for decoding: once is enough
        engine.limits = limits_of(case, 1)
        points.append(Point(value, case, engine, axis == "G" and value <= MOST_ROWS))
    return points


def visit(points: Sequence[Point], rounds: int) -> None:
    """Take samples; the first round warms up and is thrown away."""
    with timing.no_collection():
        for turn in range(rounds + 1):
            for point in points[:: 1 if turn % 2 else -1]:
                for phase, seconds in _sample(point).items():
                    point.seconds.setdefault(phase, []).extend([seconds] * (turn > 0))


def _sample(point: Point) -> dict[str, float]:
    case, engine = point.case, point.engine
    our_rollout(case, engine, 1)
    if engine.stats.new_tokens != case.size.G * case.size.C:
        raise ValueError(f"want {case.size.G} completions of {case.size.C}; got {engine.stats.new_tokens} tokens")
    turns = {
        "score": timing.Turn(lambda: our_score(case, [case.group])),
        "update": timing.Turn(lambda: our_loss(case, [case.group]).backward(), lambda: clear(case)),
    }
    if point.with_rows:
        turns["rows"] = timing.Turn(lambda: their_loss(case).backward(), lambda: clear(case))
    found = {"prefill": engine.stats.prefill_seconds, "decode": engine.stats.decode_seconds}
    return found | {phase: timing.timed(turn) for phase, turn in turns.items()}
