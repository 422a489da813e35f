"""A comparison of two profiles as Markdown, for a terminal and for a pull request."""

from collections.abc import Iterable

from medground.report.plots import number
from profiles.changes import Comparison, Work
from profiles.tables import rate_label


def render(found: Comparison, kernels: int = 10, works: int = 20) -> str:
    """The comparison; `kernels` and `works` limit the rows of the two long tables."""
    parts = [_times(found), _rates(found)]
    if differing := [work for work in found.kernels if work.differs]:
        left = len(differing) - works
        rows = [_work_row(work) for work in found.groups + differing[:works]]
        parts.append(_table("Work that differs:", ("phase", "kind", "kernel", "calls", "GFLOP"), rows))
        parts.append(f"{left} more kernels differ." if left > 0 else "")
    if kernels:
        parts.append(_kernels(found, kernels))
    if found.idle:
        rows = [(cause, number(a * 1e3), number(b * 1e3)) for cause, (a, b) in found.idle.items()]
        parts.append(_table("GPU:", ("ms of the traced step", "before", "after"), rows))
    facts = [f"{name}: {a} -> {b}" for name, (a, b) in found.counts.items() if a != b]
    facts.append(f"Peak memory of the traced step: {_moved(*(number(held / 1e6) for held in found.memory))} MB.")
    facts += [f"Environment: {name} {a} -> {b}" for name, (a, b) in found.environment.items()]
    facts += found.warnings
    if not found.is_change:
        facts.append("No change.")
    return "\n\n".join(part for part in [*parts, "\n".join(f"- {fact}" for fact in facts)] if part)


def _table(title: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([*([title, ""] if title else []), lines[0], "|" + "---|" * len(head), *lines[1:]])


def _times(found: Comparison) -> str:
    floors = any(share is not None for change in found.times for share in change.of_floor)
    rows = []
    for change in found.times:
        ratio = f"{change.after / change.before:.2f}" if change.before and change.after else ""
        row = [change.name, *(number(seconds * 1e3) if seconds else "" for seconds in change[1:3]), ratio]
        if floors:
            row.append(_moved(*("" if share is None else f"{share:.0%}" for share in change.of_floor)))
        rows.append([*row, change.verdict])
    head = ("", "before, ms", "after, ms", "after / before", *(["floor / time"] if floors else []), "")
    return _table("", head, rows)


def _rates(found: Comparison) -> str:
    rows = [(rate_label(name), *map(number, pair)) for name, pair in found.rates.items()]
    return _table("", ("", "before", "after"), rows)


def _work_row(work: Work) -> tuple[str, ...]:
    mark = f" ({work.mark})" if work.mark else ""
    name = _code(work.kernel) if work.kernel else "**all**"
    flops = _moved(*(number(flops / 1e9) for flops in work.flops))
    return work.phase, work.group, name, _moved(*map(str, work.calls)) + mark, flops


def _kernels(found: Comparison, shown: int) -> str:
    rows = []
    for work in found.kernels[:shown]:
        totals = (number(seconds * 1e3) for seconds in work.seconds)
        each = (number(s / n * 1e6) if n else "" for s, n in zip(work.seconds, work.calls, strict=True))
        shares = (f"{seconds / step:.1%}" for seconds, step in zip(work.seconds, found.step, strict=True))
        cells = (_moved(*pair) for pair in (totals, map(str, work.calls), each, shares))
        rows.append(
            (
                work.phase,
                _code(work.kernel),
                *cells,
                ("+" if work.change > 0 else "") + number(work.change * 1e3),
                work.mark,
            )
        )
    head = ("phase", "kernel", "ms", "calls", "us each", "of the step", "change, ms", "")
    left = f"\n\n{len(found.kernels) - shown} more kernels changed by less." if len(found.kernels) > shown else ""
    title = "Kernels by the change of their time. Times of one traced step tell where to look; they are no verdict."
    return _table(title, head, rows) + left


def _moved(a: str, b: str) -> str:
    return a if a == b else f"{a or '-'} -> {b or '-'}"


def _code(name: str, most: int = 60) -> str:
    """A name in a cell of a table; those of C++ templates are cut."""
    short = name if len(name) <= most else name[: most - 3] + "..."
    return f"`{short.replace('`', '').replace('|', '/')}`"
