"""Kill a run again and again and compare what it comes to with a run that nobody touched: `make chaos`.

    python tests/chaos.py --kills 40 --terms 10

Runs of two ranks are started by `torchrun --max-restarts`. A kill is SIGKILL of one rank at a moment that a plan names
(`chaos_rank.MOMENTS`); torchrun starts both again, and they go on from the newest checkpoint. A term is SIGTERM, of a
rank or of torchrun; the run then ends and is started again with --resume. At last weights, optimizer state, metrics,
completions and evaluations must be the same to the bit.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

HERE = Path(__file__).parent
ALWAYS = ("decode", "backward", "optimizer", "writing", "any")  # moments of every rank; the others are the first one's
FIRST = ("hashing", "before the rename", "after the rename", "tidying")
TIMED = ("seconds", "per_second", "mfu", "skipped_updates")


def draw_plan(seed: int, kills: int, terms: int) -> list[dict[str, Any]]:
    """Faults at random moments; every second plan ends with a kill during export."""
    draw = random.Random(seed)
    plan = []
    for number in range(kills + terms):
        first = draw.random() < 0.4
        moment = draw.choice(FIRST if first and number < kills else ALWAYS)
        most = {"any": 4000, "decode": 60, "backward": 6, "optimizer": 3, "writing": 2}.get(moment, 1)
        fault = {"moment": moment, "rank": 0 if moment in FIRST else draw.randrange(2), "count": draw.randint(1, most)}
        fault |= {"signal": "SIGKILL"} if number < kills else {"signal": "SIGTERM", "agent": draw.random() < 0.5}
        plan.append(fault)
    draw.shuffle(plan)
    if kills and seed % 2:
        last = next(i for i, fault in enumerate(plan) if fault["signal"] == "SIGKILL")
        del plan[last]
        plan.append({"moment": "export", "rank": 0, "count": 1, "signal": "SIGKILL"})
    return plan


def run(words: Sequence[str], out: Path, folder: Path, plan: Sequence[dict[str, Any]], ranks: int = 2) -> list[int]:
    """Train to the end in spite of a plan's faults.

    Returns:
        The exit status of each torchrun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(list(plan)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launch += ["--max-restarts", str(len(plan)), "--monitor-interval", "0.1", str(HERE / "chaos_rank.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CHAOS": str(folder)}
    if torch.cuda.device_count() < ranks:
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    codes: list[int] = []
    while not (out / "summary.json").exists():
        if len(codes) > len(plan) + 1:
            raise AssertionError(f"{out}: not finished after {len(codes)} launches that ended with {codes}")
        resume = ["--resume"] if (out / "config.json").exists() else []
        done = subprocess.run(
            [*launch, "--out", str(out), *resume],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        codes.append(done.returncode)
        (folder / f"launch-{len(codes)}.txt").write_text(done.stdout + done.stderr)
    return codes


def differences(ours: Path, theirs: Path, atol: float = 0.0) -> list[str]:
    """What two finished runs differ in, by name: nothing if they came to the same.

    Args:
        ours: folder of a run.
        theirs: of the other one.
        atol: how far numbers may lie apart; completions and boxes have to be the same anyway.
    """
    found = [f"export: {name}" for name in _unlike(_export(ours), _export(theirs), atol)]
    found += [f"checkpoint: {name}" for name in _unlike(_checkpoint(ours), _checkpoint(theirs), atol)]
    found += [f"metrics: {name}" for name in _unlike(_metrics(ours), _metrics(theirs), atol)]
    for part in ("samples", "eval"):
        names = sorted({path.name for run in (ours, theirs) for path in (run / part).iterdir()})
        for name in names:
            a, b = ours / part / name, theirs / part / name
            if not (a.exists() and b.exists()):
                found.append(f"{part}/{name}: in one run alone")
            elif not _alike(_values(a), _values(b), atol):
                found.append(f"{part}/{name}")
    return found


def _unlike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> list[str]:
    if a.keys() != b.keys():
        return [f"only one has {sorted(a.keys() ^ b.keys())}"]
    return [name for name in a if not ((a[name] - b[name]).abs() <= atol).all()]


def _alike(a: Any, b: Any, atol: float) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name], atol) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= max(atol, atol * abs(a))
    return a == b


def _values(path: Path) -> list[Any]:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]


