"""AdamW in float32 and in 8 bits: what it is asked for, what it comes to, and its state as plain tensors."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from eight_bit import has_torchao
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from medground.adamw import adamw, need_torchao, set_learning_rate, state_of
from medground.config import OptimizerConfig
from medground.sharding import join_ranks
from medground.train import train

KINDS = ["adamw", "adamw-8bit"]
SHAPES = {
    "matrix": (24, 512),
    "adapter": (96, 64),
    "odd": (60, 180),
    "vector": (300,),
    "short": (8, 64),
    "small": (5, 3),
}
CODED = ("matrix", "adapter")
"""Those in 8 bits: large enough, their rows a whole number of blocks."""


def need(kind: str) -> None:
    if kind == "adamw-8bit" and not has_torchao():
        pytest.skip("no torchao: make .path/torchao-0.18.0")


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step once a shape, half a minute each on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES.values()]


def step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for weight in weights:
        grad = torch.randn(weight.shape, generator=generator)
        weight.grad = distribute_tensor(grad, weight.device_mesh) if isinstance(weight, DTensor) else grad
    optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_adamw(kind: str):
    need(kind)
    config = OptimizerConfig(kind=kind, lr=1e-2, beta1=0.8, beta2=0.95, weight_decay=0.1)
    ours, theirs = parameters(), parameters()
    optimizer = adamw(ours, config)
    plain = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for number in range(4):
        for each in (optimizer, plain):
            set_learning_rate(each, 1e-2 / (number + 1))
        step(optimizer, ours, number)
        step(plain, theirs, number)
    for name, weight, want, start in zip(SHAPES, ours, theirs, parameters(), strict=True):
        coded = kind == "adamw-8bit" and name in CODED
        off = (weight - want).norm() / (want - start).norm()
        assert 1e-3 * coded <= off <= (3e-2 if coded else 1e-5), (name, off)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_plain_tensors_in_place(kind: str):
    """Zeros before the first step; whoever fills them has filled the optimizer's."""
    need(kind)
    config = OptimizerConfig(kind=kind, lr=1e-2)
    with join_ranks() as ranks:

        def sharded() -> list[nn.Parameter]:
            return [nn.Parameter(distribute_tensor(p.data, ranks.mesh, [Shard(0)])) for p in parameters()]

        ours, theirs = sharded(), sharded()
        first, second = adamw(ours, config), adamw(theirs, config)
        for number in range(3):
            step(first, ours, number)
        for mine, other in zip(ours, theirs, strict=True):
            source, target = state_of(first, mine), state_of(second, other)
            assert source.keys() == target.keys()
            for name, value in source.items():
                assert type(whole(value)) is torch.Tensor and value.dtype in (torch.float32, torch.uint8)
                assert name == "step" or value.shape[0] == mine.shape[0]
                assert not whole(target[name]).any()
                target[name].copy_(value)
            with torch.no_grad():
                other.copy_(mine)
        step(first, ours, 3)
        step(second, theirs, 3)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(whole(mine), whole(other))
        names = [sorted(state_of(first, weight)) for weight in ours]
    plain = ["exp_avg", "exp_avg_sq", "step"]
    coded = ["exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale", "step"]
    assert names == [coded if kind != "adamw" and name in CODED else plain for name in SHAPES]


def test_blocks_lie_within_rows():
    need("adamw-8bit")
    weights = parameters()
    optimizer = adamw(weights, OptimizerConfig(kind="adamw-8bit"))
    state = {name: state_of(optimizer, weight) for name, weight in zip(SHAPES, weights, strict=True)}
    assert state["matrix"]["exp_avg.scale"].shape == (24, 2)
    assert state["adapter"]["exp_avg_sq.scale"].shape == (96, 1)
    held = sum(t.nbytes for name, t in state["matrix"].items() if name != "step")
    assert held == 24 * 512 * 2 * (1 + 4 / 256)


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(
        ValueError, match=r"optimizer.kind: adamw-8bit wants torchao: pip install medground\[8bit\]; got"
    ):
        need_torchao()


def test_a_run_says_so_before_its_first_step(tiny_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=r"optimizer.kind: adamw-8bit wants torchao"):
        train(tiny_job(tmp_path / "run", **{"optimizer.kind": "adamw-8bit"}))
    assert not (tmp_path / "run").exists()


def test_a_run_in_8_bits_goes_on_exactly(tiny_job, tmp_path: Path):
    need("adamw-8bit")
    straight, part = tmp_path / "straight", tmp_path / "part"
    config = tiny_job(straight, steps=3, **{"optimizer.kind": "adamw-8bit", "checkpoint.every": 2})
    train(config)
    train(dataclasses.replace(config, out=str(part)))
    shutil.rmtree(part / "checkpoints" / "step-000003")
    shutil.rmtree(part / "export")
    train(dataclasses.replace(config, out=str(part), resume=True))
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (part, straight))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
