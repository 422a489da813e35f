"""Peak memory that `medground plan` predicts beside the one that real processes reach, on a CPU.

    python -m bench.planned --json FILE

Each case is a small model, but not so small that the process around it would blur the figures. What is predicted comes
from the planner's dry run for the device `cpu`. What is measured is the same step, truly run by as many processes as
there are ranks, twice, of the rank that reached most:

    live      bytes of torch's CPU allocator, from the profiler's record of every allocation and release
    resident  highest resident size of the process (VmHWM of /proc, reset as each phase begins) less its size after a
              step of a tiny model, which loads what libraries keep; malloc is told to take each large block from the
              system and to give it back at once

Within 10 % of the resident size, over all phases but loading, is the bar.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.bars import Bar
from bench.packed import write
from bench.random_model import ARCHITECTURES, SIZES, make_config, make_processor, make_vlm
from bench.table import device_name, environment
from medground.config import (
    Config,
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    RolloutConfig,
    load_config,
    save_config,
)
from medground.plan.dry_run import dry_run
from medground.plan.rehearsal import Job, Meter, Rehearsal
from medground.plan.shapes import Architecture, model_config
from medground.plan.workload import longest_prompt
from medground.sharding import Ranks, join_ranks

ARCHITECTURES["planned"] = Architecture(512, 8, 8, 2, 1536, 8192, False, 4, 256, 4, 512, (1, 3), 0.02)
WITHIN = 0.10
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
PHASES = ("rollout", "score", "update", "optimizer")


class Case(NamedTuple):
    """A configuration: ranks, rank of adapters, activation checkpointing, weight of the KL term, groups at once."""

    ranks: int
    lora: int
    checkpointing: bool
    beta: float
    groups_at_once: int


CASES = {
    "full": Case(1, 0, False, 0.0, 1),
    "full, checkpointing, reference, 2 ranks": Case(2, 0, True, 0.04, 1),
    "adapters, reference": Case(1, 16, False, 0.04, 2),
    "adapters, checkpointing, 2 ranks": Case(2, 16, True, 0.0, 2),
}


def make_case(case: Case, model: Path) -> Config:
    """A step of two groups a rank: a prompt of 260 tokens, four completions of 120."""
    P, G, C = 260, 4, 120
    return Config(
        out="unused",
        steps=10,
        model=ModelConfig(
            path=str(model),
            activation_checkpointing="full" if case.checkpointing else "none",
            lora=LoraConfig(rank=case.lora),
            precision="float32",
        ),
        data=DataConfig(path=("unused",), min_pixels=1, max_pixels=196 * 784),
        rollout=RolloutConfig(
            prompts_per_step=2 * case.ranks, group_size=G, max_new_tokens=C, max_rows=8, cache_gb=0.02, prefill_tokens=P
        ),
        loss=LossConfig(beta=case.beta, micro_batch_tokens=case.groups_at_once * (P + G * C)),
    )


def make_model(folder: Path, name: str = "planned") -> None:
    """Random weights of that shape."""
    shape = ARCHITECTURES[name]
    processor = make_processor(shape.V, SIZES["small"])
    make_vlm(make_config(shape, processor), torch.device("cpu"), torch.float32).save_pretrained(folder)


TEXT = 64  # tokens of a prompt beside its image's


def make_job(config: Config) -> Job:
    return Job(longest_prompt(config, TEXT), model_config(config.model.path))


class ResidentSize:
    """Highest resident size of this process in each phase, beyond the size when it was made."""

    def __init__(self) -> None:
        gc.collect()
        self.peaks: dict[str, int] = {}
        self._before, self._phase = _status("VmRSS"), ""

    def begin(self, phase: str) -> None:
        self.end()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        self._phase = phase

    def end(self) -> None:
        if self._phase:
            reached = _status("VmHWM") - self._before
            self.peaks[self._phase] = max(reached, self.peaks.get(self._phase, 0))
        self._phase = ""

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        yield


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


class LiveBytes:
    """Most bytes of torch's CPU allocator in each phase."""

    def __init__(self) -> None:
        gc.collect()  # or what is freed later would be taken off
        self.peaks: dict[str, int] = {}
        self._held, self._phase, self._profile = 0, "", None

    def begin(self, phase: str) -> None:
        self.end()
        self._phase = phase
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def end(self) -> None:
        if not self._phase:
            return
        self._profile.__exit__(None, None, None)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = list(
            itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=self._held)
        )
        self.peaks[self._phase] = max(max(held), self.peaks.get(self._phase, 0))
        self._held, self._phase = held[-1], ""

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        yield


