"""One whole GRPO step of ours beside TRL's GRPOTrainer: images read, completions sampled and rewarded, weights updated.

    make peers; PYTHONPATH=peers python -m bench.step_against_trl
    python -m bench.step_against_trl --device cuda --model 3b --prompts 16 --groups-at-once 1 --checkpointing

Both get the same folder of random weights, images and phrases, B prompts a step, G completions of C tokens each (the
token that ends one cannot be drawn), the same reward, dapo without a reference, AdamW, float32 weights and, on a GPU,
bfloat16 computation. Ours is what `medground.train` runs, but that prompts are made within the step and not beside the
one before. TRL runs at its defaults, but for gradient checkpointing, which both have or have not, and logging, which is
off. In the first step, which warms up, our gradient for TRL's completions and advantages is compared with TRL's own.

On a CPU the two take turns within one process. On a GPU, where both together do not fit, TRL goes first and ours
follows. 7B is left out: AdamW with float32 weights takes 133 GB, and LoRA is not built yet.
"""

import argparse
import gc
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.bars import Bar
from bench.packed import speedup, write
from bench.race import UnavailableError
from bench.random_model import ARCHITECTURES
from bench.step_job import Capture, Job, make_job
from bench.step_ours import OurSide, coarse
from bench.step_trl import need_trl, run_trl
from bench.table import environment
from medground.sharding import join_ranks

BAR = 3.0
CLOSE = {"cpu": 1e-3, "cuda": 0.25}
"""Most that the gradients may differ, root mean square over TRL's."""

Seconds = list[dict[str, float]]


def take_turns(job: Job, folder: Path, rounds: int) -> tuple[Seconds, Seconds, float]:
    """Seconds of ours and of theirs, step by step, and how far the gradients are apart."""
    mine: Seconds = []
    gap: list[float] = []
    with join_ranks() as ranks:
        ours = OurSide(job, ranks)

        def between(theirs: Capture) -> None:
            if not gap:
                gap.append(ours.compare(theirs))
                ours.step()  # warms up
            else:
                mine.append(coarse(ours.step()))

        watch = run_trl(job, folder, rounds, between)
    return mine, watch.seconds, gap[0]


def one_after_the_other(job: Job, folder: Path, rounds: int) -> tuple[Seconds, Seconds, float]:
    """The same where memory does not suffice for both."""
    watch = run_trl(job, folder, rounds, lambda _: None)
    theirs, capture = watch.seconds, watch.capture
    assert capture
    del watch
    gc.collect()
    torch.cuda.empty_cache()
    with join_ranks() as ranks:
        ours = OurSide(job, ranks)
        gap = ours.compare(capture)
        ours.step()
        return [coarse(ours.step()) for _ in range(rounds)], theirs, gap


def measure(job: Job, folder: Path, rounds: int) -> dict[str, Any]:
    """Everything, as JSON has it.

    Raises:
        ValueError: the two do not compute the same.
    """
    run = one_after_the_other if job.device.type == "cuda" else take_turns
    ours, theirs, gap = run(job, folder, rounds)
    if not gap <= CLOSE[job.device.type]:
        raise ValueError(f"want gradients within {CLOSE[job.device.type]} of TRL's; got {gap:.2e}")
    ratio = speedup([step["step"] for step in theirs], [step["step"] for step in ours])
    bar = Bar("step", f"at least {BAR}x faster than TRL", f"{ratio['median']:.2f}x", ratio["median"] >= BAR)
    return {
        "speedup": ratio["median"],
        "spread": ratio,
        "seconds": {
            who: {phase: median(step[phase] for step in steps) for phase in steps[0]}
            for who, steps in (("ours", ours), ("TRL", theirs))
        },
        "steps": {"ours": ours, "TRL": theirs},
        "gradient_gap": gap,
        "sizes": job.sizes | {"image_tokens": job.size.image_tokens, "rounds": rounds},
        "bars": [bar.plain()] if job.name != "tiny" else [],
        "environment": environment() | {"on": job.device.type},
    }


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes, about, ratio = result["sizes"], result["environment"], result["spread"]
    ours, theirs = result["seconds"]["ours"], result["seconds"]["TRL"]
    lines = [
        f"One GRPO step, Qwen2.5-VL of random weights, {sizes['model']}: {sizes['prompts']} prompts, P {sizes['P']}, "
        f"{sizes['image_tokens']} of them the image's, G {sizes['G']}, C {sizes['C']}. {about['device']}, "
        f"torch {about['packages']['torch']}, transformers {about['packages']['transformers']}, "
        f"TRL {about['packages']['trl']}.",
        "",
        "| seconds | ours | TRL | TRL / ours |",
        "|---|---|---|---|",
        *(
            f"| {phase} | {ours[phase]:.3f} | {theirs[phase]:.3f} | {theirs[phase] / ours[phase]:.2f} |"
            for phase in ours
        ),
        "",
        f"In the same round {ratio['median']:.2f} times faster, {ratio['least']:.2f} to {ratio['most']:.2f}. Gradients "
        f"differ by {result['gradient_gap']:.1e}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="One whole GRPO step beside TRL's GRPOTrainer.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default=None, help="small on a CPU, 3b on CUDA")
    parser.add_argument("--prompts", type=int, default=None, help="a step; 2 on a CPU, 16 on CUDA")
    parser.add_argument("--groups-at-once", type=int, default=None, help="of a micro-batch; all on a CPU, 1 on CUDA")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if args.model == "7b":
        parser.error("--model 7b: AdamW with float32 weights takes 133 GB, and LoRA is not built yet")
    if torch.cuda.is_available() != cuda:
        parser.error(f"--device {args.device}: a GPU is {'not ' * cuda}visible (CUDA_VISIBLE_DEVICES= hides it)")
    try:
        need_trl()
    except UnavailableError as error:
        parser.exit(2, f"bench.step_against_trl: {error}\n")
    prompts = args.prompts or (16 if cuda else 2)
    at_once = args.groups_at_once or (1 if cuda else prompts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or ("3b" if cuda else "small")
        job = make_job(folder, model, torch.device(args.device), prompts, at_once, args.checkpointing)
        result = measure(job, folder / "trl", args.rounds)
    write(result, render(result), args.json)


if __name__ == "__main__":
    main()