def _export(run: Path) -> dict[str, torch.Tensor]:
    return {name: weight.double() for name, weight in load_file(run / "export" / "model.safetensors").items()}


def _checkpoint(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    reader = dcp.FileSystemReader(newest)
    layout = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in layout.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {f"{newest.name} {name}": value.double() for name, value in state.items()}


def _metrics(run: Path) -> dict[str, torch.Tensor]:
    rows = _values(run / "metrics.jsonl")
    kept = {f"{row['step']} {name}": value for row in rows for name, value in row.items()}
    return {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in kept.items()
        if not any(part in name for part in TIMED)
    }


def job(folder: Path) -> list[str]:
    """A data folder, a base model and the words of a run of eight steps and seconds."""
    from medground.base_config import BaseConfig
    from medground.base_model import build_base
    from medground.datasets.phantom import PhantomConfig, write_phantom

    write_phantom(PhantomConfig(out=str(folder / "data"), count=60, val=8, test=16, size=56), workers=1)
    build_base(BaseConfig(out=str(folder / "base"), films=100, size=56, steps=100, batch_size=16, lr=4e-3))
    return words(folder / "data", folder / "base")


def words(data: Path, base: Path, steps: int = 8) -> list[str]:
    """Options of a run of seconds."""
    options = {
        "steps": steps, "model.path": base, "data.path": data, "rollout.prompts-per-step": 4, "rollout.group-size": 4,
        "rollout.max-new-tokens": 24, "loss.micro-batch-tokens": 250, "loss.beta": 0.05, "loss.inner-epochs": 2,
        "evaluation.every": 3, "evaluation.curve-records": 4, "optimizer.lr": 1e-4, "optimizer.warmup-steps": 2,
        "samples-every": 1, "checkpoint.every": 2, "model.precision": "float32",
    }  # fmt: skip
    return ["demo", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def mixed_ranks(options: Sequence[str], folder: Path) -> Path:
    """Two ranks until SIGTERM, one until the next, two to the end."""
    out = folder / "run"
    for number, (ranks, count) in enumerate([(2, 5), (1, 5), (2, 10_000)]):
        part = folder / str(number)
        plan = [{"moment": "backward", "rank": 0, "count": count, "signal": "SIGTERM"}]
        part.mkdir(parents=True)
        (part / "plan.json").write_text(json.dumps(plan))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        resume = ["--resume"] if number else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CHAOS": str(part)}
        command = [*launch, str(HERE / "chaos_rank.py"), *options, "--out", str(out), *resume]
        subprocess.run(command, env=environment, capture_output=True, timeout=600, check=True)
        print(f"{ranks} ranks: up to {max((p.name for p in (out / 'checkpoints').glob('step-*')), default='none')}")
    return out


def main() -> None:
    """The whole matrix, in runs of five faults."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments; they have to come to the same.")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = job(folder)
        run(options, folder / "straight", folder / "calm", [])
        bad = struck = 0
        runs = -(-(args.kills + args.terms) // 5)
        for number in range(runs):
            share = [len(range(number, most, runs)) for most in (args.kills, args.terms)]
            plan = draw_plan(args.seed + number, *share)
            out, chaos = folder / f"run-{number}", folder / f"chaos-{number}"
            codes = run(options, out, chaos, plan)
            hits = len(list(chaos.glob("struck-*")))
            found = differences(folder / "straight", out)
            struck, bad = struck + hits, bad + (hits if found else 0)
            told = ", ".join(f"{f['signal'][3:].lower()} {f['moment']} of rank {f['rank']}" for f in plan[:hits])
            print(f"run {number + 1} of {runs}: {told}; launches ended {codes}: {found[:5] or 'the same'}", flush=True)
            shutil.rmtree(out)
        apart = differences(folder / "straight", mixed_ranks(options, folder / "mixed"), atol=1e-5)
        print(f"2, 1, 2 ranks: {apart or 'within 1e-5'}")
    print(
        f"{struck - bad} of {struck} faults left no trace; {args.kills + args.terms - struck} came too late to strike"
    )
    sys.exit(bool(bad or apart))


if __name__ == "__main__":
    main()