class Nobody:
    """Watches nothing."""

    def begin(self, phase: str) -> None: ...

    def end(self) -> None: ...

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        yield


METERS = {"live": LiveBytes, "resident": ResidentSize}


def predict(config: Config, ranks: int) -> dict[str, int]:
    """Bytes by phase."""
    found, _ = dry_run(make_job(config), config, ranks, cuda=False)
    return {phase: peak.total for phase, peak in found.peaks.items()}


def run_rank(meter: str, config_file: Path, warm_up_file: Path, out: Path) -> None:
    """A rank's part of the true step; torchrun's variables say which."""
    torch.set_num_threads(1)
    config, small = load_config(config_file), load_config(warm_up_file)
    with join_ranks() as ranks:
        run_step(small, ranks, Nobody())
        watching = METERS[meter]()
        run_step(config, ranks, watching)
        shares = ranks.gather(watching.peaks)
    if ranks.is_first:
        out.write_text(json.dumps({phase: max(share[phase] for share in shares) for phase in watching.peaks}))


def run_step(config: Config, ranks: Ranks, meter: Meter) -> None:
    step = Rehearsal(make_job(config), config, Path(config.model.path), ranks, meter)
    step.roll_out()
    step.update()


def measure(meter: str, case: Case, folder: Path) -> dict[str, int]:
    """Bytes by phase of the rank that reached most, from processes of their own."""
    for name in ("model", "small"):
        save_config(make_case(case, folder / name), folder / f"{name}.json")
    out = folder / "peaks.json"
    files = (str(folder / name) for name in ("model.json", "small.json", "peaks.json"))
    words = [sys.executable, "-m", "bench.planned", "--rank", meter, *files]
    shared = os.environ | _MALLOC | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(case.ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "TORCHELASTIC_RUN_ID": "planned"}
    running = [subprocess.Popen(words, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(case.ranks)]
    failed = [process.wait() for process in running]
    if any(failed):
        raise RuntimeError(f"a rank failed: {failed}")
    return json.loads(out.read_text())


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def compare(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Everything, as JSON has it."""
    make_model(folder / "model", "planned")
    make_model(folder / "small", "tiny")
    rows = {}
    for name in names:
        case = CASES[name]
        row: dict[str, Any] = {
            "case": case._asdict(),
            "predicted": predict(make_case(case, folder / "model"), case.ranks),
        }
        row |= {meter: measure(meter, case, folder) for meter in METERS}
        peaks = {which: max(row[which][phase] for phase in PHASES) for which in ("predicted", *METERS)}
        rows[name] = row | {"over": {meter: peaks["predicted"] / peaks[meter] for meter in METERS}}
    bars = []
    for name, row in rows.items():
        ratio = row["over"]["resident"]
        bars.append(Bar(name, f"within {WITHIN:.0%}", f"{ratio:.3f}", abs(ratio - 1) <= WITHIN).plain())
    return {"rows": rows, "bars": bars, "environment": environment() | {"on": "cpu"}}


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    head = ["configuration", *PHASES, "predicted over live", "over resident"]
    lines = [f"Peak of a rank by phase: predicted / live / resident, MB; {device_name()}.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in result["rows"].items():
        cells = [" / ".join(f"{row[which][p] / 1e6:.0f}" for which in ("predicted", *METERS)) for p in PHASES]
        cells += [f"{row['over'][meter]:.3f}" for meter in METERS]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Predict, measure, print, write."""
    parser = argparse.ArgumentParser(description="Planned peak memory beside the measured one, on a CPU.")
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES), default=tuple(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--rank", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        run_rank(args.rank[0], *map(Path, args.rank[1:]))
        return
    with tempfile.TemporaryDirectory() as name:
        result = compare(args.cases, Path(name))
    write(result, render(result), args.json)


if __name__ == "__main__":
    main()
