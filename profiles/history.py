"""The kept records, by device and workload: a table, and a picture of tokens per second over commits.

python -m profiles.history
python -m profiles.history --png history.png
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

from medground.report.plots import number
from profiles.stored import FOLDER, load_history
from profiles.tables import rate_label

Histories = dict[tuple[str, str], list[dict[str, Any]]]
RATE = "tokens_per_second"


def histories(folder: Path = FOLDER) -> Histories:
    """(device, workload) -> its records, the oldest first.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        if entries := load_history(path):
            found[entries[0]["environment"]["device"], path.stem] = entries
    return found


def render(found: Histories) -> str:
    """A table for each, as Markdown."""
    parts = []
    for (device, workload), entries in found.items():
        rates = list(dict.fromkeys(rate for entry in entries for rate in entry["rates"]))
        head = ["date", "commit", "step, ms", *map(rate_label, rates)]
        rows = [head, ["---"] * len(head)]
        for entry in entries:
            cells = (entry["rates"].get(rate) for rate in rates)
            step = number(median(entry["step"]) * 1e3)
            rows.append([entry["environment"]["date"][:10], _commit(entry), step, *map(number, cells)])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([f"**{workload}** on {device}", "", *lines]))
    return "\n\n".join(parts)


def _commit(entry: dict[str, Any]) -> str:
    about = entry["environment"]
    return (about.get("commit") or "unknown")[:8] + ("+" if about.get("dirty") else "")


def draw(found: Histories, path: Path) -> None:
    """Tokens per second over commits, a plot for each: medians on a line, each timed step a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 * len(found)), dpi=140, layout="constrained")
    places = figure.subplots(len(found), squeeze=False)[:, 0]
    for axes, ((device, workload), entries) in zip(places, found.items(), strict=True):
        for at, entry in enumerate(entries):
            tokens = entry["rates"][RATE] * median(entry["step"])  # the same number in each step
            rates = [tokens / seconds for seconds in entry["step"]]
            axes.plot([at] * len(rates), rates, ".", color="#2468d8", alpha=0.35, markeredgewidth=0)
        axes.plot([entry["rates"][RATE] for entry in entries], "o-", color="#2468d8", linewidth=1.6)
        labels = [f"{_commit(entry)}\n{entry['environment']['date'][:10]}" for entry in entries]
        axes.set_xticks(range(len(entries)), labels, rotation=90 if len(entries) > 9 else 0, fontsize=8)
        axes.set(title=f"{workload} on {device}", ylabel="tokens per second", xlim=(-0.5, len(entries) - 0.5))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Show the kept records.")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw tokens per second over commits")
    args = parser.parse_args()
    try:
        found = histories()
    except ValueError as error:
        sys.exit(f"profiles.history: {error}")
    if not found:
        sys.exit("profiles.history: no record was kept yet: python -m profiles.record WORKLOAD --out DIR --keep")
    print(render(found))
    if args.png:
        draw(found, args.png)


if __name__ == "__main__":
    main()
