"""A profile as one HTML page that needs nothing else: phases by kind of work, time line, memory, kernels."""

from html import escape
from statistics import median
from typing import Any

from medground.report.plots import number
from profiles import curves, drawing
from profiles.tables import by_group, disturbances, rate_label

BARS = (
    "A bar is the median of the timed steps, a dot each of them; its colours share it out as one more step spent it "
    "under the profiler."
)


def render_page(result: dict[str, Any], shown: int = 40) -> str:
    """The page; bars are as long as a phase's median, their colours share it out as the traced step spent it."""
    workload, about, traced = result["workload"], result["environment"], result["traced"]
    kinds = {kernel["group"] for kernel in traced["kernels"]}
    parts = [
        '<p class="eyebrow">Profile of a GRPO step</p>',
        f"<h1>{escape(workload['name'])} on {escape(about['device'])}</h1>",
        drawing.facts(
            {k: v for k, v in workload.items() if k != "name"} | {"commit": commit(about), "date": date(about)}
        ),
        drawing.warnings(disturbances(result)),
        _tiles(result),
        "<h2>Phases</h2>",
        f'<div class="card">{drawing.key(kinds)}{_phases(result)}</div>',
        f'<p class="note">{BARS}</p>',
        "<h2>Time line of the traced step</h2>",
        curves.time_line("Phases and kinds of work", traced["timeline"], traced["step"]),
        "<h2>Memory of the traced step</h2>",
        curves.memory("MB beyond what was held before it", [("memory", "s0", traced["memory"])]),
        "<h2>Kernels of the traced step</h2>",
        _kernels(traced, shown),
        drawing.facts({name: number(count) for name, count in traced["counts"].items()}),
        "<h2>Environment</h2>",
        drawing.facts({k: v for k, v in about.items() if k != "packages"} | about.get("packages", {})),
    ]
    return drawing.page(f"{workload['name']} on {about['device']}", parts, curves.STYLE)


def commit(about: dict[str, Any]) -> str:
    """The commit that was measured, short."""
    return (about.get("commit") or "unknown")[:10] + (", with changes" if about.get("dirty") else "")


def date(about: dict[str, Any]) -> str:
    """When, to the minute."""
    return about["date"][:16].replace("T", " ")


def _tiles(result: dict[str, Any]) -> str:
    step, traced = result["step"], result["traced"]
    found = [("step", drawing.ms(median(step)), f"{drawing.ms(min(step), '')} to {drawing.ms(max(step))}")]
    found += [(rate_label(name), number(rate), "median of the timed steps") for name, rate in result["rates"].items()]
    peak = f"{number(traced['peak_memory'] / 1e6)} MB"
    found.append(("peak memory", peak, "of the traced step, beyond what was held"))
    if traced["idle"]:
        told = ", ".join(f"{cause} {drawing.ms(s)}" for cause, s in traced["idle"].items() if cause != "busy")
        found.append(("GPU busy", f"{traced['idle']['busy'] / traced['step']:.1%}", f"idle: {told}"))
    return drawing.tiles((name, escape(value), note) for name, value, note in found)


def _phases(result: dict[str, Any]) -> str:
    groups, floors = by_group(result["traced"]["kernels"]), result.get("floors") or {}
    longest = max(max(seconds) for seconds in result["phases"].values())
    whole, rows = median(result["step"]), []
    for phase, seconds in result["phases"].items():
        spent = {group: sums["seconds"] for (p, group), sums in groups.items() if p == phase}
        floor = floors.get(phase)
        notes = f"<small>{drawing.percent(median(seconds) / whole)} of the step</small>"
        if floor:
            notes += f"<small>floor / time {floor / median(seconds):.0%}</small>"
        bar = drawing.lane(seconds, longest, spent, result["traced"]["seconds"].get(phase, 0.0), floor)
        rows.append(
            f'<div class="phase"><span class="name">{escape(phase)}</span>{bar}'
            f'<span class="numbers">{drawing.ms(median(seconds))}{notes}</span></div>'
        )
    return "".join(rows)


def _kernels(traced: dict[str, Any], shown: int) -> str:
    kernels = traced["kernels"]
    rows = []
    for k in kernels[:shown]:
        share = k["seconds"] / traced["step"]
        rows.append(
            (
                drawing.kernel(k["name"], k["phase"], k["group"]), drawing.ms(k["seconds"], ""), f"{k['calls']:,}",
                number(k["seconds"] / k["calls"] * 1e6), drawing.percent(share),
                drawing.share_bar(k["seconds"] / max(kernels[0]["seconds"], 1e-12)),
            )
        )  # fmt: skip
    head = ("kernel", "ms", "calls", "us each", "of the step", "")
    left = f"<p class='note'>{len(kernels) - shown} more are in profile.json.</p>" if len(kernels) > shown else ""
    return drawing.table(head, rows, numbers=(1, 2, 3, 4)) + left
