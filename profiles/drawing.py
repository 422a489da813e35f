"""What pages of profiles are drawn with: the page itself, tiles, bars by kind of work, chips, small bars in tables.

Everything that comes from a profile is escaped here. Colours are CSS variables, so that a page follows light and dark.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from medground.report.plots import number
from medground.report.style import STYLE
from profiles.groups import GROUPS

# one for each of GROUPS, far from each other in lightness too, so that those who see no red or green tell them apart
_LIGHT = ("#5d338c", "#b23259", "#db6c07", "#f087df", "#b8b62e", "#5b74e6", "#6a4316", "#07a061", "#086f82", "#a3a2ab")
_DARK = ("#ba8bfd", "#ca4a74", "#e67c0c", "#feafc5", "#fdc429", "#2f6ad4", "#815a2d", "#86ea97", "#51d4f2", "#8d9c9b")
_PHASE_TINTS = 6  # of the report's colours s0 to s5


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--k{i}: {colour};" for i, colour in enumerate(colours))


_MORE_STYLE = f"""
:root {{ {_variables(_LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
""" + "".join(
    [f".k{i} {{ background: var(--k{i}); fill: var(--k{i}); }}\n" for i in range(len(GROUPS))]
    + [f".p{i} {{ background: color-mix(in srgb, var(--s{i}) 26%, var(--card)); }}\n" for i in range(_PHASE_TINTS)]
)

_LAYOUT = """
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px;
  margin: 0 0 12px; }
.facts { margin-bottom: 18px; } .facts + .tiles, .progress + .tiles { margin-top: 22px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 10px; font-size: 12.5px; color: var(--muted); }
.chip { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.phase { display: grid; grid-template-columns: 92px minmax(0, 1fr) 190px; gap: 4px 16px; align-items: center;
  padding: 7px 0; border-top: 1px solid var(--line); }
.phase:first-of-type { border-top: 0; }
.phase .name { font-weight: 550; }
.phase .numbers { font-variant-numeric: tabular-nums; font-size: 13.5px; }
.phase .numbers small { display: block; }
.lane { position: relative; height: 15px; margin: 3px 0; }
.lane .bar { display: flex; height: 15px; border-radius: 3px; overflow: hidden; background: var(--grid);
  outline: 1px solid var(--line); outline-offset: -1px; }
.lane .bar i { display: block; }
.lane .dot { position: absolute; bottom: -3px; width: 5px; height: 5px; margin-left: -2.5px; border-radius: 50%;
  background: var(--ink); border: 1px solid var(--card); }
.lane .floor { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--s4); }
.lanes { display: grid; grid-template-columns: 44px minmax(0, 1fr); gap: 0 8px; align-items: center; }
.slower { color: var(--s4); font-weight: 600; } .faster { color: var(--s2); font-weight: 600; }
.new, .gone { color: var(--s0); font-weight: 600; }
.rows td, .rows th { padding: 5px 12px; vertical-align: middle; white-space: nowrap; font-size: 13.5px; }
.rows td:first-child { white-space: normal; min-width: 210px; max-width: 520px; }
.rows code { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  overflow-wrap: anywhere; font: 12.5px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
.rows .number { text-align: right; }
.rows .old { color: var(--muted); }
.share { display: block; width: 90px; height: 8px; background: var(--grid); border-radius: 2px; }
.share i { display: block; height: 8px; background: var(--s0); border-radius: 2px; }
.diff { display: block; position: relative; width: 120px; height: 10px; background: var(--grid); border-radius: 2px; }
.diff i { position: absolute; top: 0; height: 10px; }
.diff::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px;
  border-left: 1px solid var(--muted); }
.diff .up { background: var(--s4); } .diff .down { background: var(--s2); }
@media (max-width: 640px) {
  .phase { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .phase .numbers small { display: inline; margin-left: 8px; }
  .rows td, .rows th { padding: 5px 9px; }
}
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page, which needs nothing else."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_MORE_STYLE}{_LAYOUT}{style}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def ms(seconds: float, unit: str = " ms") -> str:
    """Seconds as milliseconds, for people."""
    return number(seconds * 1e3) + unit


def percent(share: float) -> str:
    """A share of a step."""
    return f"{share:.1%}" if share >= 0.001 or not share else "<0.1%"


def facts(found: Mapping[str, Any]) -> str:
    """Names with their values, in a row."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in found.items())
    return f'<dl class="facts">{items}</dl>'


def tiles(found: Iterable[tuple[str, str, str]]) -> str:
    """Numbers to be seen first: a label, the number as markup, a note."""
    cards = "".join(
        f'<div class="tile"><p class="small">{escape(label)}</p><p class="big">{number}</p>'
        f'<p class="small">{escape(note)}</p></div>'
        for label, number, note in found
    )
    return f'<div class="tiles">{cards}</div>'


def warnings(texts: Iterable[str]) -> str:
    """Doubts, in a frame each."""
    return "".join(f'<p class="progress">{escape(text)}</p>' for text in texts)


def kind(group: str) -> str:
    """The class that colours a kind of work."""
    return f"k{GROUPS.index(group)}"


def tint(phases: Sequence[str], phase: str) -> str:
    """The class that colours a phase's stretch."""
    return f"p{phases.index(phase) % _PHASE_TINTS}"


def chip(group: str) -> str:
    """A kind of work by its colour and name."""
    return f'<i class="chip {kind(group)}"></i>{escape(group)}'


def kernel(name: str, phase: str, group: str) -> str:
    """A kernel, or without a name all of its kind, with its phase. A long name shows whole on hover."""
    shown = f'<code title="{escape(name)}">{escape(name)}</code>' if name else "<b>all of its kind</b>"
    return f"{shown}<small>{escape(phase)} · {chip(group)}</small>"


def key(groups: Iterable[str]) -> str:
    """The kinds of work that occur."""
    found = set(groups)
    return f'<div class="key">{"".join(f"<span>{chip(group)}</span>" for group in GROUPS if group in found)}</div>'


def lane(
    steps: Sequence[float], longest: float, spent: Mapping[str, float], traced: float, floor: float | None = None
) -> str:
    """A bar as long as the median step, shared out by kind of work, with a dot for each step.

    Args:
        steps: seconds of a phase in each timed step.
        longest: seconds of a bar over the whole width.
        spent: seconds of each kind of work in the traced step.
        traced: seconds of the phase in it; what no kernel accounts for stays grey.
        floor: the least seconds that the hardware allows, marked if given.
    """
    whole = max(traced, sum(spent.values()), 1e-12)
    pieces = "".join(
        f'<i class="{kind(group)}" style="width:{spent[group] / whole:.2%}" '
        f'title="{escape(group)}: {ms(spent[group])} of {ms(traced)} in the traced step"></i>'
        for group in GROUPS
        if group in spent
    )
    dots = "".join(f'<i class="dot" style="left:{s / longest:.2%}" title="{ms(s)}"></i>' for s in steps)
    least = f'<i class="floor" style="left:{floor / longest:.2%}" title="floor: {ms(floor)}"></i>' if floor else ""
    bar = f'<div class="bar" style="width:{median(steps) / longest:.2%}">{pieces}</div>'
    return f'<div class="lane">{bar}{least}{dots}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table that scrolls where it is too wide.

    Args:
        head: plain text.
        rows: cells as markup.
        numbers: the columns of numbers.
    """
    right = set(numbers)
    styles = [' class="number"' if i in right else "" for i in range(len(head))]
    cells = "".join(f"<th{style}>{escape(text)}</th>" for style, text in zip(styles, head, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{style}>{cell}</td>" for style, cell in zip(styles, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def share_bar(share: float) -> str:
    """0 to 1 as a small bar."""
    return f'<span class="share"><i style="width:{min(share, 1):.1%}"></i></span>'


def change_bar(change: float, most: float) -> str:
    """A small bar to the right for more, to the left for less; `most` fills half of it."""
    width = min(abs(change) / most, 1) / 2 if most else 0.0
    side = ("up", 0.5) if change > 0 else ("down", 0.5 - width)
    return f'<span class="diff"><i class="{side[0]}" style="left:{side[1]:.1%};width:{width:.1%}"></i></span>'
