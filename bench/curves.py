"""Cost curves of a GRPO step: the phases of one group's step over G, P, C and V, and an update over ranks.

    python -m bench.curves --png docs/images/cost_curves.png      a small model on a CPU
    python -m bench.curves --axes G --rounds 3                    one axis of it
    python -m bench.curves --device cuda --model 3b               the shapes of Qwen2.5-VL-3B in bfloat16

What is measured is in `bench.curves_points`, theory in `bench.curves_fit`, ranks in `bench.curves_ranks`; operations
are those of `medground.costs`. Before any clock starts, packed groups and padded rows are seen to agree.

The main curve is what a completion token costs in the update. A group has the operations of one prompt and of G
completions, so that cost falls with G. Prediction: operations at one rate for all G, fitted. Padded rows have G
prompts, and at that rate a token of theirs would cost the same for every G.
"""

import argparse
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.bars import Bar
from bench.curves_fit import TOLERANCE, judge, one_rate, steady
from bench.curves_points import AXES, LARGE_V, PHASES, make_points, visit
from bench.curves_ranks import measure_ranks
from bench.packed import write
from bench.packed_sides import check, make_case
from bench.random_model import ARCHITECTURES, SIZES
from bench.table import environment

CLOSE = 0.10
"""Most that an update's cost per completion token may be off what packing predicts, on a CPU."""


def measure(name: str, device: torch.device, axes: dict[str, tuple[int, ...]], ranks: bool, rounds: int) -> dict:
    """Everything, as JSON has it.

    Args:
        name: of the model.
        device: where it runs.
        axes: values of each, rising.
        ranks: whether an update on several ranks is measured as well.
        rounds: samples of every point.
    """
    agreement = check(make_case(name, device, prompts=1))
    curves = {axis: _curve(name, device, axis, values, rounds) for axis, values in axes.items()}
    found = {
        "axes": curves,
        "per_token": per_token(curves["G"]["points"]) if "G" in curves else None,
        "ranks": measure_ranks(name, rounds) if ranks else None,
        "agreement": agreement._asdict(),
        "sizes": {"model": name, "rounds": rounds, "architecture": asdict(ARCHITECTURES[name])}
        | SIZES[name]._asdict()
        | {"image_tokens": SIZES[name].image_tokens},
        "environment": environment() | {"on": device.type},
    }
    return found | {"bars": [bar.plain() for bar in bars(found)]}


