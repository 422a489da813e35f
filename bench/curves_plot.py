"""The cost curves of `bench.curves` as one picture.

    python -m bench.curves_plot FILE.json FILE.png      draw what was measured before

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart; marks differ as well.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

INK, GREY, ROWS = "#222222", "#8a8a8a", "#D55E00"
MARKS = {
    "update": ("#0072B2", "o"), "score": ("#009E73", "s"), "prefill": ("#E69F00", "^"), "decode": ("#CC79A7", "D")
}  # fmt: skip
NAMES = {
    "G": "completions of a prompt, G",
    "P": "prompt tokens, P",
    "C": "tokens of a completion, C",
    "V": "vocabulary, V",
}
STYLE = {
    "font.size": 9, "axes.edgecolor": GREY, "axes.labelcolor": INK, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.6, "axes.axisbelow": True, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "legend.fontsize": 8, "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip
COLUMNS, WIDTH, HEIGHT, DPI = 3, 10.0, 2.9, 120


def draw(found: dict[str, Any], path: Path) -> None:
    """A panel for the update's cost per token, one for each axis, one for ranks, as far as they were measured."""
    panels: list[Callable[[Axes], None]] = []
    if found["per_token"]:
        panels.append(partial(_per_token, found=found["per_token"]))
    panels += [partial(_phases, axis=axis, curve=curve) for axis, curve in found["axes"].items()]
    if found["ranks"]:
        panels.append(partial(_ranks, found=found["ranks"]))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, places = plt.subplots(rows, columns, figsize=(WIDTH, HEIGHT * rows + 0.7), squeeze=False)
        for panel, axes in zip(panels, places.flat, strict=False):
            panel(axes)
        for axes in places.flat[len(panels) :]:
            axes.remove()
        _write_above(figure, found)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _write_above(figure: Figure, found: dict[str, Any]) -> None:
    """Title, what was measured, and the phases' marks."""
    sizes, about = found["sizes"], found["environment"]
    base = f"P {sizes['P']}, G {sizes['G']}, C {sizes['C']}, V {sizes['architecture']['V']}"
    title = "Cost of one group's GRPO step: measured (marks, least to most) and theory (lines)"
    subtitle = f"Qwen2.5-VL, {sizes['model']}, random weights; {base} where not varied; {about['device']}"
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.1 / height, title, va="top", fontsize=11, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.36 / height, subtitle, va="top", fontsize=8.5, color=INK)
    handles = [
        Line2D([], [], color=color, marker=mark, ms=5, lw=1.3, label=name) for name, (color, mark) in MARKS.items()
    ]
    figure.legend(
        handles=handles, loc="upper right", ncols=len(handles), bbox_to_anchor=(0.995, 1 - 0.28 / height), borderpad=0
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / height), h_pad=1.2, w_pad=1.0)


def _per_token(axes: Axes, found: list[dict[str, Any]]) -> None:
    """Packed, with the band in which it is to lie, and padded rows."""
    G, color = [at["G"] for at in found], MARKS["update"][0]
    predicted = [at["predicted"] * 1e6 for at in found]
    axes.fill_between(G, [0.9 * y for y in predicted], [1.1 * y for y in predicted], color=color, alpha=0.18, lw=0)
    axes.plot(G, predicted, color=color, lw=1.3)
    _marks(
        axes, G, [[s * 1e6 for s in at["samples"]] for at in found], [at["measured"] * 1e6 for at in found], "update"
    )
    rows = [at["rows_predicted"] * 1e6 for at in found]
    axes.plot(G, rows, color=ROWS, lw=1.3, ls="--")
    measured = [(at["G"], at["rows_measured"] * 1e6) for at in found if at["rows_measured"] is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), "v", color=ROWS, ms=5)
    axes.set(title="Update: µs per completion token", xlabel=NAMES["G"], xscale="log", yscale="log")
    axes.set_ylim(predicted[-1] / 1.6, max(*rows, *(y for _, y in measured)) * 1.6)
    axes.annotate("G padded rows", (G[-1], rows[-1]), (0, -14), textcoords="offset points", ha="right", color=ROWS)
    middle = len(G) // 2 - 1
    label = "packed: one prompt,\nG completions (±10 %)"
    axes.annotate(
        label,
        (G[middle], predicted[middle]),
        (-14, -34),
        textcoords="offset points",
        ha="center",
        va="top",
        color=color,
    )
    _ticks(axes, G)


def _phases(axes: Axes, axis: str, curve: dict[str, Any]) -> None:
    """Seconds of every phase."""
    values = [point["value"] for point in curve["points"]]
    for phase, (color, _) in MARKS.items():
        judged = curve["phases"][phase]
        axes.plot(values, judged["fitted"], color=color, lw=1.3)
        _marks(axes, values, judged["samples"], judged["seconds"], phase)
    axes.set(title=f"Seconds over {axis}", xlabel=NAMES[axis], xscale="log", yscale="log")
    _ticks(axes, values)


def _ranks(axes: Axes, found: dict[str, Any]) -> None:
    """Seconds of an update beside those of one rank divided, and beside theory."""
    points = found["points"]
    ranks, color = [at["ranks"] for at in points], MARKS["update"][0]
    axes.plot(ranks, [points[0]["seconds"] / n for n in ranks], color=GREY, lw=1.1, ls=":", label="divided by ranks")
    axes.plot(ranks, [at["predicted"] for at in points], color=color, lw=1.3, label="with communication")
    _marks(axes, ranks, [at["samples"] for at in points], [at["seconds"] for at in points], "update")
    axes.set(
        title=f"Update of {found['groups']} groups: seconds", xlabel="ranks (FSDP2, one thread each)", ylim=(0, None)
    )
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.set_xlim(ranks[0] - 0.3, ranks[-1] + 0.3)
    axes.legend(loc="lower left")


def _marks(axes: Axes, x: list[int], samples: list[list[float]], medians: list[float], phase: str) -> None:
    """Medians, with bars from the least to the most."""
    color, mark = MARKS[phase]
    below = [middle - min(each) for middle, each in zip(medians, samples, strict=True)]
    above = [max(each) - middle for middle, each in zip(medians, samples, strict=True)]
    axes.errorbar(x, medians, [below, above], color=color, fmt=mark, ms=4.5, lw=1, capsize=2)


def _ticks(axes: Axes, values: list[int]) -> None:
    """The values themselves below, plain numbers at the side."""
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def main() -> None:
    """Draw a JSON file."""
    parser = argparse.ArgumentParser(description="Draw the cost curves that `bench.curves --json` wrote.")
    parser.add_argument("json", type=Path, metavar="FILE.json")
    parser.add_argument("png", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.png)


if __name__ == "__main__":
    main()
