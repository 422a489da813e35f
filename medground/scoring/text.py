"""Scores as aligned tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = ("miou", "acc@0.5", "f1@0.5")  # metrics of the tables by category, side and size; --json has all
TITLES = {"by_category": "category", "by_side": "side word", "by_size": "size"}


def render_scores(scores: Mapping[str, Any]) -> str:
    """What `medground score` prints, of the object that `--json` prints."""
    lines = [
        f"{scores['file']}: {scores['n']:,} records, {scores['clusters']:,} {scores['cluster']}s",
        f"95 % intervals: {scores['resamples']:,} bootstrap resamples by {scores['cluster']}",
        "",
        *_metrics(scores["metrics"], scores.get("best_of_k")),
    ]
    for table, title in TITLES.items():
        if scores[table]:
            head = [title, "n", *(text for name in SHOWN for text in (name, "95 % interval"))]
            rows = [_group(name, found) for name, found in scores[table].items()]
            lines += ["", *aligned([head, *rows])]
    small, large = scores["size_limits"]
    if scores["by_size"]:
        lines.append(f"(mean area of a true box: small < {small:.0%} of the image, large >= {large:.0%})")
    lines += _claims(scores.get("file_says", {}))
    return "\n".join([*lines, *(f"note: {note}" for note in scores["notes"])])


def render_comparison(found: Mapping[str, Any]) -> str:
    """What `medground eval compare` prints, of the object that `--json` prints."""
    head = ["metric", "A", "B", "B - A", "95 % interval", "n of A", "n of B"]
    rows = [
        [
            name,
            figure(e["a"]),
            figure(e["b"]),
            figure(e["difference"], "+"),
            _range(e, "+"),
            f"{e['n']:,}",
            f"{e['n_b']:,}",
        ]
        for name, e in found["metrics"].items()
    ]
    return "\n".join(
        [
            f"A: {found['a']}",
            f"B: {found['b']}",
            f"{found['n']:,} records, {found['patients']:,} patients; 95 % intervals: {found['resamples']:,} paired "
            "bootstrap resamples by patient",
            "",
            *aligned([head, *rows]),
            *(f"note: {note}" for note in found["notes"]),
        ]
    )


def figure(value: float | None, sign: str = "") -> str:
    """A number as the tables show it."""
    return "-" if value is None else f"{value:{sign}.3f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right, two blanks between."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _metrics(metrics: Mapping[str, Any], best: Mapping[str, Any] | None) -> list[str]:
    head = ["metric", "mean of k" if best else "value", "95 % interval"]
    rows = [[name, figure(e["value"]), _range(e)] for name, e in metrics.items()]
    if best:
        head += ["best of k", "95 % interval"]
        rows = [[*row, figure(best[row[0]]["value"]), _range(best[row[0]])] for row in rows]
    return aligned([[*head, "n"], *([*row, f"{metrics[row[0]]['n']:,}"] for row in rows)])


def _group(name: str, found: Mapping[str, Any]) -> list[str]:
    cells = [text for metric in SHOWN for text in (figure(found[metric]["value"]), _range(found[metric]))]
    return [name, f"{found['miou']['n']:,}", *cells]


def _range(estimate: Mapping[str, Any], sign: str = "") -> str:
    return "" if estimate["low"] is None else f"[{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _claims(says: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("accuracy", "correct"):
        if name in says:
            lines.append(f"the file's own `{name}`: {says[name]['text']}")
    return ["", *lines] if lines else []
