"""Record what whole GRPO steps cost and what they spend it on.

    python -m profiles.record tiny-cpu --out profiles/now            2 prompts through a small model
    python -m profiles.record 3b-h100 --out profiles/now --keep      Qwen2.5-VL-3B's shapes, 16 prompts; kept

Weights are random and a step's number decides how long its completions are (bench/step_workloads.py), so that the same
tree always does the same work. First come steps under the phase clock alone: their seconds are those that count. Then
one step under torch.profiler tells which kernels ran in which phase. The folder gets `profile.json`, which
`profiles.compare` reads, `page.html`, and `trace.json.gz` for Perfetto (ui.perfetto.dev) or chrome://tracing.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.gpu_watch import GpuWatch
from bench.step_floors import measure_rates, step_floors
from bench.step_job import PHASES, make_job
from bench.step_ours import OurSide
from bench.step_workloads import WORKLOADS, find_workload
from bench.table import environment
from medground.sharding import join_ranks
from medground.step_metrics import PHASE_END
from profiles.page import render_page
from profiles.stored import FORMAT, history_path, keep, load_history
from profiles.tables import phase_table
from profiles.trace import Event, Phase, counts, cut_into_phases, idle, kernels, memory_curve, timeline

RATES = (
    "tokens_per_second", "processed_tokens_per_second", "unpacked_tokens_per_second", "samples_per_second",
    "decode_tokens_per_second", "update_tokens_per_second", "operations_per_second", "mfu",
)  # fmt: skip
_STEP = "GRPO step"


def record(name: str, out: Path, steps: int = 5) -> dict[str, Any]:
    """Run a workload and write its profile.

    Raises:
        ValueError: its device is not there, or the folder holds something else than a profile.
    """
    workload = find_workload(name)
    if out.exists() and any(out.iterdir()) and not (out / "profile.json").exists():
        raise ValueError(f"{out}: want an empty folder or an older profile; it holds something else")
    with tempfile.TemporaryDirectory() as scratch, join_ranks() as ranks:
        job = make_job(Path(scratch), name, workload)
        rates = measure_rates(job)
        ours = OurSide(job, ranks)
        for _ in range(2):  # warm up; CUDA graphs are recorded
            ours.step()
        gc.collect()
        timed, load = [], OtherLoad()
        with GpuWatch() as watch:
            for _ in range(steps):
                timed.append(ours.step() | {"metrics": ours.metrics, "floors": step_floors(ours, rates)})
        busy = load.cores()
        traced, taken = _trace(ours)
        metrics = [step["metrics"] for step in timed]
        floors = {phase: median(step["floors"][phase] for step in timed) for phase in PHASES}
        result = {
            "format": FORMAT,
            "workload": job.facts,
            "environment": environment() | {"on": workload.device},
            "others_cores": busy,
            "gpu": watch.result(),
            "phases": {phase: [step[phase] for step in timed] for phase in PHASES},
            "step": [step["step"] for step in timed],
            "floors": floors | {"step": sum(floors.values())},
            "device_rates": rates._asdict(),
            "rates": {rate: median(row[rate] for row in metrics) for rate in metrics[0] if rate in RATES},
            "operations": [row["operations"] for row in metrics],
            "traced": taken,
        } | ours.save(Path(scratch) / "checkpoints")
    out.mkdir(parents=True, exist_ok=True)
    traced.export_chrome_trace(str(out / "trace.json.gz"))
    (out / "page.html").write_text(render_page(result))
    (out / "profile.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


class OtherLoad:
    """How many of the machine's cores other processes use; known on Linux alone."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """The mean since it was made; our own children count as others."""
        if self._start is None:
            return None
        wall, busy = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(busy, 0.0) / wall

    @staticmethod
    def _now() -> tuple[float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        used = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), used - time.process_time()


def _trace(ours: OurSide) -> tuple[profile, dict[str, Any]]:
    """One step under the profiler."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    tracing = profile(activities=activities, profile_memory=True, with_flops=True, acc_events=True)
    with tracing as traced, record_function(_STEP):
        seconds = ours.step()
    assert traced.profiler and traced.profiler.kineto_results
    raw = traced.profiler.kineto_results.events()
    events, changes, ends, inner, start, end = [], [], [], [], 0, 0
    for event in raw:
        name, begin, done = event.name(), event.start_ns(), event.end_ns()
        on_device = event.device_type() == torch.autograd.DeviceType.CUDA
        if name == "[memory]":
            if on_device == cuda:
                changes.append((begin, event.nbytes()))
        elif name in (_STEP, "prefill") or name.startswith(PHASE_END):  # a GPU repeats the host's annotations
            if on_device:
                continue
            if name == _STEP:
                start, end = begin, done
            elif name == "prefill":
                inner.append(Phase(name, begin, done))
            else:
                ends.append((name.removeprefix(PHASE_END), done))
        else:
            events.append(Event(name, begin, done, on_device, event.start_thread_id(), event.flops()))
    phases = cut_into_phases(start, sorted(ends, key=lambda found: found[1]), sorted(inner, key=lambda p: p.start))
    curve = memory_curve(changes, start, end)
    return traced, {
        "step": seconds["step"],
        "seconds": {phase: seconds[phase] for phase in PHASES},
        "kernels": [asdict(kernel) for kernel in kernels(events, phases)],
        "counts": counts(events),
        "idle": idle(events, start, end) if cuda else None,
        "peak_memory": max(held for _, held in curve),
        "memory": curve,
        "timeline": timeline(events, phases, start, end),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what whole GRPO steps cost.")
    parser.add_argument("workload", choices=tuple(WORKLOADS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, beside two to warm up and one traced")
    parser.add_argument("--keep", action="store_true", help="append the record to the device's history in profiles/")
    parser.add_argument("--anyway", action="store_true", help="keep it though the machine was disturbed")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"--steps: want at least 3, for a spread; got {args.steps}")
    try:
        if args.keep:
            load_history(history_path(args.workload))  # damaged, it is refused before the first step
        result = record(args.workload, args.out, args.steps)
        print(phase_table(result))
        print("\n" + ", ".join(f"{args.out}/{name}" for name in ("page.html", "profile.json", "trace.json.gz")))
        if args.keep:
            print(f"Kept in {keep(result, args.anyway)}.")
    except ValueError as error:
        sys.exit(f"profiles.record: {error}")


if __name__ == "__main__":
    main()
