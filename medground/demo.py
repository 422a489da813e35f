"""The whole job on phantom films: data, base model, training under torchrun, evaluation, page.

Each part is a command that a user could type, and is shown before it runs.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from medground.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train, evaluate and show a model that learns to ground, on phantom films."""

    out: str = "runs/demo"
    """Folder of everything; data and base model in it are used again."""
    seed: int = 0
    """Seed of the films and of the training."""
    films: int = 4000
    """Phantom films to draw, 256 of them held out."""
    steps: int = 0
    """Training steps; 0 for those of the preset."""
    base: str = ""
    """Folder of the base model; empty for `out`/base."""
    base_steps: int = 0
    """Supervised steps of the base model; 0 for its own default."""
    base_films: int = 0
    """Films that the base model learns from; 0 for its own default."""
    ranks: int = 0
    """Processes of torchrun; 0 for one a GPU, or two on a CPU."""

    def __post_init__(self) -> None:
        for name in ("films", "steps", "base_steps", "base_films", "ranks", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: want >= 0; got {getattr(self, name)}")


def run_demo(config: DemoConfig) -> None:
    """Run the demo; its numbers are in `out`/summary.json, its page is `out`/report.html.

    Raises:
        ValueError: one of its commands failed.
    """
    started = time.perf_counter()
    B = PRESETS["demo"][1].rollout.prompts_per_step
    out = Path(config.out)
    data, base, run = out / "data", Path(config.base or out / "base"), out / "grpo"
    if run.exists():
        if not (run / "config.json").is_file():
            raise ValueError(f"{run}: want the run of an earlier demo, to replace it; it holds something else")
        print(f"{run}: an earlier demo's run, removed")
        shutil.rmtree(run)
    python = sys.executable
    _run([python, "-m", "medground", "data", "phantom", "--out", str(data), "--count", str(config.films)]
         + ["--seed", str(config.seed)])  # fmt: skip
    some = ["--steps", str(config.base_steps)] if config.base_steps else []
    some += ["--films", str(config.base_films)] if config.base_films else []
    _run([python, "-m", "medground", "base", "--out", str(base), *some])
    # as many ranks as share the prompts of a step evenly
    ranks = config.ranks or max((n for n in range(1, _gpus() + 1) if B % n == 0), default=2)
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    steps = ["--steps", str(config.steps)] if config.steps else []
    _run([*launch, "-m", "medground.train", "demo", "--out", str(run), "--model.path", str(base)]
         + ["--data.path", str(data), "--seed", str(config.seed), *steps])  # fmt: skip
    summary = {"preset": "demo"} | json.loads((run / "summary.json").read_text())
    summary["seconds_total"] = time.perf_counter() - started
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    shutil.copyfile(run / "report.html", out / "report.html")
    print(_table(summary))
    print(f"\nnumbers: {out / 'summary.json'}\npage:    {out / 'report.html'}\nmodel:   {run / 'export'}")


def _run(command: list[str]) -> None:
    print("\n$ " + shlex.join(["python" if word == sys.executable else word for word in command]), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"the command above ended with status {status}")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _table(summary: dict) -> str:
    def row(name: str, key: str) -> str:
        return f"{name:34}{summary[key + '_before']:8.3f}{summary[key + '_after']:8.3f}"

    shuffled = (summary["miou_before_shuffled_images"], summary["miou_after_shuffled_images"])
    return "\n".join(
        [
            f"\n{summary['records_test']} held-out records{'':15}{'before':>8}{'after':>8}",
            row("mean IoU", "miou"),
            f"{'mean IoU, shuffled images':34}{shuffled[0]:8.3f}{shuffled[1]:8.3f}",
            f"{'mean IoU, image-blind baseline':34}{summary['miou_blind_baseline']:8.3f}",
            row("Acc@0.5", "acc50"),
            row("correct side", "side"),
            row("nothing-found answers right", "absent"),
            row("unreadable answers", "parse_failures"),
            f"{summary['steps']} steps, {summary['completion_tokens_per_second']:.0f} completion tokens/s, "
            f"{summary['seconds_total']:.0f} s in all on {summary['machine']}",
        ]
    )
