"""A comparison of two profiles as one HTML page that needs nothing else."""

from html import escape
from typing import Any

from medground.report.plots import DASH, number
from profiles import curves, drawing
from profiles.changes import Change, Comparison, Work, environments
from profiles.page import BARS, commit, date
from profiles.tables import by_group, rate_label

_ARROW = '<span class="arrow">→</span>'
_NOT_KEPT = "not kept: a history has no curves"


def render_comparison(before: dict[str, Any], after: dict[str, Any], found: Comparison, shown: int = 30) -> str:
    """The page; `found` is what `compare` made of the two."""
    about, other = before["environment"], after["environment"]
    title = (
        f"{_both(before['workload']['name'], after['workload']['name'])} on {_both(about['device'], other['device'])}"
    )
    parts = [
        '<p class="eyebrow">Comparison of two profiles of a GRPO step</p>',
        f"<h1>{escape(title)}</h1>",
        drawing.facts(
            {f"{side}: commit": f"{commit(e)}, {date(e)}" for side, e in (("before", about), ("after", other))}
            | {k: v for k, v in after["workload"].items() if k != "name"}
        ),
        f'<p class="lead">{_verdict(found)}</p>',
        drawing.warnings(found.warnings),
        _tiles(found),
        "<h2>Phases</h2>",
        _phases(before, after, found),
        f'<p class="note">{BARS} Slower or faster: by more than the threshold in the median of the steps, each '
        "compared with the one that did the same work, and by half of it in every one.</p>",
        _idle(found),
        "<h2>Time lines of the traced steps</h2>",
        *_time_lines(before, after),
        "<h2>Memory of the traced steps</h2>",
        _memory(before, after),
        _work(found, shown),
        "<h2>Kernels by the change of their time</h2>",
        _kernels(found, shown),
        "<h2>Environment</h2>",
        _environment(before, after),
    ]
    return drawing.page(f"{title}: before and after", parts, curves.STYLE)


def _both(a: Any, b: Any) -> str:
    return f"{a}" if a == b else f"{a} → {b}"


def _verdict(found: Comparison) -> str:
    told = [
        f'{escape(c.name)} is <span class="{c.verdict}">{c.verdict}</span>{_ratio(c)}' for c in found.times if c.verdict
    ]
    if differing := sorted({f"{work.group} of {work.phase}" for work in found.kernels if work.differs}):
        told.append(f"other work: {escape(', '.join(differing))}")
    told += [f"{escape(name)}: {_count(a)} → {_count(b)}" for name, (a, b) in found.counts.items() if a != b]
    return "; ".join(told) + "." if told else "No change."


def _ratio(change: Change) -> str:
    return f" ({change.after / change.before:.2f} × the time)" if change.before and change.after else ""


def _tiles(found: Comparison) -> str:
    def pair(a: str, b: str) -> str:
        return f'<span class="old">{escape(a)}</span>{_ARROW}{escape(b)}'

    step, memory = found.times[0], [number(held / 1e6) for held in found.memory]
    cards = [("step, ms", pair(drawing.ms(step.before, ""), drawing.ms(step.after, "")), "median of the timed steps")]
    for name, rates in found.rates.items():
        cards.append((rate_label(name), pair(*map(number, rates)), "median of the timed steps"))
    cards.append(("peak memory, MB", pair(*memory), "of the traced step, beyond what was held"))
    return drawing.tiles(cards)


def _phases(before: dict[str, Any], after: dict[str, Any], found: Comparison) -> str:
    sides = (("before", before), ("after", after))
    groups = {side: by_group(profile["traced"]["kernels"]) for side, profile in sides}
    longest = max(max(s) for _, profile in sides for s in profile["phases"].values())
    rows = []
    for change in found.times[1:]:
        lanes = []
        for side, profile in sides:
            spent = {group: sums["seconds"] for (p, group), sums in groups[side].items() if p == change.name}
            traced = profile["traced"].get("seconds", {}).get(change.name, 0.0)
            floor = (profile.get("floors") or {}).get(change.name)
            steps = profile["phases"].get(change.name)
            drawn = drawing.lane(steps, longest, spent, traced, floor) if steps else '<div class="lane"></div>'
            lanes.append(f"<small>{side}</small>{drawn}")
        rows.append(
            f'<div class="phase"><span class="name">{escape(change.name)}</span>'
            f'<div class="lanes">{"".join(lanes)}</div><span class="numbers">{_numbers(change)}</span></div>'
        )
    kinds = {work.group for work in found.kernels}
    return f'<div class="card">{drawing.key(kinds)}{"".join(rows)}</div>'


