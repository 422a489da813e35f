"""What a run does when something goes wrong: bad gradients, signals, a full disk, a folder that is taken."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from chaos import _checkpoint, differences
from test_checkpoint import full_disk

from medground import policy as policy_module
from medground.checkpoint import CheckpointError
from medground.cli import main
from medground.config import load_config
from medground.evaluate import Asker
from medground.run_folder import RunFolder, restarted
from medground.train import DivergedError, train
from medground_kernels.linear_grpo import linear_grpo

STEPS = 4


@pytest.fixture(scope="module")
def job(tiny_job):
    """job(out, **changes): a run of four steps, saved after every one."""

    def make(out: Path, **changes):
        values = {"steps": STEPS, "checkpoint.every": 1, "checkpoint.keep": STEPS, "model.precision": "float32"}
        return tiny_job(out, **values | {"evaluation.every": 2} | changes)

    return make


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    train(job(out))
    return out


def poison(monkeypatch, calls) -> None:
    """Make the loss of these calls, counted from 0, not a number."""
    count = iter(range(10_000))

    def poisoned(*args, **options):
        out = linear_grpo(*args, **options)
        return out._replace(loss=out.loss * math.nan) if next(count) in calls else out

    monkeypatch.setattr(policy_module, "linear_grpo", poisoned)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_gradient_that_is_not_finite_is_left_out(job, tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    config = job(run, **{"loss.micro-batch-tokens": 10_000})  # a micro-batch a step
    poison(monkeypatch, {1})
    train(config)
    metrics = rows(run / "metrics.jsonl")
    assert [row["skipped_updates"] for row in metrics] == [0, 1, 0, 0]
    assert metrics[1]["grad_norm"] is None and metrics[1]["loss"] is None and metrics[2]["loss"] is not None
    assert [path.name for path in (run / "skipped").iterdir()] == ["step-000002.jsonl"]
    assert (run / "skipped" / "step-000002.jsonl").read_text() == (run / "samples" / "step-000002.jsonl").read_text()
    states = []
    for step in (1, 2, 3):
        folder = tmp_path / str(step) / "checkpoints"
        shutil.copytree(run / "checkpoints" / f"step-{step:06d}", folder / "step-0")
        states.append(_checkpoint(folder.parent))
    one, two, three = states
    assert all(torch.equal(one[name], two[name]) for name in one), "neither weights nor moments move"
    assert any(not torch.equal(two[name], three[name]) for name in two)
    assert "NaN" not in (run / "report.html").read_text()


def test_too_many_of_them_end_the_run(job, tmp_path: Path, monkeypatch, capsys):
    run = tmp_path / "run"
    poison(monkeypatch, range(10_000))
    config = job(run, **{"optimizer.max-skipped": 1})
    with pytest.raises(DivergedError, match=r"not finite in 2 steps in a row, up to step 2; .*run/skipped has "):
        train(config)
    assert len(rows(run / "metrics.jsonl")) == 2 and len(list((run / "skipped").iterdir())) == 2
    # what was counted is part of the state
    assert main(["train", "--config", str(run / "config.json"), "--resume"]) == 1
    assert "optimizer.max_skipped: gradients were not finite in 2 steps in a row" in capsys.readouterr().err


def interrupt(monkeypatch, call: int, number: int) -> None:
    """A signal at the `call`-th decoding step."""
    count, inner = iter(range(1, 100_000)), Asker.stop

    def stop(self) -> bool:
        if next(count) == call:
            os.kill(os.getpid(), number)
        return inner(self)

    monkeypatch.setattr(Asker, "stop", stop)


@pytest.mark.parametrize(("call", "number"), [(3, signal.SIGTERM), (70, signal.SIGUSR1), (95, signal.SIGTERM)])
def test_a_signal_ends_a_run_that_then_goes_on(call, number, straight: Path, job, tmp_path: Path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, call, number)
        train(job(run))
    said = capsys.readouterr().err
    assert f"{signal.Signals(number).name}: ended after " in said and "--resume goes on" in said
    assert not (run / "summary.json").exists()
    train(job(run, resume=True))
    assert differences(straight, run) == []


def test_a_folder_belongs_to_one_run(straight: Path):
    config = dataclasses.replace(load_config(straight / "config.json"), resume=True)
    holder = RunFolder(config)
    try:
        with pytest.raises(ValueError, match=rf"no run writes to; process {os.getpid()} on \S+ does"):
            train(config)
    finally:
        holder.close()
    train(config)


def test_a_folder_that_cannot_be_written(job, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.*: want a folder that can be written; got: Not a directory"):
        train(job(tmp_path / "file" / "run"))


def test_a_full_disk_ends_the_run_and_it_goes_on_later(straight: Path, job, tmp_path: Path, capsys):
    run = tmp_path / "run"
    train(job(run, steps=1))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": STEPS}))
    with full_disk(100_000), pytest.raises(CheckpointError, match=r"are free there\); the last one is step-000001"):
        train(job(run, resume=True))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    train(job(run, resume=True))
    assert (run / "summary.json").exists()


def test_restarts_go_on_by_themselves(straight: Path, job, tmp_path: Path, monkeypatch):
    config = job(tmp_path / "run")
    assert not restarted(config)
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not restarted(config), "it had not begun"
            assert restarted(job(straight))
            patch.setenv(name, "0")
            assert not restarted(job(straight))
