"""Whole GRPO steps of ours, of TRL and of a plain trainer (bench/steps.py); nothing fails on a bar."""

from pathlib import Path

import pytest
import torch

from bench.packed import write
from bench.step_job import make_job
from bench.step_table import render
from bench.step_workloads import WORKLOADS
from bench.steps import PEERS, measure
from bench.table import device_slug

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
ROUNDS = 3 if CUDA else 2
SIDES = tuple(PEERS) if CUDA else ("TRL", "plain")  # on a CPU a minute less; `python -m bench.steps` has all

pytestmark = pytest.mark.timeout(1800)
on_this_device = [name for name, w in WORKLOADS.items() if (w.device == "cuda") == CUDA]


@pytest.mark.parametrize("name", [name for name in on_this_device if name != "test"])
def test_steps(name: str, benchmark, tmp_path: Path, capsys, pytestconfig):
    result = measure(make_job(tmp_path, name, WORKLOADS[name]), tmp_path, ROUNDS, SIDES, pedantic=benchmark.pedantic)
    benchmark.extra_info |= result["sides"]["ours"]["rates"]
    folder = ROOT / ("profiles" if pytestconfig.getoption("--save") else ".benchmarks") / device_slug()
    with capsys.disabled():
        print("\n")
        write(result, render(result), folder / "tables" / f"{name}.json")
