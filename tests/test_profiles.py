"""Recorded steps: what is in a record, and changes planted into copies of the tree that a comparison has to find."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from profiles.changes import compare
from profiles.compare_page import render_comparison
from profiles.compare_text import render
from profiles.groups import GROUPS
from profiles.record import OtherLoad, record
from profiles.stored import load
from profiles.tables import phase_table

REPOSITORY = Path(__file__).parents[1]
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the workload is a CPU's")


def of_copies(test: Callable) -> Callable:
    """Marks of a test of `folders`, which the first of them waits for."""
    return pytest.mark.slow(pytest.mark.timeout(600)(on_a_cpu(test)))


class Plant(NamedTuple):
    """A text of a file and what comes in its place; where the comparison has to find it."""

    file: str
    old: str
    new: str
    phase: str
    group: str


PLANTS = {
    "a wait in the inner loop": Plant(
        "medground/rollout/cache.py",
        "        self._stopped[:rows] = torch.isin(drawn.token, self._stop)\n",
        "        self._stopped[:rows] = torch.isin(drawn.token, self._stop)\n        self._token[0].item()\n",
        "decode",
        "synchronisation",
    ),
    "a product of the head twice": Plant(
        "medground/policy.py",
        "        return linear_grpo(\n            self._scored(packed),\n",
        "        hidden = self._scored(packed)\n"
        "        hidden.detach() @ self.vlm.lm_head.weight.detach().T\n"
        "        return linear_grpo(\n            hidden,\n",
        "update",
        "GEMM",
    ),
    "a reference for a kernel": Plant(
        "medground/rollout/cache.py",
        "from medground_kernels.prefix_decode import prefix_decode\n",
        "from medground_kernels.prefix_decode import prefix_decode_reference as prefix_decode\n",
        "decode",
        "GEMM",
    ),
}


def copy(folder: Path, plant: Plant | None) -> None:
    """A copy of the tree, changed or not."""
    for name in ("kernels", "medground", "bench", "profiles"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".path").mkdir()
    (folder / ".path/medground_kernels").symlink_to("../kernels")
    if plant:
        text = (folder / plant.file).read_text()
        assert text.count(plant.old) == 1, f"{plant.file} has to have this once: {plant.old}"
        (folder / plant.file).write_text(text.replace(plant.old, plant.new))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Copies of the tree with their records, all taken at once: unchanged, unchanged again, and with each plant."""
    base = tmp_path_factory.mktemp("trees")
    copies = {"unchanged": None, "unchanged again": None, **PLANTS}
    found = {name: base / str(number) for number, name in enumerate(copies)}
    for name, plant in copies.items():
        copy(found[name], plant)
    # the copies' coverage is nobody's
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "COV_"))}
    environment = environment | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(Path(__file__).with_name("record_copies.py")), *map(str, found.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    told = [path.read_text()[-2000:] for folder in found.values() if (path := folder / "told").exists()]
    assert done.returncode == 0, "\n".join([done.stderr, *told])
    yield found
    shutil.rmtree(base)


@of_copies
def test_a_record(folders):
    folder = folders["unchanged"] / "record"
    assert {path.name for path in folder.iterdir()} == {"page.html", "profile.json", "trace.json.gz"}
    profile = load(folder)
    assert all(len(seconds) == 3 for seconds in (profile["step"], *profile["phases"].values()))
    traced, rows = profile["traced"], profile["traced"]["kernels"]
    for phase, group in (("prefill", "attention"), ("decode", "GEMM"), ("update", "GEMM")):
        assert any((row["phase"], row["group"]) == (phase, group) for row in rows), (phase, group)
    assert 0.1 * traced["step"] < sum(row["seconds"] for row in rows)
    assert traced["peak_memory"] == max(held for _, held in traced["memory"]) > 1e5
    assert "| update |" in phase_table(profile) and "| update |" in (folders["unchanged"] / "told").read_text()


@of_copies
def test_the_time_line_of_a_record(folders):
    traced = load(folders["unchanged"] / "record")["traced"]
    line = traced["timeline"]
    assert line["phases"][0][:2] == ["data", 0.0]
    assert all(a[2] == b[1] for a, b in zip(line["phases"], line["phases"][1:], strict=False)), "without holes"
    for phase, seconds in traced["seconds"].items():
        drawn = sum(end - begin for name, begin, end in line["phases"] if name == phase)
        assert drawn == pytest.approx(seconds, abs=0.05 * traced["step"]), phase
    assert all(len(bins) == 200 for bins in line["work"].values()) and list(line["work"]) == [
        group for group in GROUPS if any(row["group"] == group and row["seconds"] for row in traced["kernels"])
    ]
    for group, bins in line["work"].items():
        total = sum(row["seconds"] for row in traced["kernels"] if row["group"] == group)
        assert sum(bins) == pytest.approx(total, rel=0.01, abs=1e-4), group


@of_copies
def test_the_same_tree_does_the_same_work(folders):
    before, after = (load(folders[name] / "record") for name in ("unchanged", "unchanged again"))
    found = compare(before, after, threshold=1e9)
    assert not found.is_change, render(found)
    assert "No change." in render_comparison(before, after, found)


@of_copies
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_slowdown_is_found_in_its_place(folders, name):
    plant = PLANTS[name]
    found = compare(load(folders["unchanged"] / "record"), load(folders[name] / "record"), threshold=1e9)
    assert {work.phase for work in found.groups} == {plant.phase}, render(found)
    assert {work.phase for work in found.kernels if work.differs} == {plant.phase}, render(found)
    (work,) = [work for work in found.groups if work.group == plant.group]
    assert work.calls[1] > work.calls[0]


def test_other_load_is_seen():
    load = OtherLoad()
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        end = time.perf_counter() + 3
        while time.perf_counter() < end:
            sum(range(1000))
    finally:
        burn.kill()
        burn.wait()
    cores = load.cores()
    assert cores is None or cores > 0.3


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="want an empty folder or an older profile"):
        record("test" if not torch.cuda.is_available() else "3b-h100", tmp_path)


@on_a_cpu
def test_a_workload_of_a_gpu_needs_one(tmp_path):
    with pytest.raises(ValueError, match="3b-h100: want cuda; a GPU is not visible"):
        record("3b-h100", tmp_path)
