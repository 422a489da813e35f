"""The kernels as they are compiled for an H100, with the Triton installed and with the oldest one we promise."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OTHER_TRITON = ROOT / ".path" / "triton-3.6.0"

pytest.importorskip("triton", reason="needs Triton, which has wheels for Linux alone")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["installed", "3.6.0"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m bench.compiled --json` writes."""
    folder = tmp_path_factory.mktemp("compiled")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    if request.param != "installed":
        if not OTHER_TRITON.is_dir():
            pytest.skip(f"no triton {request.param} in {OTHER_TRITON.relative_to(ROOT)}")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OTHER_TRITON), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "bench.compiled", "--json", str(folder / "table.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "table.json").read_text())
    assert request.param in ("installed", written["triton"])
    return written


def kernels() -> dict[str, ast.FunctionDef]:
    """Every kernel that is launched from Python, by module and name."""
    return {
        f"{file.stem}.{node.name}": node
        for file in sorted((ROOT / "kernels").glob("*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def walks_the_vocabulary(kernel: ast.FunctionDef) -> bool:
    """Whether a kernel reads the V logits of a row, block by block."""
    names = {arg.arg for arg in kernel.args.args}
    return "V" in names and any("BLOCK" in name for name in names)


def test_the_table_has_every_kernel(table: dict[str, Any]) -> None:
    assert {row["kernel"] for row in table["rows"]} == kernels().keys()
    assert table.keys() == {"triton", "torch", "target", "commit", "rows"} and table["target"] == "sm_90"
    for row in table["rows"]:
        assert list(row) == ["kernel", "shape", "registers", "spills", "shared_memory", "load_bytes"]


def test_nothing_spills(table: dict[str, Any]) -> None:
    assert [row for row in table["rows"] if row["spills"]] == []


def test_loads_of_logits_are_16_bytes_wide(table: dict[str, Any]) -> None:
    walking = {name for name, kernel in kernels().items() if walks_the_vocabulary(kernel)}
    assert {"token_logprob._logprob_split_kernel", "token_logprob._logprob_backward_kernel"} <= walking
    for size in ("3B", "7B"):
        rows = [row for row in table["rows"] if row["kernel"] in walking and row["shape"].startswith(size)]
        assert {row["kernel"] for row in rows} == walking
        assert [row for row in rows if row["load_bytes"] != 16] == []


def test_registers_leave_room_for_many_programs(table: dict[str, Any]) -> None:
    # of 65536 a processor has: 64 a thread let 1024 threads be there at once, 128 half of them
    for row in table["rows"]:
        assert row["registers"] <= (64 if row["kernel"].startswith("token_logprob.") else 128), row