def _numbers(change: Change) -> str:
    a, b = (drawing.ms(seconds, "") if seconds else DASH for seconds in (change.before, change.after))
    ratio = f"{change.after / change.before:.2f} ×" if change.before and change.after else ""
    notes = [f'<span class="{change.verdict}">{change.verdict}</span> {ratio}']
    if any(share is not None for share in change.of_floor):
        shares = (DASH if share is None else f"{share:.0%}" for share in change.of_floor)
        notes.append(f"floor / time {' → '.join(shares)}")
    return f"{a} → {b} ms" + "".join(f"<small>{note}</small>" for note in notes)


def _kernels(found: Comparison, shown: int) -> str:
    most = max((abs(work.change) for work in found.kernels), default=0.0)
    rows = []
    for work in found.kernels[:shown]:
        each = (number(s / n * 1e6) if n else DASH for s, n in zip(work.seconds, work.calls, strict=True))
        shares = (drawing.percent(s / step) for s, step in zip(work.seconds, found.step, strict=True))
        rows.append(
            (
                drawing.kernel(work.kernel, work.phase, work.group), _moved(*(drawing.ms(s, "") for s in work.seconds)),
                _signed(work.change), drawing.change_bar(work.change, most), _moved(*map(_count, work.calls)),
                _moved(*each), _moved(*shares), f'<span class="{work.mark}">{work.mark}</span>',
            )
        )  # fmt: skip
    head = ("kernel", "ms", "change, ms", "", "calls", "us each", "of the step", "")
    left = f" {len(found.kernels) - shown} more changed by less." if len(found.kernels) > shown else ""
    note = f"These are times of one traced step each: they tell where to look, and are no verdict.{left}"
    return f'<p class="note">{note}</p>{drawing.table(head, rows, numbers=(1, 2, 4, 5, 6))}'


def _work(found: Comparison, shown: int) -> str:
    differing = [work for work in found.kernels if work.differs]
    if not differing:
        return ""
    rows = [_work_row(work) for work in found.groups + differing[:shown]]
    left = f'<p class="note">{len(differing) - shown} more kernels differ.</p>' if len(differing) > shown else ""
    return f"<h2>Work that differs</h2>{drawing.table(('kernel', 'calls', 'GFLOP', ''), rows, numbers=(1, 2))}{left}"


def _work_row(work: Work) -> tuple[str, ...]:
    name = drawing.kernel(work.kernel, work.phase, work.group)
    mark = f'<span class="{work.mark}">{work.mark}</span>'
    return name, _moved(*map(_count, work.calls)), _moved(*(number(flops / 1e9) for flops in work.flops)), mark


def _moved(a: str, b: str) -> str:
    return escape(b) if a == b else f'<span class="old">{escape(a)} →</span> {escape(b)}'


def _signed(seconds: float) -> str:
    return ("+" if seconds > 0 else "") + drawing.ms(seconds, "")


def _count(value: int) -> str:
    return f"{value:,}"


def _idle(found: Comparison) -> str:
    if not found.idle:
        return ""
    most = max(abs(b - a) for a, b in found.idle.values())
    rows = [
        (
            escape(cause), _moved(drawing.ms(a, ""), drawing.ms(b, "")), _signed(b - a),
            drawing.change_bar(b - a, most),
        )
        for cause, (a, b) in found.idle.items()
    ]  # fmt: skip
    table = drawing.table(("of the traced step", "ms", "change, ms", ""), rows, numbers=(1, 2))
    return f"<h2>The GPU: busy, and idle by cause</h2>{table}"


def _time_lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    sides = [(name, profile["traced"]) for name, profile in (("Before", before), ("After", after))]
    whole = max(traced["step"] for _, traced in sides)
    return [
        curves.time_line(name, traced["timeline"], whole) if "timeline" in traced else curves.missing(name, _NOT_KEPT)
        for name, traced in sides
    ]


def _memory(before: dict[str, Any], after: dict[str, Any]) -> str:
    sides = (("before", "s1", before), ("after", "s0", after))
    kept = [(name, colour, p["traced"]["memory"]) for name, colour, p in sides if "memory" in p["traced"]]
    lost = " and ".join(name for name, _, p in sides if "memory" not in p["traced"])
    title = "MB beyond what was held before"
    drawn = curves.memory(title, kept) if kept else ""
    return drawn + (curves.missing(f"Memory {lost}", _NOT_KEPT) if lost else "")


def _environment(before: dict[str, Any], after: dict[str, Any]) -> str:
    rows = [
        (escape(name), escape(str(a)), escape(str(b)), '<span class="new">differs</span>' if a != b else "")
        for name, (a, b) in environments(before, after).items()
    ]
    return drawing.table(("", "before", "after", ""), rows)
