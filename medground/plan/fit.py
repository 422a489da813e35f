"""Whether a step fits a GPU, the largest micro-batch that does, and what to lower where none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import torch

from medground.config import Config, LoraConfig
from medground.plan.dry_run import DryRun, dry_run
from medground.plan.gpus import Gpu, shards_of
from medground.plan.rehearsal import Job
from medground.plan.tracker import Peak
from medground.plan.workload import group_tokens, rank_tokens
from medground.rollout.cache import bytes_per_token

SLACK = 0.04
"""Assumed: what the allocator loses to fragments, of the live bytes."""
CONTEXT = 1.5e9
"""Assumed bytes outside of the allocator: CUDA context, cuBLAS, NCCL's buffers."""
GRAIN = 256
"""Tokens in which the largest micro-batch is found."""
SHARDED = ("weights", "reference", "optimizer", "gradients")
"""Parts that are divided among the ranks."""
_ADAPTERS = LoraConfig(rank=64)
_BY_8_BITS = 1 - 2.03 / 8  # of the moments; large weights alone have them in 8 bits
_WORTH_IT = 0.99  # a change that leaves more of the peak is not named


class Room(NamedTuple):
    """A GPU's memory.

    Attributes:
        memory: bytes that can be allocated.
        slack: of live bytes, lost.
        context: bytes outside of the allocator.
    """

    memory: float
    slack: float
    context: float

    def needed(self, peak: Peak | int) -> float:
        """Bytes of the GPU's memory for so many live ones."""
        live = peak.total if isinstance(peak, Peak) else peak
        return live * (1 + self.slack) + self.context

    def fits(self, peak: Peak | int) -> bool:
        """Whether they do."""
        return self.needed(peak) <= self.memory


def room_of(gpu: Gpu) -> Room:
    """A CPU has neither slack nor context: what is planned for it is compared with what a process takes."""
    return Room(gpu.memory, SLACK, CONTEXT) if gpu.name else Room(gpu.memory, 0.0, 0.0)


class Search:
    """Finds the largest `loss.micro_batch_tokens` that fits; tells `dry_run` what to try next.

    Above the tokens of all of a rank's groups nothing changes, so that is tried first: with one micro-batch there are
    no gradients of whole weights that wait for another. Else memory grows nearly in proportion to the tokens, and the
    largest number that fits is looked for along that line, until the next one is seen not to.

    Attributes:
        whole: tokens of all of a rank's groups.
        best: what was found; None where not even one group fits. Loading and rollout may need more all the same.
        peaks: of scoring and updating, by all numbers of tokens that are known.
    """

    def __init__(self, config: Config, job: Job, ranks: int, room: Room):
        """Know of nothing yet."""
        self._room, self._given = room, config.loss.micro_batch_tokens
        self._least, self.whole = group_tokens(config, job.prompt), rank_tokens(config, job.prompt, ranks)
        self.best: int | None = None
        self.peaks: dict[int, Peak] = {}

    def __call__(self, found: DryRun, tried: Mapping[int, Peak]) -> int | None:
        """The next number of tokens to try; None when the search is over."""
        of_update = max((found.peaks[name] for name in _OF_UPDATE), key=lambda peak: peak.total)
        self.peaks = {min(self._given, self.whole): of_update, **tried}
        if self.whole not in self.peaks:
            return self.whole
        good = [tokens for tokens, peak in self.peaks.items() if self._room.fits(peak)]
        self.best = max(good, default=None)
        if self.best is None:
            return None if self._least in self.peaks else self._least
        bad = min((tokens for tokens in self.peaks if tokens > self.best), default=self.best)
        steps = (bad - 1 - self.best) // GRAIN
        return self.best + GRAIN * self._stride(self.best, steps) if steps > 0 else None

    def _stride(self, best: int, steps: int) -> int:
        """How many of so many steps to go at once."""
        points = sorted((tokens, peak.total) for tokens, peak in self.peaks.items() if tokens < self.whole)
        if len(points) < 2 or len(self.peaks) > _MANY_TRIES:
            return (steps + 1) // 2
        at = max(1, [tokens for tokens, _ in points].index(best))
        (a, at_a), (b, at_b) = points[at - 1], points[at]
        if at_b <= at_a:
            return (steps + 1) // 2
        live = (self._room.memory - self._room.context) / (1 + self._room.slack)
        reach = int((live - self.peaks[best].total) * (b - a) / (at_b - at_a)) // GRAIN
        return min(max(reach, 1), steps)


