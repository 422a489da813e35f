"""Whole GRPO steps: ours beside TRL and a plain trainer, phase by phase, with tokens a second and the floor.

    make peers; PYTHONPATH=peers python -m bench.steps tiny-cpu
    PYTHONPATH=peers python -m bench.steps 3b-h100 --json FILE

All get the same model, prompts, images, lengths of answers (bench/step_workloads.py) and reward, dapo without a
reference, AdamW, float32 weights and, on a GPU, bfloat16 computation. Where a workload has adapters, they are float32,
alike at the start, and the frozen weights of all sides are bfloat16 on a GPU.
    ours              what `medground.train` runs
    TRL               GRPOTrainer 1.16 at its defaults; its head is fused
    TRL, whole logits the same without the fused head
    plain             G padded rows and full logits, as VLM-R1 and MedGround-R1 train (bench/step_plain.py)
In the first step, which warms up, our gradient for the completions of each of them is compared with its own. Then they
take turns, to and fro; a ratio is of the same round. On a GPU, where they do not fit beside one another, each one runs
all its steps alone.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import timing
from bench.bars import Bar
from bench.gpu_watch import GpuWatch
from bench.packed import write
from bench.race import UnavailableError
from bench.step_floors import Rates, measure_rates, step_floors
from bench.step_job import PHASES, Job, Side, make_job
from bench.step_ours import OurSide
from bench.step_plain import PlainSide
from bench.step_table import Measured, render, summarise
from bench.step_trl import TrlSide
from bench.step_workloads import WORKLOADS, find_workload
from bench.table import device_name, environment
from medground.costs import peak_rate
from medground.sharding import Ranks, join_ranks

PEERS: dict[str, Callable[[Job, Path], TrlSide | PlainSide]] = {
    "TRL": TrlSide,
    "TRL, whole logits": lambda job, folder: TrlSide(job, folder, fused=False),
    "plain": lambda job, _: PlainSide(job),
}
BARS = {"tiny-cpu": {"TRL": 3.0, "plain": 4.0}, "3b-h100": {"TRL": 5.0}}
CLOSE = {"cpu": 1e-3, "cuda": 0.25}
"""Most that the gradients may differ, root mean square over the peer's."""
WARM_UP = {"cpu": 1, "cuda": 2}
"""Steps before those that count; on a GPU the second still records graphs."""


