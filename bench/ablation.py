"""What each reward brings: the demo's model trained with one reward after another, on several seeds, as one table.

    python -m bench.ablation --out runs/ablation                            all arms but giou, seeds 12 13 14
    python -m bench.ablation --out runs/ablation --only soft hard --jobs 2
    python -m bench.ablation --out runs/ablation --save                     keeps the figures in bench/results/

Data, two base models (one was taught to put boxes in its thought) and the encoder of the semantic reward are made
once, in DIR; so is every run: start it again and what is finished is not done again. A seed is that of films, their
split, the order of training and what is sampled; arms of a seed see the same films in the same order. Processes have
one thread each.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from tqdm import tqdm

from medground.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PromptConfig,
    RewardConfig,
    Template,
    differing_fields,
    load_config,
    save_config,
)
from medground.presets import PRESETS
from medground.run_folder import LOCK

DEMO = PRESETS["demo"][1]
AGAINST = "soft"
ARMS: dict[str, dict[str, Any]] = {
    "format": {"format_weight": 1.0, "spatial_weight": 0.0},
    "soft": {"spatial": "soft"},
    "hard": {"spatial": "hard"},
    "curriculum": {"spatial": "curriculum"},
    "giou": {"spatial": "giou"},
    "soft+cosine": {"spatial": "soft", "semantic": "cosine", "semantic_weight": 1.0},
    "soft+contrast": {"spatial": "soft", "semantic": "contrast", "semantic_weight": 1.0},
    "soft+chain": {"spatial": "soft"},
}
"""Name -> what its reward has beside the demo's; `soft+chain` is asked for boxes in its thought."""

USUAL = [name for name in ARMS if name != "giou"]
FILMS, VAL, TEST = 1400, 8, 160  # of a seed; 160 films have about 260 records
ENCODER_FILMS, ENCODER_SEED = 2000, 1_000_000  # not those that anything is trained on or tested with
PROMPTS = 16
TOKENS: dict[Template, int] = {"brief": DEMO.rollout.max_new_tokens, "brief-chain": 112}
BASES: dict[Template, str] = {"brief": "base", "brief-chain": "base-chain"}


def template_of(arm: str) -> Template:
    """What its model is asked."""
    return "brief-chain" if arm.endswith("+chain") else "brief"


def run_config(out: Path, arm: str, seed: int, steps: int) -> Config:
    """The configuration of a run: the demo's with another reward, fewer prompts, and no evaluation on the way."""
    template = template_of(arm)
    reward = ARMS[arm] | ({"encoder": f"phantom:{out / 'encoder'}"} if "semantic" in ARMS[arm] else {})
    return replace(
        DEMO,
        out=str(out / "runs" / str(seed) / arm),
        steps=steps,
        seed=seed,
        samples_every=steps,
        model=ModelConfig(path=str(out / BASES[template])),
        data=DataConfig(path=(str(out / "data" / str(seed)),)),
        prompt=PromptConfig(template=template),
        rollout=replace(DEMO.rollout, prompts_per_step=PROMPTS, max_new_tokens=TOKENS[template]),
        reward=RewardConfig(**{"format_weight": DEMO.reward.format_weight} | reward),
        checkpoint=CheckpointConfig(every=steps, keep=1),
        evaluation=EvaluationConfig(every=0, curve_records=1),
    )


def prepare(out: Path, arms: list[str], seeds: list[int]) -> None:
    """Make what the arms need and `out` has not yet."""
    for seed in seeds:
        _data(out / "data" / str(seed), seed, FILMS, VAL, TEST)
    for template in dict.fromkeys(map(template_of, arms)):
        _medground("base", "--out", str(out / BASES[template]), "--template", template)
    if any("semantic" in ARMS[arm] for arm in arms) and not (out / "encoder" / "words.json").exists():
        _data(out / "data" / "encoder", ENCODER_SEED, ENCODER_FILMS, VAL, VAL)
        _medground("encoders", "build", "--data", str(out / "data" / "encoder"), "--out", str(out / "encoder"))


def _data(folder: Path, seed: int, films: int, val: int, test: int) -> None:
    _medground("data", "phantom", "--out", str(folder), "--count", str(films), "--seed", str(seed), "--val", str(val),
               "--test", str(test))  # fmt: skip


def _medground(*words: str) -> None:
    print("$ python -m medground " + shlex.join(words), flush=True)
    status = subprocess.run([sys.executable, "-m", "medground", *words], env=_environment(), check=False).returncode
    if status:
        raise ValueError(f"the command above ended with status {status}")


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def unfinished(config: Config) -> bool:
    """Whether a run is still to be done; what an earlier attempt left is removed.

    Raises:
        ValueError: the folder holds a run of another configuration, one that goes on, or something else.
    """
    run = Path(config.out)
    if not run.exists():
        return True
    if not (run / "config.json").is_file():
        if any(path.is_file() and path.name != LOCK for path in run.rglob("*")):
            raise ValueError(f"{run}: want a run of an ablation; it holds something else")
    elif (run / "summary.json").exists():
        differing = differing_fields(config, load_config(run / "config.json"))
        if differing:
            raise ValueError(f"{run}: want the configuration it was started with; got {'; '.join(differing)}")
        return False
    if (run / LOCK).exists():
        with (run / LOCK).open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{run}: want a run that has ended; {lock.read()} writes to it") from None
    print(f"{run}: had not finished, removed")
    shutil.rmtree(run)
    return True


