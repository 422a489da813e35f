"""Charts: well-formed, inside their frame, honest about gaps, and closed to hostile text."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from medground.report.plots import (
    HEIGHT,
    MOST_HOVERS,
    WIDTH,
    Series,
    line_chart,
    number,
    range_bar,
    stacked_chart,
    ticks,
)

NAN, INF = float("nan"), float("inf")


def parsed(figure):
    """The figure as a tree; every coordinate must lie inside the chart."""
    tree = ET.fromstring(figure)
    for element in tree.iter():
        for key, size in (("x", WIDTH), ("x1", WIDTH), ("x2", WIDTH), ("cx", WIDTH), ("y1", HEIGHT), ("cy", HEIGHT)):
            if key in element.attrib:
                assert 0 <= float(element.attrib[key]) <= size
    for text in [*(e.attrib["points"] for e in tree.iter("polygon")), *(e.attrib["d"] for e in tree.iter("path"))]:
        pairs = re.findall(r"(-?[\d.]+)[ ,](-?[\d.]+)", text)
        assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in pairs)
    return tree


def texts(tree):
    return [element.text for element in tree.iter("text")]


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.037), (-3, 17), (1e-7, 9e-7), (0.2, 0.21), (0, 123456), (-1, 0)])
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    gaps = {f"{(b - a):.6e}" for a, b in itertools.pairwise(found)}
    assert len(gaps) == 1 and gaps.pop()[0] in "125"
    margin = 1e-6 * (high - low)
    assert all(low - margin <= tick <= high + margin for tick in found)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.12345, "0.1235"),
        (7e-4, "7e-4"),
        (-2.5e-5, "-2.5e-5"),
        (12345, "12,345"),
        (1234.6, "1,235"),
        (100.0, "100"),
        (1e9, "1e9"),
        (None, "\u2013"),
        (NAN, "\u2013"),
        (INF, "\u2013"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


def test_a_line_spans_the_plot_and_breaks_at_gaps():
    tree = parsed(line_chart("t", [Series("a", [0, 1, 2, 3, 4], [0.0, 1.0, None, NAN, 0.5])]))
    path = tree.find(".//path").attrib["d"]
    assert path.count("M") == 2 and path.count("L") == 1
    (x0, y0), (x1, y1) = re.findall(r"[ML]([\d.]+) ([\d.]+)", path)[:2]
    assert float(x0) < float(x1) and float(y0) > float(y1)  # larger values are higher up
    assert {"0", "1"} <= set(texts(tree)) and "step" in texts(tree)


@pytest.mark.parametrize("y", [[3.0], [0.0], [5.0, 5.0], [-2.0, -2.0], [1e-12, 1e-12], [0.0, 0.0, 0.0]])
def test_flat_and_single_values_have_a_place(y):
    parsed(line_chart("t", [Series("a", list(range(len(y))), y, dots=True)], floor=0.0))


def test_nothing_recorded_is_said():
    for chart in (line_chart, stacked_chart):
        figure = chart("loss", [Series("a", [1, 2], [None, NAN]), Series("b", [], [])])
        assert "not recorded" in figure and "<svg" not in figure


def test_bands_widen_the_axis():
    tree = parsed(line_chart("t", [Series("a", [0, 1], [0.5, 0.5], low=[0.1, None], high=[0.9, 0.8], dots=True)]))
    assert tree.find(".//polygon") is not None and len(tree.findall(".//circle")) == 2
    assert "0.8" in texts(tree)


def test_smoothing_draws_both_lines():
    y = [0.0, 1.0] * 20
    tree = parsed(line_chart("t", [Series("a", list(range(40)), y, smooth=10)]))
    raw, smooth = (
        [float(v) for v in re.findall(r"[ML][\d.]+ ([\d.]+)", p.attrib["d"])] for p in tree.findall(".//path")
    )
    assert max(smooth) - min(smooth) < 0.4 * (max(raw) - min(raw))


def test_long_runs_are_averaged_and_say_so():
    count = 5000
    figure = line_chart("t", [Series("a", list(range(count)), [i % 2 for i in range(count)])])
    tree = parsed(figure)
    assert "each point is the mean of 17 samples" in figure
    assert len(re.findall("[ML]", tree.find(".//path").attrib["d"])) == 295
    assert len(tree.findall(".//g")) == MOST_HOVERS
    assert len(figure) < 60_000


def test_hovering_names_every_series():
    tree = parsed(line_chart("t", [Series("a", [1, 2], [0.1, 0.2]), Series("b", [2, 3], [7.0, None])]))
    titles = [element.text for element in tree.iter("title")]
    assert titles == ["step 1\na: 0.1", "step 2\na: 0.2\nb: 7"]


def test_stacked_areas_end_at_the_sum():
    parts = [Series("a", [1, 2], [1.0, 2.0]), Series("b", [1, 2], [3.0, None]), Series("c", [1, 2], [None, None])]
    tree = parsed(stacked_chart("t", parts))
    areas = tree.findall(".//polygon")
    assert len(areas) == 2
    first, second = ([float(p.split(",")[1]) for p in a.attrib["points"].split()] for a in areas)
    assert second[0] < first[0] and second[1] == first[1]  # 1 + 3 above 1; 2 + nothing is 2
    assert second[2:] == first[1::-1]  # the second area stands on the first


def test_text_stays_text():
    hostile = "</title></svg><script>alert(1)</script>&\"'"
    tree = parsed(line_chart(hostile, [Series(hostile, [1], [1.0]), Series("b", [1], [2.0])], hostile))
    assert tree.find(".//script") is None
    assert tree.find("figcaption").text == hostile
    assert tree.find(".//svg").attrib["aria-label"] == hostile
    assert "<script" not in range_bar([(0.5, 0.4, 0.6, 0)], hostile)


def test_range_bars_stay_on_their_track():
    tree = ET.fromstring(range_bar([(0.0, -0.2, 0.1, 0), (1.0, 0.9, 1.3, 1)], "x"))
    for bar in tree.findall("rect"):
        left, width = float(bar.attrib["x"]), float(bar.attrib["width"])
        assert left >= 0 and left + width <= 100
    dots = [float(dot.attrib["cx"]) for dot in tree.findall("circle")]
    assert dots == [2.6, 97.4]
