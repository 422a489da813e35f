"""Steps on 2 and 4 ranks, replicated and sharded in any way, equal those of one; and so do their checkpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eight_bit import has_torchao
from rank_runs import SAVED, SAVING, SHARDED, Run
from safetensors.torch import load_file
from uneven_update import assert_same_gradient

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, phantoms: Path) -> Path:
    """What `rank_runs` writes; on CPUs, since its processes are forked and more than there may be GPUs."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).with_name("rank_runs.py"))
    root = Path(__file__).parents[1]  # where bench is
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    words = [sys.executable, script, str(folder), str(base_folder), str(phantoms)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def load(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def alone(run: Run) -> str:
    return Run(run.lora, run.tied, 1).name


@pytest.mark.parametrize("run", SHARDED, ids=lambda run: run.name)
def test_neither_ranks_nor_replicas_nor_recomputation_change_a_step(run: Run, folder: Path):
    found, want = load(folder, run.name), load(folder, alone(run))
    assert found.keys() == want.keys()
    assert len(want["loss"]) == len(want["grad_norm"]) == 5 and want["grad_norm"].min() > 0.1
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("run", SAVING, ids=lambda run: run.name)
def test_a_checkpoint_goes_on_with_other_ranks(run: Run, folder: Path):
    found, want = load(folder, f"{run.name}-resumed"), load(folder, alone(run))
    assert found.keys() == want.keys()
    for name, value in want.items():
        of_steps = value.shape == want["loss"].shape and " " not in name and "vlm" not in name
        torch.testing.assert_close(found[name], value[SAVED:] if of_steps else value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("run", SAVING, ids=lambda run: run.name)
def test_the_export_is_what_decodes(run: Run, folder: Path):
    exported = load_file(folder / f"{run.name}-export" / "model.safetensors")
    decodes = {n: w for n, w in load(folder, run.name).items() if n.startswith("decodes ")}
    assert len(exported) == len(decodes)
    for name, weight in decodes.items():
        hub = re.sub(r"^decodes vlm\.(model\.(?=visual)|(model\.)language_model\.|)", r"\2", name)
        torch.testing.assert_close(exported[hub], weight, atol=1e-6, rtol=0, msg=name)


def test_nor_does_how_groups_lie_on_ranks(folder: Path):
    """Rank 0 has nearly all the work, rank 1 hardly an image; groups move, and one rank runs along without any."""
    two, one = (torch.load(folder / f"gradient-{size}.pt", weights_only=True) for size in (2, 1))
    assert two["moved"]
    assert_same_gradient(two["weights"], one["weights"])
    assert two["statistics"] == pytest.approx(one["statistics"], abs=2e-6)


def test_a_rank_loads_its_own_rows_alone(folder: Path):
    """In resident memory, the pages of open files included."""
    whole = 2 * sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))  # float32 of bfloat16
    one, two = (load(folder, f"loading-{size}")["bytes"] for size in (1, 2))
    assert one > 0.9 * whole, "the measure sees a model"
    assert two < 0.7 * whole


@pytest.mark.skipif(not has_torchao(), reason="no torchao: make .path/torchao-0.18.0")
@pytest.mark.parametrize("ranks", [2, 4])
def test_moments_in_8_bits_do_not_depend_on_ranks(ranks: int, folder: Path):
    one, more = load(folder, "eight-bit-1"), load(folder, f"eight-bit-{ranks}")
    assert sum("codes" in name for name in more) == 2 * 3
    for name, value in more.items():
        assert torch.equal(one[name], value), name
        assert torch.equal(one[name.replace("from 0", "from 2")], value), f"{name}, gone on from two ranks' checkpoint"


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions.flipped.jsonl"])
def test_an_evaluation_depends_neither_on_ranks_nor_on_a_kill(name: str, folder: Path):
    one, two = ([json.loads(line) for line in (folder / f"eval-{n}" / name).open()] for n in (1, 2))
    assert len(one) == len(two) > 26 and {row["sample"] for row in one} == {0, 1}
    for a, b in zip(one, two, strict=True):
        assert a | {"logp": 0} == b | {"logp": 0}
        assert a["logp"] == pytest.approx(b["logp"], abs=1e-5)
    results = [json.loads((folder / f"eval-{n}" / "eval.json").read_text()) for n in (1, 2)]
    assert results[0]["evaluations"] == results[1]["evaluations"]
    assert [result["environment"]["ranks"] for result in results] == [1, 2]