def train_arm(config: Config, bar: tqdm, stop: Event) -> str:
    """Train; an error in words, or ''. The bar moves with its steps; `stop` ends it."""
    run = Path(config.out)
    run.parent.mkdir(parents=True, exist_ok=True)
    file, log = run.with_name(f"{run.name}.json"), run.with_name(f"{run.name}.log")
    save_config(config, file)
    seen = 0
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "medground.train", "--config", str(file)],
            stdout=output, stderr=subprocess.STDOUT, env=_environment(),
        )  # fmt: skip
        while process.poll() is None and not stop.wait(1):
            metrics = run / "metrics.jsonl"
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            bar.update(done - seen)
            seen = done
        process.terminate()  # of no effect where it has ended
        process.wait()
    name = f"seed {config.seed}, {run.name}"
    if process.returncode or not (run / "summary.json").exists():
        return f"{name}: ended with status {process.returncode} after {seen} steps; {log}"
    bar.update(config.steps - seen)
    s = json.loads((run / "summary.json").read_text())
    bar.write(f"{name}: mIoU {s['miou_before']:.3f} -> {s['miou_after']:.3f}, {s['seconds_total']:.0f} s", sys.stdout)
    sys.stdout.flush()
    return ""


def train_all(configs: list[Config], jobs: int) -> list[str]:
    """Train those that are unfinished; what went wrong, a line each."""
    todo = [config for config in configs if unfinished(config)]
    print(f"{len(configs)} runs, {len(configs) - len(todo)} of them finished already", flush=True)
    with (
        tqdm(total=sum(config.steps for config in todo), desc="ablation", unit="step", mininterval=5) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        stop = Event()
        try:
            return [error for error in pool.map(partial(train_arm, bar=bar, stop=stop), todo) if error]
        except BaseException:  # Ctrl-C, SIGTERM
            stop.set()
            raise


def collect(out: Path, arms: list[str], seeds: list[int], steps: int) -> dict[str, Any]:
    """The tables of what is finished, base models first."""
    from bench.ablation_table import Run, read_run, summarise

    runs: dict[str, dict[int, Run]] = {}
    for arm in arms:
        template = template_of(arm)
        for seed in seeds:
            folder = out / "runs" / str(seed) / arm
            if (folder / "summary.json").exists():
                before = "before" if template == "brief" else "before, chain"
                runs.setdefault(before, {}).setdefault(seed, read_run(folder, template, 0))
                runs.setdefault(arm, {})[seed] = read_run(folder, template, steps)
    first = sorted(runs, key=lambda name: not name.startswith("before"))
    return summarise({name: runs[name] for name in first}, AGAINST)


def main() -> None:
    """Prepare, train, print and write."""
    parser = argparse.ArgumentParser(description="The demo's model trained with one reward after another.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[12, 13, 14])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=tuple(ARMS), default=USUAL, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--save", action="store_true", help="keep the figures in bench/results/")
    args = parser.parse_args()
    if args.steps < 1 or args.jobs < 1:
        parser.error(f"want --steps and --jobs of 1 or more; got {args.steps}, {args.jobs}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs end, too
    arms, seeds = list(dict.fromkeys(args.only)), list(dict.fromkeys(args.seeds))
    # seed by seed, so that whatever is there when it is stopped compares all arms
    configs = [run_config(args.out, arm, seed, args.steps) for seed in seeds for arm in arms]
    try:
        prepare(args.out, arms, seeds)
        errors = train_all(configs, args.jobs)
        found = collect(args.out, arms, seeds, args.steps)
    except ValueError as error:
        sys.exit(f"bench.ablation: error: {error}")
    write(found, args.out, args.steps, args.save)
    if errors:
        sys.exit("\n".join(["failed, and not in the tables:", *errors]))


def write(found: dict[str, Any], out: Path, steps: int, save: bool) -> None:
    """Print the tables; write them and their figures to `out`, and to bench/results/ to be kept."""
    import torch

    from bench.ablation_table import render
    from bench.table import device_slug, environment

    if not found["arms"]:
        return
    torch.set_num_threads(1)  # as the runs have it
    text = render(found, AGAINST)
    print(f"\n{text}")
    (out / "ablation.md").write_text(text + "\n")
    setting = {"steps": steps, "prompts": PROMPTS, "completions": DEMO.rollout.group_size, "films": FILMS, "test": TEST}
    content = json.dumps({"environment": environment(), "settings": setting, **found}, indent=1) + "\n"
    (out / "ablation.json").write_text(content)
    if save:
        kept = Path(__file__).parent / "results" / f"ablation-{device_slug()}.json"
        kept.write_text(content)
        print(f"\n{kept}")


if __name__ == "__main__":
    main()
