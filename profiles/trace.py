"""What a traced step did: kernels by phase, the time in which nothing ran and why, memory over time.

A trace is a list of events, of the device and of the host, as torch.profiler has them. On a CPU the kernels are
torch's operators, each without the time of those that it calls.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from profiles.groups import group_of

IDLE_CAUSES = ("synchronisation", "host late", "launch gap")
SHORT_GAP = 5_000
"""Nanoseconds between two kernels that even a full queue leaves, or nearly."""


class Event(NamedTuple):
    """Times in nanoseconds. `on_device`: of a GPU; `thread` tells the host's apart."""

    name: str
    start: int
    end: int
    on_device: bool = False
    thread: int = 0
    flops: int = 0


class Phase(NamedTuple):
    """A stretch of a step; a phase may have several."""

    name: str
    start: int
    end: int


def cut_into_phases(start: int, ends: Sequence[tuple[str, int]], inner: Sequence[Phase]) -> list[Phase]:
    """Stretches in order, from where each phase ended and from those that interrupted others."""
    stretches = []
    for name, end in ends:
        for inside in (phase for phase in inner if start <= phase.start < end):
            stretches += [Phase(name, start, inside.start), inside]
            start = inside.end
        stretches.append(Phase(name, start, end))
        start = end
    return stretches


@dataclass
class Kernel:
    """All runs of one kernel in one phase. `seconds`: of itself; `flops`: as torch counts them, on a CPU alone."""

    name: str
    group: str
    phase: str
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0


def kernels(events: Sequence[Event], phases: Sequence[Phase]) -> list[Kernel]:
    """Add up a trace, the longest first; what began in no phase is left out."""
    on_gpu = any(event.on_device for event in events)
    starts = [phase.start for phase in phases]
    found: dict[tuple[str, str], Kernel] = {}
    for event, nanoseconds in _own_times(event for event in events if event.on_device == on_gpu):
        at = bisect_right(starts, event.start) - 1
        if at < 0 or event.start >= phases[at].end:
            continue
        phase = phases[at].name
        kernel = found.setdefault((event.name, phase), Kernel(event.name, group_of(event.name), phase))
        kernel.calls += 1
        kernel.seconds += nanoseconds / 1e9
        kernel.flops += event.flops
    return sorted(found.values(), key=lambda kernel: -kernel.seconds)


def _own_times(events: Iterable[Event]) -> Iterator[tuple[Event, int]]:
    """Each event with its time less that of the events within it, thread by thread."""
    threads: dict[tuple[bool, int], list[Event]] = {}
    for event in events:
        threads.setdefault((event.on_device, event.thread), []).append(event)
    for (on_device, _), mine in threads.items():
        if on_device:  # kernels of a stream follow one another
            yield from ((event, event.end - event.start) for event in mine)
            continue
        mine.sort(key=lambda event: (event.start, -event.end))
        under_way: list[tuple[Event, int]] = []
        for event in mine:
            while under_way and under_way[-1][0].end <= event.start:
                yield under_way.pop()
            if under_way:
                outer, own = under_way[-1]
                under_way[-1] = outer, own - (min(event.end, outer.end) - event.start)
            under_way.append((event, event.end - event.start))
        yield from reversed(under_way)


def idle(events: Sequence[Event], start: int, end: int) -> dict[str, float]:
    """Seconds from start to end in which a GPU ran something (`busy`) and in which nothing ran, by cause.

    `synchronisation`: the host waited for the GPU when the gap began, and had to launch anew; `host late`: the next
    kernel was launched within the gap; `launch gap`: it was launched before.
    """
    runs = sorted((max(e.start, start), min(e.end, end)) for e in events if e.on_device and e.end > start)
    busy: list[list[int]] = [[start, start]]
    for a, b in runs:
        if a <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], b)
        elif a < end:
            busy.append([a, b])
    busy.append([end, end])
    waits = sorted((e.start, e.end) for e in events if not e.on_device and "Synchronize" in e.name)
    launches = sorted(e.start for e in events if not e.on_device and "Launch" in e.name)
    seconds = dict.fromkeys(("busy", *IDLE_CAUSES), 0.0)
    seconds["busy"] = sum(b - a for a, b in busy) / 1e9
    for (_, gap_start), (gap_end, _) in pairwise(busy):
        waiting = any(a <= gap_start + SHORT_GAP and b >= gap_start for a, b in waits)
        last_launch = bisect_right(launches, gap_end) - 1
        late = last_launch >= 0 and launches[last_launch] > gap_start
        cause = "synchronisation" if waiting and late else "host late" if late else "launch gap"
        seconds[cause] += (gap_end - gap_start) / 1e9
    return seconds


def counts(events: Iterable[Event]) -> dict[str, int]:
    """How often the host launched work, waited for the GPU and copied to or from it."""
    names = [(event.name, event.on_device) for event in events]
    return {
        "launches": sum("Launch" in name and not device for name, device in names),
        "synchronisations": sum(group_of(name) == "synchronisation" and not device for name, device in names),
        "copies between host and device": sum(device and ("HtoD" in name or "DtoH" in name) for name, device in names),
    }


def memory_curve(changes: Sequence[tuple[int, int]], start: int, end: int, points: int = 400) -> list[list[float]]:
    """[seconds since start, most bytes held beyond those at the start] of each of `points` stretches.

    Args:
        changes: (time in nanoseconds, bytes allocated or, negative, released).
    """
    curve, held, at = [], 0, 0
    ordered = sorted(changes)
    while at < len(ordered) and ordered[at][0] < start:
        at += 1
    for point in range(points):
        until = start + (end - start) * (point + 1) // points
        most = held
        while at < len(ordered) and ordered[at][0] < until:
            held += ordered[at][1]
            most = max(most, held)
            at += 1
        curve.append([(until - start) / 1e9, most])
    return curve
