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
from two_hosts import two_hosts, why_not

from medground.train import train

pytestmark = pytest.mark.slow


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
    assert re.search(r"no sign of life for \d s from rank 1 on ", said) and " of step " in said
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


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_host_that_is_cut_off_is_named_and_comes_back(two_ranks: Path, options: list[str], tmp_path: Path):
    """Neither host does more than wait: torchrun on both starts again when the link is back."""
    run, logs = tmp_path / "run", [tmp_path / "a.txt", tmp_path / "b.txt"]
    words = ["-m", "medground.train", *options, "--out", str(run), "--checkpoint.every", "1"]
    # sharded as the run to compare with, not a replica on each host, whose gradients are summed in another order
    words += ["--timeout-minutes", "0.1", "--sharding.replicas", "1"]

    def wait_for(condition, seconds: float) -> float:
        start = time.monotonic()
        while not condition() and time.monotonic() < start + seconds:
            time.sleep(0.1)
        assert condition(), "\n".join(log.read_text()[-3000:] for log in logs)
        return time.monotonic() - start

    metrics = run / "metrics.jsonl"
    with two_hosts() as hosts:
        jobs = [hosts.torchrun(number, words, log, sys.executable) for number, log in enumerate(logs)]
        wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 200)
        hosts.link(up=False)
        waited = wait_for(lambda: all("medground: error" in log.read_text() for log in logs), 60)
        assert waited < 20
        assert re.search(r"rank 0 on host-a: no sign of life for \d s from rank 1 on host-b \(", logs[0].read_text())
        assert "rank 1 on host-b: no answer for 6 s from 10.77.0.1, the host that keeps" in logs[1].read_text()
        hosts.link(up=True)
        wait_for(lambda: all(job.poll() is not None for job in jobs), 200)
        assert [job.returncode for job in jobs] == [0, 0]
    assert chaos.differences(two_ranks, run) == []
