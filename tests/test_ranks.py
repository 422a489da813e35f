"""Runs of several ranks: they equal one, they come back from being killed, and a rank that hangs is named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos
import pytest
import torch
from launch import environment, torchrun

from medground.train import train


@pytest.fixture(scope="module")
def options(phantoms: Path, base_folder: Path) -> list[str]:
    """Off-policy and with a reference, so that every term of the loss is there."""
    return chaos.words(phantoms, base_folder, steps=5)


@pytest.fixture(scope="module")
def two_ranks(options: list[str], tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(2, "-m", "medground.train", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def test_two_ranks_equal_one(two_ranks: Path, options: list[str], tmp_path: Path):
    from medground.cli import train_config

    out = tmp_path / "one"
    if torch.cuda.device_count() == 1:  # two ranks cannot share one GPU: both on the CPU
        assert torchrun(2, "-m", "medground.train", *options, "--out", str(out)).returncode == 0
    else:
        train(train_config([*options, "--out", str(out)]))
    assert chaos.differences(out, two_ranks, atol=1e-5) == []


def test_a_killed_run_equals_one_that_was_not(two_ranks: Path, options: list[str], tmp_path: Path):
    """The short form of `make chaos`."""
    plan = [
        {"moment": "before the rename", "rank": 0, "count": 1, "signal": "SIGKILL"},
        {"moment": "backward", "rank": 1, "count": 3, "signal": "SIGTERM"},
        {"moment": "export", "rank": 0, "count": 1, "signal": "SIGKILL"},
    ]
    codes = chaos.run(options, tmp_path / "run", tmp_path / "chaos", plan)
    assert len(list((tmp_path / "chaos").glob("struck-*"))) == len(plan)
    assert codes == [0, 0], "SIGTERM of a rank ends both in peace, kills are mended by torchrun"
    assert re.search(r"SIGTERM: ended after \d of 5 steps", (tmp_path / "chaos" / "launch-1.txt").read_text())
    assert chaos.differences(two_ranks, tmp_path / "run") == []


def change(path: Path, what: str, by: str) -> None:
    text = path.read_text()
    assert what in text
    path.write_text(text.replace(what, by, 1))


def test_the_comparison_sees_differences(two_ranks: Path, tmp_path: Path):
    other = tmp_path / "run"
    shutil.copytree(two_ranks, other)
    assert chaos.differences(two_ranks, other) == []
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    change(other / "metrics.jsonl", f'"loss": {rows[0]["loss"]}', f'"loss": {rows[0]["loss"] + 1e-9}')
    change(other / "samples" / "step-000003.jsonl", '"index": 1', '"index": 7')
    (other / "eval" / "step-000000.json").unlink()
    shutil.rmtree(other / "checkpoints" / "step-000005")
    found = chaos.differences(two_ranks, other)
    assert {"metrics: 1 loss", "samples/step-000003.jsonl", "eval/step-000000.json: in one run alone"} <= set(found)
    assert any(line.startswith("checkpoint: only one has") for line in found)


def test_a_rank_that_is_stopped_is_named(options: list[str], tmp_path: Path):
    """It gives no sign of life, and its peer, which waits for it, says so within the time-out."""
    folder = tmp_path / "chaos"
    folder.mkdir()
    fault = {"moment": "backward", "rank": 1, "count": 3, "signal": "SIGSTOP"}
    (folder / "plan.json").write_text(json.dumps([fault]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(Path(chaos.__file__).with_name("chaos_rank.py")), *options]
    words += ["--out", str(tmp_path / "run"), "--timeout-minutes", "0.1"]
    with subprocess.Popen(
        [*launch, *words],
        env=environment(2, CHAOS=str(folder)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        said, struck = "", None
        try:
            assert job.stderr
            for line in job.stderr:
                struck = struck or ((folder / "struck-00").exists() and time.monotonic())
                if "medground: error" in line:
                    said, waited = line, time.monotonic() - struck
                    break
        finally:
            for pid in [job.pid, *children(job.pid)]:
                os.kill(pid, signal.SIGKILL)
    assert "no sign of life for 6 s from rank 1 on " in said and " of step " in said
    assert waited < 20


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def test_ranks_with_different_configurations(phantoms: Path, base_folder: Path, tmp_path: Path):
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nfrom medground.cli import main\n"
        f"sys.exit(main(['train', 'demo', '--out', {str(tmp_path / 'run')!r}, '--model.path', {str(base_folder)!r}, "
        f"'--data.path', {str(phantoms)!r}, '--seed', os.environ['RANK']]))\n"
    )
    done = torchrun(2, str(script))
    assert done.returncode != 0
    assert "rank 1 was started with another configuration than rank 0: seed: 0 against 1" in done.stderr
    assert not (tmp_path / "run").exists()