def _curve(name: str, device: torch.device, axis: str, values: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """An axis: its points, and of each phase the fit and the growth."""
    points = make_points(name, device, axis, values)
    visit(points, rounds)
    plain = [point.plain() for point in points]
    return {"points": plain, "phases": {phase: judge(plain, phase) for phase in PHASES}}


def per_token(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of an update for each completion token over G: ours and rows', measured and predicted at our rate."""
    samples = steady([point["seconds"]["update"] for point in points]).tolist()
    seconds = [median(each) for each in samples]
    rate = one_rate(seconds, [point["operations"]["update"] for point in points])
    found = []
    for point, each, ours in zip(points, samples, seconds, strict=True):
        tokens, operations = point["size"]["G"] * point["size"]["C"], point["operations"]
        rows = point["seconds"].get("rows")
        predicted = operations["update"] / rate
        found.append(
            {
                "G": point["value"],
                "measured": ours / tokens,
                "samples": [sample / tokens for sample in each],
                "predicted": predicted / tokens,
                "ratio": ours / predicted,
                "rows_measured": median(rows) / tokens if rows else None,
                "rows_predicted": operations["rows"] / rate / tokens,
            }
        )
    return found


def bars(found: dict[str, Any]) -> list[Bar]:
    """That nothing grows faster than theory and, on a CPU, that an update's cost falls as packing predicts."""
    growths = {
        f"{phase} over {axis}": judged["growth"]
        for axis, curve in found["axes"].items()
        for phase, judged in curve["phases"].items()
    }
    bars = []
    if growths:
        name, worst = max(growths.items(), key=lambda item: item[1]["low"] - item[1]["theory"])
        faster = [name for name, growth in growths.items() if growth["is_faster"]]
        measured = f"{worst['measured']:.2f} (from {worst['low']:.2f}), theory {worst['theory']:.2f}: {name}"
        wanted = f"no exponent more than {TOLERANCE} above theory's"
        bars.append(Bar("growth", wanted, ", ".join(faster) or measured, not faster))
    if found["per_token"] and found["environment"]["on"] == "cpu":
        worst = max(found["per_token"], key=lambda at: abs(at["ratio"] - 1))
        wanted = f"within {CLOSE:.0%} of what packing predicts for every G"
        measured = f"{worst['ratio'] - 1:+.1%} at G {worst['G']}"
        bars.append(Bar("update, a completion token", wanted, measured, abs(worst["ratio"] - 1) <= CLOSE))
    return bars


def render(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes, about = found["sizes"], found["environment"]
    lines = [
        f"One group's step, Qwen2.5-VL of random weights, {sizes['model']}: P {sizes['P']}, {sizes['image_tokens']} of "
        f"them the image's, G {sizes['G']}, C {sizes['C']}, V {sizes['architecture']['V']}, but for what varies. "
        f"{about['device']}, torch {about['packages']['torch']}. Medians of {sizes['rounds']} rounds."
    ]
    if found["axes"]:
        lines += ["", *_growth_table(found["axes"])]
    if found["per_token"]:
        lines += ["", *_token_table(found["per_token"])]
    if found["ranks"]:
        lines += ["", *_rank_table(found["ranks"])]
    return "\n".join(lines)


def _growth_table(axes: dict[str, Any]) -> list[str]:
    lines = [
        "| over | phase | ms | exponent (95 %) | theory | faster? | G operations/s | overhead, ms | farthest off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for axis, curve in axes.items():
        values = [point["value"] for point in curve["points"]]
        for phase, judged in curve["phases"].items():
            growth, worst, seconds = judged["growth"], judged["worst"], judged["seconds"]
            rate = "-" if judged["rate"] is None else f"{judged['rate'] / 1e9:.3g}"
            lines.append(
                f"| {axis} {values[0]} to {values[-1]} | {phase} | {seconds[0] * 1e3:.3g} to {seconds[-1] * 1e3:.3g} "
                f"| {growth['measured']:.2f} ({growth['low']:.2f} to {growth['high']:.2f}) | {growth['theory']:.2f} "
                f"| {'**yes**' if growth['is_faster'] else 'no'} | {rate} | {judged['overhead'] * 1e3:.3g} "
                f"| {worst['ratio']:.2f} at {worst['value']} |"
            )
    return lines


def _token_table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| G | update, us a completion token | predicted | measured / predicted | padded rows | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for at in found:
        rows = "-" if at["rows_measured"] is None else f"{at['rows_measured'] * 1e6:.4g}"
        lines.append(
            f"| {at['G']} | {at['measured'] * 1e6:.4g} | {at['predicted'] * 1e6:.4g} | {at['ratio']:.3f} | {rows} "
            f"| {at['rows_predicted'] * 1e6:.4g} |"
        )
    return lines


def _rank_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"An update of {found['groups']} groups under FSDP2, gathering {found['rate'] / 1e6:.4g} MB/s:",
        "",
        "| ranks | s | speed-up | efficiency | MB received | theory, s |",
        "|---|---|---|---|---|---|",
    ]
    for at in found["points"]:
        gain = at["speedup"]
        lines.append(
            f"| {at['ranks']} | {at['seconds']:.3g} | {gain['median']:.2f} ({gain['least']:.2f}-{gain['most']:.2f}) "
            f"| {at['efficiency']:.0%} | {at['received'] / 1e6:.4g} | {at['predicted']:.3g} |"
        )
    return lines


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description="Cost curves of a GRPO step beside theory.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default=None, help="small on a CPU, 3b on CUDA")
    parser.add_argument("--axes", nargs="+", choices=(*AXES, "ranks"), default=None, help="all; ranks on a CPU alone")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--png", type=Path, default=None, metavar="FILE", help="needs matplotlib")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    asked = args.axes or [*AXES, *["ranks"] * (not cuda)]
    if cuda and "ranks" in asked:
        parser.error("--axes ranks: want --device cpu; ranks are processes of one thread")
    if args.rounds < 1:
        parser.error(f"--rounds: want 1 or more; got {args.rounds}")
    name = args.model or ("3b" if cuda else "small")
    axes = {axis: values for axis, values in AXES.items() if axis in asked}
    if cuda and "V" in axes:
        axes["V"] = LARGE_V
    if args.png and not find_spec("matplotlib"):
        parser.error("--png: matplotlib is not installed: `make setup`")
    found = measure(name, torch.device(args.device), axes, "ranks" in asked, args.rounds)
    write(found, render(found), args.json)
    if args.png:
        from bench.curves_plot import draw

        draw(found, args.png)


if __name__ == "__main__":
    main()
