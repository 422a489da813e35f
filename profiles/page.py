"""A profile as one HTML page that needs nothing else: phases by kind of work, kernels, memory, environment."""

from html import escape
from statistics import median
from typing import Any

from medground.report.style import STYLE
from profiles.groups import GROUPS
from profiles.tables import by_group, shared_machine

# one for each of GROUPS, told apart in light and dark
_COLOURS = (
    "#b07aa1",
    "#e15759",
    "#f28e2b",
    "#59a14f",
    "#edc948",
    "#4e79a7",
    "#9c755f",
    "#ff9da7",
    "#86bcb6",
    "#bab0ac",
)
_MORE_STYLE = """
.bar { display: flex; height: 20px; } .bar i { display: block; }
.row { display: grid; grid-template-columns: 80px 1fr 110px; gap: 10px; align-items: center; margin: 6px 0; }
.row span:last-child { text-align: right; white-space: nowrap; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 12px 0; }
.key b { display: inline-block; width: 12px; height: 12px; margin-right: 5px; }
svg { width: 100%; height: 180px; }
"""


def render_page(result: dict[str, Any], shown: int = 40) -> str:
    """The page. Bars are as long as a phase's median; their colours share it out as the traced step spent it."""
    workload, about = result["workload"], result["environment"]
    title = f"{workload['name']} on {about['device']}"
    whole = median(result["step"])
    warning = shared_machine(result)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>One GRPO step: {_listed({k: v for k, v in workload.items() if k != 'name'})}.</p>",
        f'<p class="progress">{escape(warning)}</p>' if warning else "",
        f"<h2>A step takes {whole * 1e3:.4g} ms</h2>",
        *_bars(result),
        _key(),
        f"<p>{_listed({k.removesuffix('_per_second'): f'{v:.4g}/s' for k, v in result['rates'].items()})}.</p>",
        _idle(result["traced"]["idle"]),
        "<h2>Kernels of the traced step</h2>",
        _kernels(result["traced"]["kernels"], shown),
        "<h2>Memory of the traced step</h2>",
        _memory(result["traced"]["memory"]),
        "<h2>Environment</h2>",
        f"<p>{_listed(about)}.</p>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_MORE_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def _listed(facts: dict[str, Any]) -> str:
    return escape(", ".join(f"{name} {value}" for name, value in facts.items()))


def _bars(result: dict[str, Any]) -> list[str]:
    groups = by_group(result["traced"]["kernels"])
    medians = {phase: median(seconds) for phase, seconds in result["phases"].items()}
    longest = max(medians.values())
    rows = []
    for phase, seconds in medians.items():
        mine = {group: groups[phase, group]["seconds"] for group in GROUPS if (phase, group) in groups}
        # what of the phase no kernel accounts for stays empty
        traced = max(result["traced"]["seconds"][phase], sum(mine.values()), 1e-12)
        pieces = "".join(
            f'<i style="width:{own / traced * seconds / longest:.2%};background:{_COLOURS[GROUPS.index(group)]}" '
            f'title="{escape(group)}: {own * 1e3:.4g} ms of {traced * 1e3:.4g}"></i>'
            for group, own in mine.items()
        )
        spread = f"{min(result['phases'][phase]) * 1e3:.4g} to {max(result['phases'][phase]) * 1e3:.4g} ms"
        rows.append(
            f'<div class="row"><span>{escape(phase)}</span><div class="bar">{pieces}</div>'
            f'<span title="{spread}">{seconds * 1e3:.4g} ms</span></div>'
        )
    return rows


def _key() -> str:
    items = (f'<span><b style="background:{c}"></b>{escape(g)}</span>' for g, c in zip(GROUPS, _COLOURS, strict=True))
    return f'<div class="key">{"".join(items)}</div>'


def _idle(found: dict[str, float] | None) -> str:
    return (
        f"<p>GPU: {_listed({cause: f'{seconds * 1e3:.4g} ms' for cause, seconds in found.items()})}.</p>"
        if found
        else ""
    )


def _kernels(rows: list[dict[str, Any]], shown: int) -> str:
    total = sum(row["seconds"] for row in rows) or 1.0
    lines = [
        f"<tr><td>{escape(row['name'])}</td><td>{escape(row['phase'])}</td><td>{escape(row['group'])}</td>"
        f"<td>{row['calls']}</td><td>{row['seconds'] * 1e3:.4g}</td><td>{row['seconds'] / row['calls'] * 1e6:.4g}</td>"
        f"<td>{row['seconds'] / total:.1%}</td></tr>"
        for row in rows[:shown]
    ]
    left = f"<p>{len(rows) - shown} more are in profile.json.</p>" if len(rows) > shown else ""
    head = "<tr><th>kernel</th><th>phase</th><th>kind</th><th>calls</th><th>ms</th><th>us each</th><th>share</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>{left}'


def _memory(curve: list[list[float]]) -> str:
    most, last = max(held for _, held in curve) or 1, curve[-1][0] or 1
    points = " ".join(f"{at / last * 1000:.1f},{198 - held / most * 190:.1f}" for at, held in curve)
    return (
        f"<p>At most {most / 1e6:.4g} MB beyond what was held before it.</p>"
        f'<svg viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" aria-label="memory over the step">'
        f'<polyline points="{points}" fill="none" stroke="#4e79a7" stroke-width="2" '
        'vector-effect="non-scaling-stroke"/></svg>'
    )