_OF_UPDATE = ("score", "update", "optimizer")
_MANY_TRIES = 8


class Lever(NamedTuple):
    """Options to change, the bytes of the GPU that are then needed, and whether a dry run found them."""

    option: str
    needed: float
    fits: bool
    dry_run: bool


def scaled(peaks: Mapping[str, Peak], ranks: int, others: int) -> int:
    """Live bytes of the highest phase on another number of ranks, what is divided among them taken in proportion."""
    return max(
        sum(size * ranks // others if part in SHARDED and name != "load" else size for part, size in peak.parts.items())
        for name, peak in peaks.items()
    )


def levers(
    job: Job, config: Config, ranks: int, room: Room, found: DryRun, search: Search, tell: Callable[[str], None]
) -> list[Lever]:
    """What would lower the peak: each change by itself, and those together that change no result."""
    rows: list[Lever] = []

    def add(option: str, live: int, run: bool) -> None:
        if live < _WORTH_IT * found.highest.total:
            rows.append(Lever(option, room.needed(live), room.fits(live), run))

    def run(option: str, changed: Config) -> None:
        tell(option)
        add(option, dry_run(job, changed, ranks, cuda=room.context > 0)[0].highest.total, True)

    other = max(peak.total for name, peak in found.peaks.items() if name not in _OF_UPDATE)
    for tokens, peak in sorted(search.peaks.items()):
        if tokens != config.loss.micro_batch_tokens:
            add(f"--loss.micro-batch-tokens {tokens}", max(peak.total, other), True)
    smaller = _with_cache(config, job)
    cache = smaller.rollout.cache_gb
    less = [peak.total - max(peak.parts.get("cache", 0) - int(cache * 1e9), 0) for peak in found.peaks.values()]
    add(f"--rollout.cache-gb {cache:g}", max(less), False)
    recompute = config.model.activation_checkpointing != "full"
    if recompute:
        run("--model.activation-checkpointing full", _checkpointed(config))
    tokens = min(search.peaks, key=lambda tokens: search.peaks[tokens].total)
    together = f"--loss.micro-batch-tokens {tokens} --rollout.cache-gb {cache:g}"
    together += " --model.activation-checkpointing full" * recompute
    run(together, _checkpointed(replace(smaller, loss=replace(config.loss, micro_batch_tokens=tokens))))
    if found.micro_batches > 1 and config.sharding.reduce == "last":
        run("--sharding.reduce each", replace(config, sharding=replace(config.sharding, reduce="each")))
    if config.optimizer.kind == "adamw":
        saved = [peak.total - int(_BY_8_BITS * peak.parts.get("optimizer", 0)) for peak in found.peaks.values()]
        add("--optimizer.kind adamw-8bit", max(saved), False)
    if config.loss.beta:
        less = [peak.total - peak.parts.get("reference", 0) for peak in found.peaks.values()]
        add("--loss.beta 0 (no reference)", max(less), False)
    if not config.model.lora.rank and find_spec("peft"):  # without it they are no choice
        adapters = replace(config, model=replace(config.model, lora=_ADAPTERS))
        run(f"--model.lora.rank {_ADAPTERS.rank} (adapters alone)", adapters)
    if config.rollout.prompts_per_step % (2 * ranks) == 0:
        shards, more = (shards_of(config.sharding.replicas, n) for n in (ranks, 2 * ranks))
        add(f"--gpus {2 * ranks}", scaled(found.peaks, shards, more), False)
    return sorted(rows, key=lambda lever: lever.needed)


def _with_cache(config: Config, job: Job) -> Config:
    """A fourth of `rollout.cache_gb`, but enough for one row."""
    dtype = getattr(torch, config.model.precision)
    row = bytes_per_token(job.model.text_config, dtype) * (job.prompt.tokens + config.rollout.max_new_tokens)
    cache = max(config.rollout.cache_gb / 4, math.ceil(row / 1e6) / 1e3)
    return replace(config, rollout=replace(config.rollout, cache_gb=min(cache, config.rollout.cache_gb)))


def _checkpointed(config: Config) -> Config:
    return replace(config, model=replace(config.model, activation_checkpointing="full"))
