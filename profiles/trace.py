"""What a traced step did: kernels by phase, work over time, the time in which nothing ran and why, memory over time.

A trace is a list of events, of the device and of the host, as torch.profiler has them. On a CPU the kernels are
torch's operators, each without the time of those that it calls.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from profiles.groups import GROUPS, group_of

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
    starts = [phase.start for phase in phases]
    found: dict[tuple[str, str], Kernel] = {}
    for event, stretches in _own_stretches(events):
        at = bisect_right(starts, event.start) - 1
        if at < 0 or event.start >= phases[at].end:
            continue
        phase = phases[at].name
        kernel = found.setdefault((event.name, phase), Kernel(event.name, group_of(event.name), phase))
        kernel.calls += 1
        kernel.seconds += sum(end - start for start, end in stretches) / 1e9
        kernel.flops += event.flops
    return sorted(found.values(), key=lambda kernel: -kernel.seconds)


def timeline(
    events: Sequence[Event], phases: Sequence[Phase], start: int, end: int, bins: int = 200
) -> dict[str, list | dict[str, list[float]]]:
    """A step from start to end as a picture has it.

    Returns:
        `phases`: [name, start, end] of each stretch, in seconds since the start; `work`: for each kind of work that
        there is, the seconds it took in each of `bins` equal parts of the step. Where kernels overlap, as those of
        several streams or threads do, they add up to more than the part has.
    """
    work: dict[str, list[int]] = {}
    for event, stretches in _own_stretches(events):
        mine = work.setdefault(group_of(event.name), [0] * bins)
        for a, b in stretches:
            for index, nanoseconds in _binned(max(a, start) - start, min(b, end) - start, end - start, bins):
                mine[index] += nanoseconds
    return {
        "phases": [[p.name, (p.start - start) / 1e9, (p.end - start) / 1e9] for p in phases if p.end > p.start],
        "work": {group: [ns / 1e9 for ns in work[group]] for group in GROUPS if any(work.get(group, ()))},
    }


def _binned(a: int, b: int, span: int, bins: int) -> Iterator[tuple[int, int]]:
    """Share a..b out among equal parts of 0..span: index and length of each piece."""
    while a < b:
        index = a * bins // span
        edge = min(b, -(-(index + 1) * span // bins))  # where the next part begins, rounded up as `index` rounds down
        yield index, edge - a
        a = edge


def _own_stretches(events: Iterable[Event]) -> Iterator[tuple[Event, list[tuple[int, int]]]]:
    """Each kernel with the times at which it ran itself: on a CPU without those of the operators within it.

    Kernels are a GPU's events where there are any, else the host's, thread by thread.
    """
    threads: dict[tuple[bool, int], list[Event]] = {}
    for event in events:
        threads.setdefault((event.on_device, event.thread), []).append(event)
    on_gpu = any(on_device for on_device, _ in threads)
    for (on_device, _), mine in threads.items():
        if on_device:  # kernels of a stream follow one another
            yield from ((event, [(event.start, event.end)]) for event in mine)
        elif not on_gpu:
            yield from _innermost(sorted(mine, key=lambda event: (event.start, -event.end)))


def _innermost(events: Iterable[Event]) -> Iterator[tuple[Event, list[tuple[int, int]]]]:
    """Events of one thread, an outer one before those within it, with the times at which none within it ran."""
    under_way: list[tuple[Event, list[tuple[int, int]], int]] = []  # last: since when it has run itself

    def closed(event: Event, stretches: list[tuple[int, int]], since: int) -> tuple[Event, list[tuple[int, int]]]:
        return event, [*stretches, (since, event.end)] if since < event.end else stretches

    for event in events:
        while under_way and under_way[-1][0].end <= event.start:
            yield closed(*under_way.pop())
        if under_way:
            outer, stretches, since = under_way.pop()
            if since < event.start:
                stretches.append((since, event.start))
            under_way.append((outer, stretches, event.end))
        under_way.append((event, [], event.start))
    while under_way:
        yield closed(*under_way.pop())


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
