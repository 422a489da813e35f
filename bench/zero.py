"""The update of a GRPO step under FSDP2 beside DeepSpeed ZeRO-2 and ZeRO-3, which MedGround-R1 and VLM-R1 train with.

    make peers; PYTHONPATH=peers python -m bench.zero
    python -m bench.zero --device cuda --model 3b --ranks 1 2 4 8

An update is the forward and backward pass of the dapo loss, clipping and AdamW. Every side has the same random weights,
groups, advantages and old policy; float32 on a CPU, on CUDA float32 weights and bfloat16 computation.
    ours             packed groups under FSDP2: what `medground.train` runs
    ours, unpacked   G padded rows [prompt | completion] under the same FSDP2
    DeepSpeed        the same padded rows, full logits and log_softmax included
So the packing shows in the first two, the engines in the others. Two updates are compared before any clock starts. Then
all ranks take turns, a barrier before each, and the slowest rank's time counts. On CUDA, where memory does not suffice
for all, each side has processes of its own, one after the other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.bars import Bar
from bench.packed import Race, speedup, write
from bench.random_model import ARCHITECTURES, SIZES
from bench.table import environment
from bench.zero_worker import CLOSE, OURS, UNPACKED, ZERO, Found, Job, Update, compare

ROOT = Path(__file__).parents[1]


class LaunchError(Exception):
    """The ranks did not come to an end; says what one of them said last."""


def launch(job: Job, ranks: int, device: str) -> dict[str, Found]:
    """Run a job on ranks of its own."""
    # warnings of torch's collectives, which DeepSpeed calls by their old names, hundreds of times an update
    env = {"PYTHONWARNINGS": "ignore::FutureWarning", "DS_ACCELERATOR": device, "OMP_NUM_THREADS": threads(ranks)}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, "-m", "bench.zero_worker", str(out), json.dumps(job._asdict())]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("[rank") and "Error: " in line]
            raise LaunchError(told[-1] if told else done.stderr[-2000:])
        found = {name: Found(**side) for name, side in json.loads(out.read_text()).items()}
    for side in found.values():
        side.updates = [Update(*update) for update in side.updates]
    return found


def threads(ranks: int) -> str:
    """Of each rank: the cores shared out, unless the caller has set how many."""
    return os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // ranks, 1))


def race(job: Job, ranks: int, device: str) -> dict[str, Found]:
    """All sides of a job, together or, on CUDA, apart, where a peer may fail alone.

    Raises:
        ValueError: two sides do not compute the same.
    """
    if device == "cpu":
        return launch(job, ranks, device)
    found = {}
    for name in job.sides:
        try:
            found |= launch(job._replace(sides=[name]), ranks, device)
        except LaunchError as error:
            if name not in ZERO.values():
                raise
            found[name] = Found(str(error), [], 0, 0, [])
    return found


def measure(job: Job, ranks: list[int], device: str) -> dict[str, Any]:
    """Everything, as JSON has it; what depends on the number of ranks by that number."""
    result: dict[str, Any] = {
        name: {} for name in ("seconds", "speedups", "unpacked", "failed", "held_bytes", "peak_bytes", "agreement")
    }
    bars = []
    for n in ranks:
        found = race(job, n, device)
        ran = {name: side for name, side in found.items() if side.failed is None}
        runs = {name: side.seconds for name, side in ran.items()}
        failed = {name: side.failed for name, side in found.items() if side.failed}
        times = Race(runs, failed)
        for key, value in {
            "seconds": times.times(),
            "speedups": times.speedups(),
            "unpacked": {name: speedup(s, runs[UNPACKED]) for name, s in runs.items() if name in ZERO.values()},
            "failed": failed,
            "held_bytes": {name: side.held for name, side in ran.items()},
            "peak_bytes": {name: side.peak for name, side in ran.items()},
            "agreement": compare({name: s.updates for name, s in ran.items()}, CLOSE[device])._asdict(),
        }.items():
            result[key][str(n)] = value
        if ZERO[3] in ran and job.model != "tiny":
            ratio = times.speedups()[ZERO[3]]["median"]
            name = f"update, {n} rank{'s' * (n > 1)}"
            bars.append(Bar(name, "at least as fast as ZeRO-3", f"{ratio:.2f}x", ratio >= 1).plain())
    size = SIZES[job.model]
    sizes = job._asdict() | size._asdict() | {"image_tokens": size.image_tokens}
    about = environment() | {"on": device, "threads": {str(n): threads(n) for n in ranks}}
    return result | {"sizes": sizes, "environment": about, "bars": bars}


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    sizes, about = result["sizes"], result["environment"]
    versions = ", ".join(f"{name} {about['packages'][name] or 'absent'}" for name in ("torch", "deepspeed"))
    lines = [
        f"Update of a GRPO step, Qwen2.5-VL of random weights, {sizes['model']}: prompts a rank {sizes['prompts']}, "
        f"P {sizes['P']}, {sizes['image_tokens']} of them the image's, G {sizes['G']}, C {sizes['C']}. "
        f"{about['device']}, {versions}.",
        "",
        "| ranks | | seconds | / ours | least to most | / ours, unpacked | held, MB | more at the peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for n, seconds in result["seconds"].items():
        for name, times in seconds.items():
            ratio, unpacked = result["speedups"][n].get(name), result["unpacked"][n].get(name)
            memory = [f"{result[key][n][name] / 1e6:.4g}" for key in ("held_bytes", "peak_bytes")]
            cells = [
                n, name, f"{times['median']:.4g}",
                f"{ratio['median']:.2f}" if ratio else "",
                f"{ratio['least']:.2f} to {ratio['most']:.2f}" if ratio else "",
                f"{unpacked['median']:.2f}" if unpacked else "", *memory,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {n} | {name}: {why} | - | - | - | - | - | - |" for name, why in result["failed"][n].items()]
    gaps = [max(agreement[key] for agreement in result["agreement"].values()) for key in ("loss", "grad_norm")]
    lines += [
        "",
        "Times over ours are of the same round, the median; memory is the fullest rank's. Two updates of all sides: "
        f"losses differ by {gaps[0]:.1e} at most, gradient norms by {gaps[1]:.1e} of their size.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="The update under FSDP2 beside DeepSpeed ZeRO-2 and ZeRO-3.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), default=None, help="small on a CPU, 3b on CUDA")
    parser.add_argument("--ranks", type=int, nargs="+", default=None, help="1 and 2, as far as there are GPUs")
    parser.add_argument("--stages", type=int, nargs="+", choices=tuple(ZERO), default=tuple(ZERO), help="of ZeRO")
    parser.add_argument("--prompts", type=int, default=2, help="of each rank")
    parser.add_argument("--groups-at-once", type=int, default=None, help="of a micro-batch; all on a CPU, 1 on CUDA")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, on all sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    gpus = torch.cuda.device_count()
    if cuda and max(args.ranks or [1]) > gpus:
        parser.error(f"--ranks: want a GPU for each rank; {gpus} are visible")
    ranks = args.ranks or [n for n in (1, 2) if not cuda or n <= gpus]
    job = Job(
        model=args.model or ("3b" if cuda else "small"),
        prompts=args.prompts,
        groups_at_once=args.groups_at_once or (1 if cuda else args.prompts),
        checkpointing=args.checkpointing,
        rounds=args.rounds,
        sides=[OURS, UNPACKED, *(ZERO[stage] for stage in args.stages)],
    )
    try:
        result = measure(job, ranks, args.device)
    except LaunchError as error:
        parser.exit(1, f"bench.zero: {error}\n")
    write(result, render(result), args.json)


if __name__ == "__main__":
    main()
