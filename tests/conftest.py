"""What every test needs: switches that must be set before torch and Triton load, and a tiny job."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def on_the_gpu() -> Iterator[None]:
    """New tensors lie on the GPU where there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 phantom films of 56 pixels."""
    from medground.datasets.phantom import PhantomConfig, write_phantom

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom(PhantomConfig(out=str(folder), count=60, val=8, test=16, size=56), workers=1)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model after a few steps: it answers, though badly."""
    from medground.base_config import BaseConfig
    from medground.base_model import build_base

    folder = tmp_path_factory.mktemp("base")
    build_base(BaseConfig(out=str(folder), films=100, size=56, steps=100, batch_size=16, lr=4e-3))
    return folder


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
            "loss.micro-batch-groups": 1,
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
