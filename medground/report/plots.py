"""Charts as inline SVG: lines with bands, stacked areas, ranges in a table cell. Plain text, no script, no library.

Colours are CSS variables of the page (`--s0` .. `--s5`, `--ink`, `--faint`, `--grid`), so that a chart follows light
and dark. A chart is as wide as its place; hovering shows the values of the nearest step.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34  # margins around the plotted area
MOST_POINTS = 300  # of a drawn line: more than this many samples are averaged in equal runs
MOST_HOVERS = 120
DASH = "\u2013"  # in place of a number that is not known, and between two

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: as the legend says it.
        x: positions, rising.
        y: one value per position; None or a number that is not finite leaves a gap.
        color: index of the CSS variable `--s<color>`.
        smooth: samples of a moving average, drawn over the faint line itself; 0: the line alone.
        low: lower bound of a band, as long as `y`, or empty.
        high: its upper bound.
        dots: mark every sample.
    """

    name: str
    x: Sequence[float]
    y: Values
    color: int = 0
    smooth: int = 0
    low: Values = ()
    high: Values = ()
    dots: bool = False


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", floor: float | None = None) -> str:
    """A chart of lines, with axes, a legend and values on hover.

    Args:
        title: heading, plain text.
        series: lines over the same kind of x; those without a finite value are left out.
        x_label: what x is.
        floor: the y axis reaches down to this at least (0 for counts and fractions); None: the data alone decide.

    Returns:
        A `<figure>`; it says "not recorded" when no series has a value.
    """
    shown = [_thinned(s) for s in series if any(_finite(v) for v in s.y)]
    if not shown:
        return _figure(title, "", '<p class="nothing">not recorded</p>')
    values = [v for s in shown for v in (*s.y, *s.low, *s.high) if _finite(v)]
    axes = _Axes.around([x for s in shown for x in s.x], values + ([] if floor is None else [floor]))
    body = [axes.grid(x_label)]
    for s in shown:
        body.append(_band(s, axes))
        if s.smooth > 1:
            body.append(_line(s.x, s.y, axes, f"s{s.color} raw"))
            body.append(_line(s.x, _smoothed(s.y, s.smooth), axes, f"s{s.color}"))
        else:
            body.append(_line(s.x, s.y, axes, f"s{s.color}"))
        if s.dots:
            body.append(_dots(s, axes))
    body.append(_hovers(shown, axes, x_label))
    return _figure(title, _legend(shown) if len(shown) > 1 else "", _svg(title, body) + _averaging_note(series))


def stacked_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """Areas on top of each other, for the parts of a whole; the first series is the lowest.

    Args:
        title: heading, plain text.
        series: parts at the same positions, >= 0; a missing value counts as 0.
        x_label: what x is.

    Returns:
        A `<figure>`, as `line_chart`.
    """
    shown = [_thinned(s) for s in series if any(_finite(v) for v in s.y)]
    if not shown:
        return _figure(title, "", '<p class="nothing">not recorded</p>')
    x = shown[0].x
    levels = [[0.0] * len(x)]
    for s in shown:
        levels.append([below + (v if _finite(v) else 0.0) for below, v in zip(levels[-1], s.y, strict=True)])
    axes = _Axes.around(x, [0.0, *levels[-1]])
    body = [axes.grid(x_label)]
    for s, low, high in zip(shown, levels, levels[1:], strict=False):
        edge = [*zip(x, high, strict=True), *reversed([*zip(x, low, strict=True)])]
        points = " ".join(f"{axes.x(a):.1f},{axes.y(b):.1f}" for a, b in edge)
        body.append(f'<polygon class="area s{s.color}" points="{points}"/>')
    body.append(_hovers(shown, axes, x_label))
    return _figure(title, _legend(shown), _svg(title, body) + _averaging_note(series))


