"""What a shared prompt saves: update, scoring and roll-out of one group, beside the G padded rows of other trainers.

    python -m bench.packed                              a small model on a CPU
    python -m bench.packed --device cuda --model 3b     the shapes of Qwen2.5-VL-3B in bfloat16, with its floors

Weights are random and completions all of full length, so both sides do the same work. They are compared before any
clock starts, then take turns; a speed-up is the median over rounds of their times in the same round.
    update   forward and backward pass of the GRPO loss, the vision tower trained
    score    log-probabilities without a gradient
    rollout  our engine; theirs is `generate(num_return_sequences=G)`
"rows" are transformers' model, which encodes the image G times, with full logits of the completions and PyTorch's
log-softmax. "unpacked" is our own code without sharing: each completion is a group of its own, with its own image or,
"image once", with one for all.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import timing
from bench.bars import Bar, render_bars
from bench.packed_floors import measure_floors, operations_bound
from bench.packed_sides import (
    Case,
    check,
    clear,
    make_case,
    make_engine,
    our_loss,
    our_rollout,
    our_score,
    separate,
    their_loss,
    their_rollout,
    their_score,
)
from bench.random_model import ARCHITECTURES
from bench.table import environment
from medground.records import Group

CPU_BARS = {"update": 3.5, "score": 3.5, "rollout": 1.8}
UNPACKED = ("unpacked, image once", "unpacked")


class Race(NamedTuple):
    """Seconds of each contender by round, the first of which is thrown away, and why others have none."""

    seconds: dict[str, list[float]]
    failed: dict[str, str]

    def times(self) -> dict[str, dict[str, Any]]:
        """Median and spread of each."""
        by_round = {name: {turn + 1: [s] for turn, s in enumerate(runs)} for name, runs in self.seconds.items()}
        return {name: timing.summary(runs, by_round["ours"], "wall")._asdict() for name, runs in by_round.items()}

    def speedups(self) -> dict[str, dict[str, float]]:
        """Each one's time over ours: of the same round, the median, least and most; `fastest`, of the best rounds."""
        return {name: speedup(runs, self.seconds["ours"]) for name, runs in self.seconds.items() if name != "ours"}


def speedup(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Their time over ours, from their seconds in the same rounds."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    fastest = min(theirs) / min(ours)
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios), "fastest": fastest}


def take_turns(turns: dict[str, timing.Turn], rounds: int) -> Race:
    """Time everybody once a round, to and fro; a peer for which memory does not suffice drops out."""
    race = Race({name: [] for name in turns}, {})
    with timing.no_collection():
        for turn in range(rounds + 1):
            for name in list(race.seconds)[:: 1 if turn % 2 else -1]:
                try:
                    seconds = timing.timed(turns[name])
                except torch.OutOfMemoryError as error:
                    if name == "ours":
                        raise
                    race.failed[name] = str(error).splitlines()[0]
                    del race.seconds[name]
                    torch.cuda.empty_cache()
                else:
                    race.seconds[name] += [seconds] * (turn > 0)
    return race


def forms(case: Case) -> dict[str, list[Group]]:
    """The group as our own code runs it."""
    once, each = UNPACKED
    return {"ours": [case.group], once: separate(case, image_once=True), each: separate(case, image_once=False)}


def race_all(case: Case, rounds: int) -> dict[str, Race]:
    """Update, score and rollout."""
    engine = make_engine(case, 1)
    return {
        "update": take_turns(updates(case), rounds),
        "score": take_turns(
            {name: timing.Turn(lambda groups=groups: our_score(case, groups)) for name, groups in forms(case).items()}
            | {"rows": timing.Turn(lambda: their_score(case))},
            rounds,
        ),
        "rollout": take_turns(
            {
                "ours": timing.Turn(lambda: our_rollout(case, engine, 1)),
                "rows": timing.Turn(lambda: their_rollout(case)),
            },
            rounds,
        ),
    }


