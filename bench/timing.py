"""How long a call takes and how much memory it needs, with contenders taking turns.

Machines are noisy and clocks drift, so nobody is timed alone: in every round each contender runs once, and the
first round is thrown away. pytest-benchmark drives the rounds and times ours; before each of its rounds it calls
a `setup`, and that is where the others take their turn. All samples of the table come from `timed`, the same code
for everybody.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch

SHORT = 1e-3
"""Seconds. On CUDA, calls below it are timed by `triton.testing.do_bench`: launch and wait cost 10-20 us of wall time,
more than a bar's slack for anything shorter. (Below 100 us wall time would measure little else.)"""

PASSES = 5  # of do_bench over all contenders; the first is thrown away


class Times(NamedTuple):
    """Seconds, over `samples` calls."""

    median: float
    p20: float
    p80: float
    samples: int
    clock: str  # "wall" or "do_bench"
    versus: float  # time over the leader's in the same round, the median: what drifts with the machine drops out


class Turn(NamedTuple):
    """What is timed, and what is done before it, untimed (an in-place contender gets its inputs back)."""

    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


def synced_clock() -> float:
    """Seconds, after the device has finished all it was given: the timer of every benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(turn: Turn) -> float:
    """Seconds of one call."""
    if turn.prepare:
        turn.prepare()
    start = synced_clock()
    result = turn.call()
    seconds = synced_clock() - start
    del result  # freed after the clock was read
    return seconds


def alternate(
    turns: dict[str, Turn], seconds: dict[str, float], pedantic: Callable, budget: float, least: int = 3, most: int = 30
) -> dict[str, Times]:
    """Time all contenders turn by turn.

    Args:
        turns: the first one leads: pytest-benchmark reports it.
        seconds: what a call of each takes, roughly.
        pedantic: pytest-benchmark's `benchmark.pedantic`.
        budget: seconds to spend on each contender, as far as `least` and `most` samples allow. One with fewer
            samples sits rounds out, evenly.
    """
    quota = {name: max(least, min(most, int(budget / max(seconds[name], 1e-9)))) for name in turns}
    rounds = max(quota.values())
    samples: dict[str, dict[int, list[float]]] = {name: {} for name in turns}
    lead, *others = turns
    count = itertools.count()

    def others_first() -> None:
        turn = next(count)
        for name in others if turn % 2 else reversed(others):  # nobody always runs after the same one
            if turn * quota[name] // rounds != (turn - 1) * quota[name] // rounds:
                samples[name][turn] = [timed(turns[name])]

    def ours() -> None:
        samples[lead][len(samples[lead])] = [timed(turns[lead])]

    with no_collection():
        pedantic(ours, setup=others_first, rounds=rounds, warmup_rounds=1, iterations=1)
    return {name: summary(values, samples[lead], "wall") for name, values in samples.items()}


def alternate_short(turns: dict[str, Turn], pedantic: Callable) -> dict[str, Times]:
    """The same for calls too short for a wall clock: `do_bench` goes round, which empties the L2 cache in between.

    It cannot give an in-place contender its inputs back between calls, only between passes; the work is the same.
    """
    from triton.testing import do_bench

    samples: dict[str, dict[int, list[float]]] = {name: {} for name in turns}
    lead = next(iter(turns))
    with no_collection():
        for turn in range(PASSES):
            for name, (call, prepare) in turns.items():
                if prepare:
                    prepare()
                samples[name][turn] = [ms / 1e3 for ms in do_bench(call, warmup=5, rep=20, return_mode="all")]
        pedantic(turns[lead].call, rounds=5, warmup_rounds=1, iterations=1)
    return {name: summary(values, samples[lead], "do_bench") for name, values in samples.items()}


def summary(samples: dict[int, list[float]], lead: dict[int, list[float]], clock: str) -> Times:
    """Of the samples of each round but the first, which warmed up."""
    rounds = [turn for turn in samples if turn] or [0]
    values = sorted(value for turn in rounds for value in samples[turn])
    versus = median([median(samples[turn]) / median(lead[turn]) for turn in rounds])
    p20, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.8))
    return Times(median(values), p20, p80, len(values), clock, versus)


def pedantic(call: Callable[[], Any], setup: Callable[[], Any] | None = None, rounds: int = 1, **_: Any) -> None:
    """As pytest-benchmark's, without the clock."""
    for _round in range(rounds):
        if setup:
            setup()
        call()


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_memory(turn: Turn) -> int:
    """Bytes that one call holds at most beyond what was there before it; its results count."""
    if turn.prepare:
        turn.prepare()
    with PeakMemory() as peak:
        result = turn.call()
        del result
    return peak.bytes


class PeakMemory:
    """Most bytes held at a time while it is open, beyond what was held before it."""

    def __init__(self) -> None:
        self.bytes = self._before = 0
        # every allocation and release of torch's CPU allocator, in order. The resident size would also count
        # what malloc keeps back, and a second contender would find the first one's pages
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profile.__exit__(*error)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        self.bytes = max(held, default=0)


def count_launches(call: Callable[[], Any]) -> int:
    """CUDA kernels, copies and fills that one call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
