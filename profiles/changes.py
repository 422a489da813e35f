"""What a change did to the step: two profiles, phase by phase and kernel by kernel.

Two things are told apart. *Work*: which kernels ran in which phase, how often, with how many operations. The same tree
does the same work, so any difference is real, however small. *Time*: a step is compared with the step of the other
record that did the same work. A phase counts as changed where its median ratio is beyond a threshold and all ratios are
beyond half of it, on the same side: noise that moves all steps of a record alike, as on a machine that others use too,
is what the threshold is for. What moves a step by less than `HARDLY` is none. A kernel's time is that of one traced
step: it tells where to look, and is no verdict.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from profiles.tables import by_group, disturbances

THRESHOLD = {"cpu": 0.3, "cuda": 0.05}
HARDLY = 0.002
"""Of the step: a phase that moved by less is not looked at."""


class Change(NamedTuple):
    """A phase, or the step: medians in seconds, 0 where it is not there, and whether they differ beyond the noise.

    `of_floor`: of the time, the share that the hardware needs at least, where it is known.
    """

    name: str
    before: float
    after: float
    real: bool
    of_floor: tuple[float | None, float | None] = (None, None)

    @property
    def verdict(self) -> str:
        if not self.real:
            return ""
        if not self.before or not self.after:
            return "gone" if self.before else "new"
        return "slower" if self.after > self.before else "faster"


class Work(NamedTuple):
    """A kernel or, summed up, a group of kernels in a phase. 0 calls: not there."""

    phase: str
    group: str
    kernel: str
    calls: tuple[int, int]
    flops: tuple[int, int]
    seconds: tuple[float, float]

    @property
    def differs(self) -> bool:
        return self.calls[0] != self.calls[1] or self.flops[0] != self.flops[1]

    @property
    def change(self) -> float:
        return self.seconds[1] - self.seconds[0]

    @property
    def mark(self) -> str:
        return "new" if not self.calls[0] else "gone" if not self.calls[1] else ""


class Comparison(NamedTuple):
    """Pairs are (before, after)."""

    times: list[Change]
    rates: dict[str, tuple[float | None, float | None]]
    groups: list[Work]  # whose work differs, as the kernels' in order of the change of time
    kernels: list[Work]  # all, the largest change of time first
    step: tuple[float, float]  # seconds of the traced step
    counts: dict[str, tuple[int, int]]  # launches, waits, copies
    idle: dict[str, tuple[float, float]]  # seconds of a GPU, busy and by cause; empty on a CPU
    memory: tuple[float, float]  # most bytes of the traced step beyond those before it
    environment: dict[str, tuple[Any, Any]]  # what differs
    warnings: list[str]

    @property
    def is_change(self) -> bool:
        return (
            any(change.real for change in self.times)
            or any(work.differs for work in self.kernels)
            or any(a != b for a, b in self.counts.values())
        )

    def slower(self, share: float) -> list[Change]:
        """What takes longer by more than a share of what it took."""
        return [c for c in self.times if c.verdict == "slower" and c.after > c.before * (1 + share)]


def compare(
    before: dict[str, Any], after: dict[str, Any], threshold: float | None = None, anyway: bool = False
) -> Comparison:
    """Raises ValueError where workloads or devices differ, but not `anyway`."""
    a, b = before["environment"], after["environment"]
    for what, x, y in (("workload", before["workload"], after["workload"]), ("device", a["device"], b["device"])):
        if x != y and not anyway:
            raise ValueError(f"want two profiles of one {what} (--anyway compares all the same); got {x} and {y}")
    least = THRESHOLD[b["on"]] if threshold is None else threshold
    old, new = before["traced"], after["traced"]
    groups = [{(*key, ""): sums for key, sums in by_group(traced["kernels"]).items()} for traced in (old, new)]
    kernels = [{(k["phase"], k["group"], k["name"]): k for k in traced["kernels"]} for traced in (old, new)]
    return Comparison(
        [_change(name, before, after, least) for name in ("step", *{**before["phases"], **after["phases"]})],
        _pairs(before["rates"], after["rates"]),
        [work for work in _works(*groups) if work.differs],
        _works(*kernels),
        (old["step"], new["step"]),
        _pairs(old["counts"], new["counts"], 0),
        _pairs(old["idle"], new["idle"], 0.0) if old["idle"] and new["idle"] else {},
        (old["peak_memory"], new["peak_memory"]),
        {name: pair for name, pair in environments(before, after).items() if name != "date" and pair[0] != pair[1]},
        [f"{name}: {text}" for name, p in (("Before", before), ("After", after)) for text in disturbances(p)],
    )


def environments(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """All that is known of both, packages one by one."""
    flat = []
    for profile in (before, after):
        about = dict(profile["environment"])
        packages = about.pop("packages", {})
        flat.append(about | packages)
    return _pairs(*flat)


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any], missing: Any = None) -> dict[str, tuple[Any, Any]]:
    return {name: (before.get(name, missing), after.get(name, missing)) for name in {**before, **after}}


def _change(name: str, before: dict[str, Any], after: dict[str, Any], threshold: float) -> Change:
    x, y = (p["step"] if name == "step" else p["phases"].get(name, [0.0]) for p in (before, after))
    one, two = median(x), median(y)
    real = _is_real(x, y, threshold) and abs(two - one) > HARDLY * median(before["step"])
    floors = [(p.get("floors") or {}).get(name) for p in (before, after)]
    shares = [floor / time if floor and time else None for floor, time in zip(floors, (one, two), strict=True)]
    return Change(name, one, two, real, (shares[0], shares[1]))


def _is_real(before: list[float], after: list[float], threshold: float) -> bool:
    """Whether steps take longer, or less long, by more than noise."""
    for fast, slow in ((before, after), (after, before)):
        # a phase that one side lacks is infinitely slower on the other
        ratios = [y / x if x else float("inf") for x, y in zip(fast, slow, strict=False) if x or y]
        if ratios and median(ratios) > 1 + threshold and min(ratios) > 1 + threshold / 2:
            return True
    return False


def _works(before: dict[tuple, dict[str, Any]], after: dict[tuple, dict[str, Any]]) -> list[Work]:
    nothing = {"calls": 0, "flops": 0, "seconds": 0.0}
    found = []
    for key in before.keys() | after.keys():
        x, y = before.get(key, nothing), after.get(key, nothing)
        found.append(Work(*key, *((x[what], y[what]) for what in ("calls", "flops", "seconds"))))
    return sorted(found, key=lambda work: (-abs(work.change), work))