def updates(case: Case) -> dict[str, timing.Turn]:
    """Everybody's update."""
    return {
        name: timing.Turn(lambda groups=groups: our_loss(case, groups).backward(), lambda: clear(case))
        for name, groups in forms(case).items()
    } | {"rows": timing.Turn(lambda: their_loss(case).backward(), lambda: clear(case))}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Everything, as JSON has it."""
    agreement = check(case)
    races = race_all(case, rounds)
    result = {
        "speedup": {name: race.speedups().get("rows", {}).get("median") for name, race in races.items()},
        "speedups": {name: race.speedups() for name, race in races.items()},
        "bound": {
            "tokens": case.size.token_bound,
            "operations": operations_bound(case, image_once=False),
            "operations, image once": operations_bound(case, image_once=True),
        },
        "seconds": {name: race.times() for name, race in races.items()},
        "failed": {name: race.failed for name, race in races.items()},
        "agreement": agreement._asdict(),
        "floors": measure_floors(case, max(rounds // 2, 1)),
        "peak_bytes": {
            who: timing.peak_memory(turn) for who, turn in updates(case).items() if who in races["update"].seconds
        },
        "sizes": {"model": case.name, "parameters": sum(p.numel() for p in case.vlm.parameters())}
        | {"dtype": str(case.vlm.dtype).removeprefix("torch."), "image_tokens": case.size.image_tokens}
        | case.size._asdict()
        | {"rounds": rounds, "architecture": asdict(case.shape)},
        "environment": environment() | {"on": case.device.type},
    }
    clear(case)
    bars = cuda_bars(result) if case.device.type == "cuda" else cpu_bars(result) if case.name == "small" else []
    return result | {"bars": [bar.plain() for bar in bars]}


def cpu_bars(result: dict[str, Any]) -> list[Bar]:
    """What the small model is to reach."""
    found = result["speedup"]
    return [
        Bar(name, f"at least {least}x faster than rows", f"{found[name]:.2f}x", found[name] >= least)
        for name, least in CPU_BARS.items()
    ]


def cuda_bars(result: dict[str, Any]) -> list[Bar]:
    """What the large models are to reach on a GPU; no bar beside a peer for which memory did not suffice."""
    bars = []
    for of, bound in zip(UNPACKED, ("operations, image once", "tokens"), strict=True):
        if of in result["speedups"]["update"]:
            ratio, most = result["speedups"]["update"][of]["median"], result["bound"][bound]
            wanted, share = f"85% of what {bound} allow, {most:.2f}x", ratio / most
            bars.append(Bar(f"update over ours {of}", wanted, f"{ratio:.2f}x, {share:.0%}", share >= 0.85))
    for d in result["floors"]["decoding"]:
        share = d["seconds"] / d["floor"]
        measured = f"{share:.2f}x, {d['seconds'] * 1e3:.3g} ms"
        wanted = "at most 1.35x reading the weights once"
        bars.append(Bar(f"a step of {d['rows']} rows", wanted, measured, share <= 1.35))
    for p in result["floors"]["prefill"]:
        share = p["floor"] / p["seconds"]
        measured = f"{share:.0%}, {p['seconds'] * 1e3:.3g} ms"
        bars.append(Bar(f"prefill of {p['prompts']}", "50% of the bare products' rate", measured, share >= 0.5))
    if ratio := result["speedup"]["rollout"]:
        bars.append(Bar("rollout", "at least 5x faster than generate", f"{ratio:.2f}x", ratio >= 5))
    return bars


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes, about, bound, agreement = (result[name] for name in ("sizes", "environment", "bound", "agreement"))
    lines = [
        f"Qwen2.5-VL of random weights, {sizes['model']}: {sizes['parameters'] / 1e6:.4g} million parameters, "
        f"{sizes['dtype']}; P {sizes['P']}, {sizes['image_tokens']} of them the image's, G {sizes['G']}, "
        f"C {sizes['C']}. {about['device']}, torch {about['packages']['torch']}, "
        f"transformers {about['packages']['transformers']}.",
        "",
        "| | ours, ms | other, ms | other / ours | least to most | other |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["speedups"].items():
        seconds = {who: f"{times['median'] * 1e3:.4g}" for who, times in result["seconds"][name].items()}
        for who, ratio in found.items():
            spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
            label = "`generate`" if name == "rollout" else who
            lines.append(
                f"| {name} | {seconds['ours']} | {seconds[who]} | {ratio['median']:.2f} | {spread} | {label} |"
            )
        failed = result["failed"][name].items()
        lines += [f"| {name} | {seconds['ours']} | - | - | - | {who}: {why} |" for who, why in failed]
    peaks = ", ".join(f"{who} {held / 1e6:.4g}" for who, held in result["peak_bytes"].items())
    gradients = "" if agreement["grad"] is None else f", of gradients {agreement['grad']:.1e}"
    floors = result["floors"]
    parts = [f"Copy {floors['copy_rate'] / 1e9:.4g} GB/s, products {floors['product_rate'] / 1e12:.4g} TF/s"]
    parts += [
        f"a step of {d['rows']} rows {d['seconds'] * 1e3:.3g} ms, reading the weights {d['floor'] * 1e3:.3g}"
        for d in floors["decoding"]
    ]
    parts += [
        f"prefill of {p['prompts']} {p['seconds'] * 1e3:.3g} ms, bare products {p['floor'] * 1e3:.3g}"
        for p in floors["prefill"]
    ]
    lines += [
        "",
        f"By tokens {bound['tokens']:.2f} times less work, by operations {bound['operations']:.2f}, "
        f"{bound['operations, image once']:.2f} where rows share the image. Peak of an update in MB: {peaks}. "
        f"Log-probabilities differ by {agreement['logp']:.1e} at most{gradients}.",
        "",
        "; ".join(parts) + ".",
    ]
    return "\n".join(lines)


def write(result: dict[str, Any], text: str, path: Path | None) -> None:
    """Print a result and its bars, and write it if there is a path."""
    print(text)
    if result["bars"]:
        print("\n" + render_bars([Bar(**bar) for bar in result["bars"]]))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Update, scoring and roll-out of a packed group beside padded rows.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default=None, help="small on a CPU, 3b on CUDA")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    name = args.model or ("3b" if args.device == "cuda" else "small")
    result = measure(make_case(name, torch.device(args.device)), args.rounds)
    write(result, render(result), args.json)


if __name__ == "__main__":
    main()
