"""Pictures over the time of a traced step, as inline SVG: phases and kinds of work, and memory.

An SVG here is stretched to its place; text stands beside it as HTML, so that it keeps its size on a phone.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from medground.report.plots import number, ticks
from profiles.drawing import key, kind, ms, tint
from profiles.groups import GROUPS

STYLE = """
.plot { display: grid; grid-template-columns: 46px minmax(0, 1fr); margin: 0 0 12px; padding: 12px 20px 10px 10px; }
.plot figcaption { grid-column: 1 / -1; padding-bottom: 8px; display: flex; flex-wrap: wrap; gap: 2px 14px; }
.plot figcaption .key { margin: 0; font-weight: 400; }
.plot .legend { font-weight: 400; }
.plot > * { grid-column: 2; }
.strip { position: relative; height: 22px; margin-bottom: 5px; }
.strip i { position: absolute; top: 0; height: 22px; line-height: 22px; font-style: normal; font-size: 11.5px;
  text-align: center; overflow: hidden; border-left: 1px solid var(--card); color: var(--ink); }
.field { position: relative; }
.field svg { display: block; width: 100%; height: 170px; overflow: visible; background: var(--wash); }
.field line { vector-effect: non-scaling-stroke; }
.ups { position: absolute; right: calc(100% + 6px); top: 0; bottom: 0; width: 44px; }
.ups span { position: absolute; right: 0; transform: translateY(50%); }
.along { position: relative; height: 20px; border-top: 1px solid var(--muted); }
.along span { position: absolute; top: 3px; transform: translateX(-50%); white-space: nowrap; }
.ups span, .along span { font-size: 11px; color: var(--muted); font-variant-numeric: tabular-nums; }
.curve { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.under { fill: currentColor; opacity: 0.13; stroke: none; }
"""
_WIDTH, _HEIGHT = 1000, 200  # of the drawing, before it is stretched


def time_line(title: str, found: Mapping[str, Any], whole: float) -> str:
    """A strip of phases above stacked areas of the kinds of work.

    Args:
        title: plain text.
        found: a profile's `traced.timeline`.
        whole: seconds of the whole width.
    """
    step = found["phases"][-1][2]
    bins = _stack(found["work"])
    count = len(next(iter(bins.values()), ()))
    if not count:
        return missing(title, "no kernels")
    part, tallest = step / count, max(1.0, *(level / (step / count) for level in bins[next(reversed(bins))]))
    width = step / whole * _WIDTH / count
    areas = []
    for group in reversed(bins):  # the highest first: each next one covers what lies under it
        path = [f"M0 {_HEIGHT}"]
        for index, level in enumerate(bins[group], 1):
            path.append(f"V{_HEIGHT * (1 - level / part / tallest):.1f}H{index * width:.2f}")
        areas.append(f'<path class="{kind(group)}" d="{"".join(path)}V{_HEIGHT}Z"/>')
    drawn = _grid(ticks(0, tallest, 4), tallest) + "".join(areas) + _hovers(found, part, width)
    names = list(dict.fromkeys(name for name, _, _ in found["phases"]))
    strip = "".join(
        f'<i class="{tint(names, name)}" style="left:{a / whole:.3%};width:{(b - a) / whole:.3%}" '
        f'title="{escape(name)}: {ms(b - a)}, from {ms(a)} to {ms(b)}">&#8203;{escape(name)}</i>'
        for name, a, b in found["phases"]
    )
    ups = [(tick / tallest, f"{tick:.0%}") for tick in ticks(0, tallest, 4)]
    return _figure(escape(title) + key(bins), f'<div class="strip">{strip}</div>', drawn, ups, whole, title)


def _stack(work: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each kind's upper edge on top of those before it, in the order of GROUPS."""
    levels: dict[str, list[float]] = {}
    below: Sequence[float] = ()
    for group in (group for group in GROUPS if group in work):
        below = [a + b for a, b in zip(below or [0.0] * len(work[group]), work[group], strict=True)]
        levels[group] = list(below)
    return levels


def _hovers(found: Mapping[str, Any], part: float, width: float) -> str:
    """Invisible strips, one for each bin, whose tooltip says what ran there."""
    drawn = []
    for index, spent in enumerate(zip(*found["work"].values(), strict=True)):
        shares = {group: seconds / part for group, seconds in zip(found["work"], spent, strict=True) if seconds}
        told = [f"{g} {s:.0%}" for g, s in sorted(shares.items(), key=lambda item: -item[1]) if s >= 0.005]
        text = escape("\n".join([ms(index * part), *told]))
        drawn.append(
            f'<g class="hover"><title>{text}</title>'
            f'<rect x="{index * width:.2f}" y="0" width="{width:.2f}" height="{_HEIGHT}"/></g>'
        )
    return "".join(drawn)


def memory(title: str, curves: Iterable[tuple[str, str, Sequence[Sequence[float]]]]) -> str:
    """Memory over the time of one or more steps, over one another.

    Args:
        title: plain text.
        curves: name, class of its colour, `traced.memory` of a profile.
    """
    curves = list(curves)
    whole = max(curve[-1][0] for _, _, curve in curves)
    most = max(held for _, _, curve in curves for _, held in curve) / 1e6 * 1.05 or 1.0
    lines = []
    for _, colour, curve in curves:
        points = " ".join(f"{at / whole * _WIDTH:.1f},{_HEIGHT * (1 - held / 1e6 / most):.1f}" for at, held in curve)
        if len(curves) == 1:
            last = curve[-1][0] / whole * _WIDTH
            lines.append(f'<polygon class="under {colour}" points="0,{_HEIGHT} {points} {last:.1f},{_HEIGHT}"/>')
        lines.append(f'<polyline class="curve {colour}" points="{points}"/>')
    names = "".join(f'<li><i class="{colour}"></i>{escape(name)}</li>' for name, colour, _ in curves)
    legend = f'<ul class="legend">{names}</ul>' if len(curves) > 1 else ""
    ups = [(tick / most, number(tick)) for tick in ticks(0, most, 4)]
    drawn = _grid(ticks(0, most, 4), most) + "".join(lines)
    return _figure(escape(title) + legend, "", drawn, ups, whole, title)


def _grid(at: Iterable[float], most: float) -> str:
    heights = (_HEIGHT * (1 - tick / most) for tick in at)
    return "".join(f'<line class="grid" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>' for y in heights)


def _figure(head: str, above: str, drawn: str, ups: Sequence[tuple[float, str]], whole: float, title: str) -> str:
    """Axes around a drawing: shares of its height with their labels, and milliseconds along it."""
    left = "".join(f'<span style="bottom:{at:.1%}">{escape(text)}</span>' for at, text in ups)
    along = "".join(
        f'<span style="left:{tick / (whole * 1e3):.2%}">{number(tick)}{" ms" if not tick else ""}</span>'
        for tick in ticks(0, whole * 1e3, 6)
    )
    return (
        f'<figure class="chart plot"><figcaption>{head}</figcaption>{above}<div class="field">'
        f'<div class="ups">{left}</div><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{drawn}</svg></div><div class="along">{along}</div></figure>'
    )


def missing(title: str, why: str) -> str:
    """In the place of a picture for which there is nothing."""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="nothing">{escape(why)}</p></figure>'
    )
