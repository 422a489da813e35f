"""What every test needs: switches that must be set before torch and Triton load, and a tiny job."""

import fcntl
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    # whether a kernel can be interpreted is settled when its module is imported, whether it is at each call
    os.environ["TRITON_INTERPRET"] = "1"
    for _file in Path(__file__).parents[1].glob("kernels/*.py"):
        importlib.import_module(f"medground_kernels.{_file.stem}")
    os.environ["TRITON_INTERPRET"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that none is left to one process at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def on_the_gpu() -> Iterator[None]:
    """New tensors lie on the GPU where there is one."""
    with torch.device("cuda" if CUDA else "cpu"):
        yield


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways an op runs: in plain torch on the CPU, and its kernels, on the GPU or interpreted.

    New tensors lie on the device in question.
    """
    triton = request.param == "triton"
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", str(int(triton)))
    with torch.device("cuda" if CUDA and triton else "cpu"):
        yield request.param


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process makes and the others use."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.made").exists():
            make(root / name)
            (root / f"{name}.made").touch()
    return root / name


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 phantom films of 56 pixels."""
    from medground.datasets.phantom import PhantomConfig, write_phantom

    def make(folder: Path) -> None:
        write_phantom(PhantomConfig(out=str(folder), count=60, val=8, test=16, size=56), workers=1)

    return _made_once(tmp_path_factory, "phantoms", make)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model after a few steps: it answers, though badly."""
    from medground.base_config import BaseConfig
    from medground.base_model import build_base

    def make(folder: Path) -> None:
        build_base(BaseConfig(out=str(folder), films=100, size=56, steps=100, batch_size=16, lr=4e-3))

    return _made_once(tmp_path_factory, "base", make)


@pytest.fixture(scope="session")
def tiny_job(phantoms: Path, base_folder: Path):
    """tiny_job(out, **{"section.key": value}): the configuration of a run of seconds."""
    from medground.cli import train_config

    def job(out: Path, **changes: object):
        values = {
            "out": out,
            "steps": 5,
            "model.path": base_folder,
            "data.path": phantoms,
            "rollout.prompts-per-step": 4,
            "rollout.group-size": 4,
            "rollout.max-new-tokens": 24,
            "loss.micro-batch-tokens": 250,
            "evaluation.every": 0,
            "evaluation.curve-records": 4,
            # Adam makes rounding noise of tiny gradients as large as this, in an element or two of all
            "optimizer.lr": 1e-4,
            "optimizer.warmup-steps": 2,
            "samples-every": 1,
        } | changes
        words = [[f"--{key}"] if value is True else [f"--{key}", str(value)] for key, value in values.items()]
        return train_config(["demo", *(word for pair in words for word in pair)])

    return job