def range_bar(estimates: Sequence[tuple[float, float, float, int]], label: str) -> str:
    """A strip from 0 to 1 with a bar for each (value, low, high, color): an interval and its dot."""
    height = 7 * len(estimates) + 3
    parts = []
    for i, (value, low, high, color) in enumerate(estimates):
        y, a, b, at = 5 + 7 * i, *(100 * min(max(v, 0.0), 1.0) for v in (low, high, value))
        parts.append(f'<line class="track" x1="0" x2="100" y1="{y}" y2="{y}"/>')
        parts.append(f'<rect class="s{color}" x="{a:.1f}" y="{y - 2}" width="{max(b - a, 1):.1f}" height="4" rx="2"/>')
        parts.append(f'<circle class="s{color}" cx="{min(max(at, 2.6), 97.4):.1f}" cy="{y}" r="2.6"/>')
    drawn = "".join(parts)
    return f'<svg class="range" viewBox="0 0 100 {height}" role="img" aria-label="{escape(label)}">{drawn}</svg>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) that lie within low..high, low < high."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: a few digits, thousands apart, powers of ten only where it is very small or large."""
    if not _finite(value):
        return DASH
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class _Axes:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> "_Axes":
        x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
        if x_low == x_high:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        if y_high - y_low <= 1e-9 * max(abs(y_low), abs(y_high)):
            room = abs(y_high) / 2 or 0.5
            y_low, y_high = y_low - (0 if y_low == 0 else room), y_high + room
        # the axis ends on a round number
        step = ticks(y_low, y_high)[1] - ticks(y_low, y_high)[0] if len(ticks(y_low, y_high)) > 1 else y_high - y_low
        return cls(x_low, x_high, math.floor(y_low / step + 1e-9) * step, math.ceil(y_high / step - 1e-9) * step)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str) -> str:
        parts, bottom = [], HEIGHT - BOTTOM
        for tick in ticks(self.y_low, self.y_high):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick, 3)}</text>')
        for tick in ticks(self.x_low, self.x_high, 6):
            x = self.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{number(tick, 5)}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)


def _finite(value: float | None) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _runs(count: int) -> int:
    return -(-count // MOST_POINTS)


def _thinned(s: Series) -> Series:
    size = _runs(len(s.x))
    if size == 1:
        return s

    def averaged(values: Values) -> list[float | None]:
        return [_mean(values[i : i + size]) for i in range(0, len(values), size)]

    x = [v for v in averaged(s.x) if v is not None]
    smooth = max(2, s.smooth // size) if s.smooth else 0
    return Series(s.name, x, averaged(s.y), s.color, smooth, averaged(s.low), averaged(s.high), s.dots)


def _averaging_note(series: Sequence[Series]) -> str:
    size = max(_runs(len(s.x)) for s in series)
    return f'<p class="note">each point is the mean of {size} samples</p>' if size > 1 else ""


def _mean(values: Values) -> float | None:
    kept = [v for v in values if _finite(v)]
    return sum(kept) / len(kept) if kept else None


def _smoothed(values: Values, window: int) -> list[float | None]:
    half = window // 2
    return [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _line(xs: Sequence[float], ys: Values, axes: _Axes, style: str) -> str:
    path, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if _finite(y):
            path.append(f"{'L' if pen_down else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}")
            pen_down = True
        else:
            pen_down = False
    return f'<path class="line {style}" d="{"".join(path)}"/>'


def _band(s: Series, axes: _Axes) -> str:
    edges = [(x, a, b) for x, a, b in zip(s.x, s.low, s.high, strict=False) if _finite(a) and _finite(b)]
    if not edges:
        return ""
    outline = [(x, b) for x, _, b in edges] + [(x, a) for x, a, _ in reversed(edges)]
    points = " ".join(f"{axes.x(x):.1f},{axes.y(v):.1f}" for x, v in outline)
    return f'<polygon class="band s{s.color}" points="{points}"/>'


def _dots(s: Series, axes: _Axes) -> str:
    at = [(axes.x(x), axes.y(y)) for x, y in zip(s.x, s.y, strict=True) if _finite(y)]
    return "".join(f'<circle class="dot s{s.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in at)


def _hovers(shown: Sequence[Series], axes: _Axes, x_label: str) -> str:
    """Invisible strips, one per position, whose tooltip names every line's value there."""
    table: dict[float, list[str]] = {}
    for s in shown:
        for x, y in zip(s.x, s.y, strict=True):
            if _finite(y):
                table.setdefault(x, []).append(f"{s.name}: {number(y)}")
    xs = sorted(table)
    xs = [xs[i * len(xs) // min(len(xs), MOST_HOVERS)] for i in range(min(len(xs), MOST_HOVERS))]
    edges = [LEFT, *((axes.x(a) + axes.x(b)) / 2 for a, b in itertools.pairwise(xs)), WIDTH - RIGHT]
    parts = []
    for x, a, b in zip(xs, edges, edges[1:], strict=False):
        text = escape("\n".join([f"{x_label} {number(x, 5)}", *table[x]]))
        strip = f'<rect x="{a:.1f}" y="{TOP}" width="{b - a:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
        mark = f'<line x1="{axes.x(x):.1f}" x2="{axes.x(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        parts.append(f'<g class="hover"><title>{text}</title>{strip}{mark}</g>')
    return "".join(parts)


def _legend(shown: Sequence[Series]) -> str:
    keys = "".join(f'<li><i class="s{s.color}"></i>{escape(s.name)}</li>' for s in shown)
    return f'<ul class="legend">{keys}</ul>'


def _svg(title: str, body: Sequence[str]) -> str:
    drawn = "".join(body)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawn}</svg>'


def _figure(title: str, legend: str, body: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}{body}</figure>'
