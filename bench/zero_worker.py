"""One rank of `bench.zero`: sides are built, compared, then timed in turns. torchrun starts it.

    python -m torch.distributed.run --nproc-per-node 2 -m bench.zero_worker OUT '{"model": "tiny", ..}'

The first rank writes what `run` returns to OUT.
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import timing
from bench.race import UnavailableError
from bench.zero_deepspeed import DeepSpeed, need_deepspeed
from bench.zero_sides import Ours, OursUnpacked, Side, Update, Work, make_work
from medground.sharding import Ranks, join_ranks

OURS, UNPACKED = "ours", "ours, unpacked"
ZERO = {stage: f"DeepSpeed ZeRO-{stage}" for stage in (2, 3)}
CLOSE = {"cpu": 1e-4, "cuda": 0.1}
"""Most that two sides may differ: losses, which are about 1, and gradient norms by their size."""
COMPARED = 2  # updates: the second one's loss shows what the first one did to the weights
MAKERS: dict[str, Callable[[Work, Ranks], Side]] = {OURS: Ours, UNPACKED: OursUnpacked} | {
    name: partial(DeepSpeed, stage=stage) for stage, name in ZERO.items()
}


class Job(NamedTuple):
    """What all ranks are told.

    Attributes:
        model: name of the architecture.
        prompts: of each rank.
        groups_at_once: groups of a micro-batch.
        checkpointing: whether activations are recomputed.
        rounds: timed updates of each side.
        sides: who takes part.
    """

    model: str
    prompts: int
    groups_at_once: int
    checkpointing: bool
    rounds: int
    sides: list[str]


@dataclass
class Found:
    """What was measured of one side, over all ranks.

    Attributes:
        failed: why there is nothing else.
        updates: of the first updates.
        held: bytes between updates on the rank that holds most: weights, optimizer and an engine's buffers.
        peak: most bytes that an update needs beyond those; gradients and activations.
        seconds: of each round, the slowest rank's.
    """

    failed: str | None
    updates: list[Update]
    held: int
    peak: int
    seconds: list[float]


class Agreement(NamedTuple):
    """How far sides are apart at most: losses, and gradient norms over their size."""

    loss: float
    grad_norm: float


def run(job: Job, ranks: Ranks) -> dict[str, Found]:
    """Build, compare, time and weigh every side of the job.

    Raises:
        ValueError: two sides do not compute the same.
    """
    work = make_work(job.model, ranks, job.prompts, job.groups_at_once, job.checkpointing)
    sides: dict[str, Side] = {}
    found = {}
    for name in job.sides:
        reason = _why_not(name, ranks)
        found[name] = Found(reason, [], 0, 0, [])
        if reason is None:
            before = held_bytes()
            sides[name] = MAKERS[name](work, ranks)
            found[name].updates = [sides[name].update() for _ in range(COMPARED)]
            found[name].held = max(ranks.gather(held_bytes() - before))
    compare({name: found[name].updates for name in sides}, CLOSE[ranks.device.type])
    with timing.no_collection():
        for turn in range(job.rounds):
            for name in list(sides)[:: -1 if turn % 2 else 1]:
                seconds = timing.timed(timing.Turn(sides[name].update, ranks.barrier))
                found[name].seconds.append(max(ranks.gather(seconds)))
    for name, side in sides.items():
        found[name].peak = max(ranks.gather(timing.peak_memory(timing.Turn(side.update, ranks.barrier))))
    return found


def _why_not(name: str, ranks: Ranks) -> str | None:
    """Why a side cannot run, on whichever rank."""
    reason = None
    if name in ZERO.values():
        try:
            need_deepspeed()
        except UnavailableError as error:
            reason = str(error)
    return next((text for text in ranks.gather(reason) if text), None)


def compare(updates: dict[str, list[Update]], close: float) -> Agreement:
    """See that all sides compute the same.

    Raises:
        ValueError: they do not.
    """
    (_, first), *others = updates.items()
    gaps = [Agreement(0.0, 0.0)]
    for name, theirs in others:
        for number, (a, b) in enumerate(zip(first, theirs, strict=True), 1):
            gaps.append(Agreement(abs(a.loss - b.loss), abs(a.grad_norm / b.grad_norm - 1)))
            if not all(gap <= close for gap in gaps[-1]):
                raise ValueError(f"want all sides to agree within {close}; update {number}: {a} of ours, {name} {b}")
    return Agreement(*map(max, zip(*gaps, strict=True)))


def held_bytes() -> int:
    """Bytes of all tensors there are."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    # a CPU's allocator keeps no count; a DTensor's storage is its local tensor's
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not hasattr(x, "to_local")]
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors if x.device.type == "cpu")}
    return sum(storages.values())


def main() -> None:
    """Run the job that the command line has."""
    out, job = Path(sys.argv[1]), Job(**json.loads(sys.argv[2]))
    with join_ranks() as ranks:
        found = run(job, ranks)
        if ranks.is_first:
            plain: dict[str, Any] = {name: asdict(side) for name, side in found.items()}
            out.write_text(json.dumps(plain))


if __name__ == "__main__":
    main()