class Race:
    """A job and what each side took for it, round by round.

    Attributes:
        sides: by name, ours first.
        work: of each round: tokens, operations, and what each phase of ours takes at least.
    """

    def __init__(self, job: Job, rounds: int, ranks: Ranks, pedantic: Callable):
        self.job, self.rounds, self.ranks, self.pedantic = job, rounds, ranks, pedantic
        self.cuda = job.device.type == "cuda"
        self.rates: Rates = measure_rates(job)
        self.sides: dict[str, Measured] = {"ours": Measured()}
        self.work: list[dict[str, Any]] = []

    def take_turns(self, folder: Path, peers: Sequence[str]) -> OurSide:
        """All of them in one process, a step of each in a round."""
        ours, others = OurSide(self.job, self.ranks), {}
        for number, name in enumerate(peers):
            if side := self._open(name, folder / str(number)):
                others[name] = side
                self._warm_up(name, side)
                self._check_gap(name, ours.compare(side.capture))
        self._warm_up("ours", ours)

        def others_first() -> None:  # nobody always runs after the same one
            for name in list(others)[:: 1 if len(self.work) % 2 else -1]:
                self.sides[name].seconds.append(others[name].step())

        with timing.no_collection():
            self.pedantic(lambda: self._ours(ours), setup=others_first, rounds=self.rounds, iterations=1)
        for side in others.values():
            side.close()
        return ours

    def one_after_another(self, folder: Path, peers: Sequence[str]) -> OurSide:
        """Each one alone, for a GPU that does not hold two."""
        captures = {}
        for number, name in enumerate(peers):
            if side := self._open(name, folder / str(number)):
                try:
                    self._warm_up(name, side)
                    captures[name] = side.capture
                    with self._watched(name):
                        self.sides[name].seconds += [side.step() for _ in range(self.rounds)]
                except torch.OutOfMemoryError as error:
                    self.sides[name] = Measured(failed=str(error).splitlines()[0])
                side.close()
        ours = OurSide(self.job, self.ranks)
        for name, capture in captures.items():
            self._check_gap(name, ours.compare(capture))
        captures.clear()
        self._warm_up("ours", ours)
        with self._watched("ours"):
            self.pedantic(lambda: self._ours(ours), rounds=self.rounds, iterations=1)
        return ours

    def _open(self, name: str, folder: Path) -> TrlSide | PlainSide | None:
        self.sides[name] = Measured()
        try:
            return PEERS[name](self.job, folder)
        except UnavailableError as error:
            self.sides[name].failed = str(error)
        return None

    def _warm_up(self, name: str, side: Side) -> None:
        peak = timing.peak_memory(timing.Turn(side.step))
        self.sides[name].peak_bytes = torch.cuda.max_memory_allocated() if self.cuda else peak
        for _ in range(WARM_UP[self.job.device.type] - 1):
            side.step()

    def _check_gap(self, name: str, gap: float) -> None:
        self.sides[name].gap, most = gap, CLOSE[self.job.device.type]
        if not gap <= most:
            raise ValueError(f"{name}: want gradients within {most} of its own; got {gap:.2e}")

    def _ours(self, side: OurSide) -> None:
        self.sides["ours"].seconds.append(side.step())
        self.work.append(
            {
                "tokens": side.metrics["completion_tokens"],
                "operations": side.metrics["operations"],
                "floors": step_floors(side, self.rates),
            }
        )

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        with GpuWatch() as watch:
            yield
        self.sides[name].gpu = watch.result()

    def result(self, saving: dict[str, float | None]) -> dict[str, Any]:
        """Everything, as JSON has it."""
        device = self.job.device
        work = {what: [row[what] for row in self.work] for what in ("tokens", "operations")}
        work |= {"peak": peak_rate(device_name()) if self.cuda else None, "product": self.rates.product}
        floors = {phase: median(row["floors"][phase] for row in self.work) for phase in PHASES}
        ours = self.sides["ours"]
        sides = {name: summarise(self.job, name, side, ours, work) for name, side in self.sides.items()}
        bars = []
        for name, least in BARS.get(self.job.name, {}).items():
            if ratio := sides.get(name, {}).get("speedup", {}).get("median"):
                wanted = f"at least {least}x its completion tokens/s"
                bars.append(Bar(f"ours over {name}", wanted, f"{ratio:.2f}x", ratio >= least).plain())
        return {
            "workload": self.job.facts,
            "sides": sides,
            "floors": floors | {"step": sum(floors.values())},
            "device_rates": self.rates._asdict(),
            "work": work,
            "environment": environment() | {"on": device.type},
            "bars": bars,
        } | saving


def measure(
    job: Job, folder: Path, rounds: int, peers: Sequence[str] = tuple(PEERS), pedantic: Callable = timing.pedantic
) -> dict[str, Any]:
    """Everything, as JSON has it. `pedantic` runs ours, as pytest-benchmark's does.

    Raises:
        ValueError: a peer does not compute the same.
    """
    with join_ranks() as ranks:
        race = Race(job, rounds, ranks, pedantic)
        ours = (race.one_after_another if race.cuda else race.take_turns)(folder / "peers", peers)
        saving = ours.save(folder / "checkpoints")
        ours.close()
        return race.result(saving)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Whole GRPO steps beside TRL and a plain trainer.")
    parser.add_argument("workload", choices=tuple(WORKLOADS))
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=tuple(PEERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: want 1 or more; got {args.rounds}")
    try:
        workload = find_workload(args.workload)
    except ValueError as error:
        sys.exit(f"bench.steps: {error}")
    with tempfile.TemporaryDirectory() as name:
        job = make_job(Path(name), args.workload, workload)
        result = measure(job, Path(name), args.rounds, args.peers)
    write(result, render(result), args.json)


if __name__ == "__main__":
    main()
