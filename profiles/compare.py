"""Compare two recorded profiles: what a change did to the step, and where.

    python -m profiles.compare BEFORE AFTER                    tables, as Markdown
    python -m profiles.compare BEFORE AFTER --fail-over 5%     exit status 1 where a phase or the step is slower by more

Two things are told apart. *Work*: which kernels ran in which phase, how often, with how many operations. The same tree
does the same work, so any difference is real, however small. *Time*: a phase counts as changed where its median moved
by more than `--threshold` and no step of one record is as fast as any of the other: noise that moves all steps of a
record alike, as on a machine that others use too, is what the threshold is for.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from profiles.record import FORMAT
from profiles.tables import by_group, shared_machine

THRESHOLD = {"cpu": 0.3, "cuda": 0.05}


class Change(NamedTuple):
    """A phase, or the step: medians in seconds, and whether they differ beyond the noise."""

    name: str
    before: float
    after: float
    real: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before


class Work(NamedTuple):
    """A kernel or, summed up, a group of kernels in a phase, whose calls or operations differ. 0 calls: not there."""

    phase: str
    group: str
    kernel: str
    calls: tuple[int, int]
    flops: tuple[int, int]
    seconds: tuple[float, float]


class Comparison(NamedTuple):
    times: list[Change]
    work: list[Work]  # by group, those with the most time first
    kernels: list[Work]
    counts: dict[str, tuple[int, int]]  # launches, waits, copies, where they differ
    memory: tuple[float, float]  # most bytes of the traced step beyond those before it
    environment: dict[str, tuple[Any, Any]]  # what differs
    warnings: list[str]

    @property
    def is_change(self) -> bool:
        return any(change.real for change in self.times) or bool(self.work or self.kernels or self.counts)


def load(folder: Path) -> dict[str, Any]:
    """Read a profile.

    Raises:
        ValueError: there is none, or one of another format.
    """
    path = folder / "profile.json" if folder.is_dir() else folder
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: want a profile written by profiles.record ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: want a profile of format {FORMAT}; got {got!r}")
    return found


def compare(
    before: dict[str, Any], after: dict[str, Any], threshold: float | None = None, anyway: bool = False
) -> Comparison:
    """Raises ValueError where workloads or devices differ, but not `anyway`."""
    a, b = before["environment"], after["environment"]
    for what, x, y in (("workload", before["workload"], after["workload"]), ("device", a["device"], b["device"])):
        if x != y and not anyway:
            raise ValueError(f"want two profiles of one {what} (--anyway compares all the same); got {x} and {y}")
    least = THRESHOLD[b["on"]] if threshold is None else threshold
    times = [_change("step", before["step"], after["step"], least)]
    for phase in {**before["phases"], **after["phases"]}:
        times.append(_change(phase, before["phases"].get(phase, [0.0]), after["phases"].get(phase, [0.0]), least))
    old, new = before["traced"], after["traced"]
    one, two = (by_group(traced["kernels"]) for traced in (old, new))
    single, other = ({(k["phase"], k["group"], k["name"]): k for k in t["kernels"]} for t in (old, new))
    return Comparison(
        times,
        _differing({(*key, ""): s for key, s in one.items()}, {(*key, ""): s for key, s in two.items()}),
        _differing(single, other),
        {k: (old["counts"][k], new["counts"][k]) for k in old["counts"] if old["counts"][k] != new["counts"].get(k)},
        (max(held for _, held in old["memory"]), max(held for _, held in new["memory"])),
        {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if k != "date" and a.get(k) != b.get(k)},
        [f"{name}: {text}" for name, p in (("Before", before), ("After", after)) if (text := shared_machine(p))],
    )


def _change(name: str, before: list[float], after: list[float], threshold: float) -> Change:
    x, y = median(before), median(after)
    apart = max(before) < min(after) or max(after) < min(before)
    return Change(name, x, y, apart and max(x, y) > (1 + threshold) * min(x, y))


def _differing(before: dict[tuple, dict[str, Any]], after: dict[tuple, dict[str, Any]]) -> list[Work]:
    nothing = {"calls": 0, "flops": 0, "seconds": 0.0}
    found = []
    for key in before.keys() | after.keys():
        x, y = before.get(key, nothing), after.get(key, nothing)
        if (x["calls"], x["flops"]) != (y["calls"], y["flops"]):
            found.append(Work(*key, *((x[what], y[what]) for what in ("calls", "flops", "seconds"))))
    return sorted(found, key=lambda work: (-abs(work.seconds[1] - work.seconds[0]), work))


def render(found: Comparison, shown: int = 20) -> str:
    """The comparison as Markdown."""
    lines = ["| | before, ms | after, ms | after / before | |", "|---|---|---|---|---|"]
    for change in found.times:
        verdict = ("slower" if change.after > change.before else "faster") if change.real else ""
        ratio = f"{change.ratio:.2f}" if change.before else "-"
        lines.append(f"| {change.name} | {change.before * 1e3:.4g} | {change.after * 1e3:.4g} | {ratio} | {verdict} |")
    if found.work or found.kernels:
        head = "| phase | group | kernel | calls | GFLOP | ms of the traced step |"
        lines += ["", "Work that differs:", "", head, "|---|---|---|---|---|---|"]
        lines += [_work_row(work) for work in found.work + found.kernels[:shown]]
        if len(found.kernels) > shown:
            lines.append(f"\n{len(found.kernels) - shown} more kernels differ.")
    lines += [""] + [f"{name}: {x} -> {y}" for name, (x, y) in found.counts.items()]
    lines.append(f"Peak memory of the traced step: {found.memory[0] / 1e6:.4g} -> {found.memory[1] / 1e6:.4g} MB.")
    lines += [f"Environment: {name} {x} -> {y}" for name, (x, y) in found.environment.items()]
    lines += found.warnings
    if not found.is_change:
        lines.append("No change.")
    return "\n".join(lines)


def _work_row(work: Work) -> str:
    mark = " (new)" if not work.calls[0] else " (gone)" if not work.calls[1] else ""
    flops, seconds = ([f"{value:.4g}" for value in pair] for pair in (
        (work.flops[0] / 1e9, work.flops[1] / 1e9), (work.seconds[0] * 1e3, work.seconds[1] * 1e3)
    ))  # fmt: skip
    cells = (f"{work.calls[0]} -> {work.calls[1]}{mark}", " -> ".join(flops), " -> ".join(seconds))
    return f"| {work.phase} | {work.group} | {work.kernel or '**all**'} | {' | '.join(cells)} |"


def _share(text: str) -> float:
    number = text.removesuffix("%")
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"want a share such as 5% or 0.05; got {text!r}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two recorded profiles.")
    parser.add_argument("before", type=Path, help="folder of a profile, or its profile.json")
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=_share, help="changes of time below are noise; 30%% on a CPU, 5%% on a GPU")
    parser.add_argument("--fail-over", type=_share, metavar="SHARE", help="exit 1 where anything is slower by more")
    parser.add_argument("--anyway", action="store_true", help="compare other workloads or devices too")
    args = parser.parse_args()
    try:
        found = compare(load(args.before), load(args.after), args.threshold, args.anyway)
    except ValueError as error:
        print(f"profiles.compare: {error}", file=sys.stderr)
        sys.exit(2)
    print(render(found))
    if args.fail_over is not None and any(c.real and c.after > c.before * (1 + args.fail_over) for c in found.times):
        sys.exit(1)


if __name__ == "__main__":
    main()
