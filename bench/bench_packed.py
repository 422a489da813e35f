"""A shared prompt beside padded rows, an update beside DeepSpeed's: each program in a process of its own.

Their tables are printed, their JSON lies beside that of the kernels; nothing fails on a bar.
"""

import gc
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.table import device_slug

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(DEVICE == "cpu", reason="minutes on a CPU: python -m bench.packed, python -m bench.zero"),
]


@pytest.fixture
def program(capsys, pytestconfig):
    """program(name, *options): run bench.<name>, print what it prints, keep its JSON."""

    def run(name: str, *options: str) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        folders = [ROOT / ".benchmarks"] + [ROOT / "bench/results"] * pytestconfig.getoption("--save")
        files = [folder / f"{name.replace('_', '-')}-{device_slug()}.json" for folder in folders]
        command = [sys.executable, "-m", f"bench.{name}", "--device", DEVICE, "--json", str(files[0]), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        for copy in files[1:]:
            copy.write_text(files[0].read_text())
        with capsys.disabled():
            print(f"\n\n{done.stdout}")

    return run


def test_packed(program):
    program("packed")


def test_zero(program):
    if find_spec("deepspeed") is None:
        pytest.skip("not installed: deepspeed")
    program("zero", *(("--checkpointing",) if DEVICE == "cuda" else ("--prompts", "1", "--rounds", "2")))
