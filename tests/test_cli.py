"""The command: help at once, verbs that reach their code, mistakes named in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medground import cli
from medground.cli import main, train_config
from medground.config import save_config
from medground.presets import PRESETS


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["train", "demo", "--help"], ["data", "phantom", "--help"], ["base", "--help"]]
    + [["demo", "--help"], ["report", "--help"], ["data", "prepare", "ms-cxr", "--help"]]
    + [["plan", "--help"], ["plan", "demo", "--help"]]
    + [["data", "audit", "--help"], ["prompt", "--help"], ["encoders", "check", "--help"]]
    + [["eval", "--help"], ["predict", "--help"], ["watch", "--help"], ["score", "--help"]]
    + [["eval", "compare", "--help"], ["audit", "rewards", "--help"]],
)
def test_help_needs_no_torch(words: list[str]):
    # torch takes seconds to import; help must come at once
    code = f"""
import sys
from medground.cli import main
try:
    status = main({words!r})
except SystemExit as stop:
    status = stop.code
assert status == 0 and "torch" not in sys.modules, status
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: medground" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fly"], "unknown command 'fly'"),
        (["data", "fly"], "unknown command 'data fly'"),
        (["train", "fly"], "unknown preset 'fly'; known are:\n  demo  "),
        (["train", "--config"], "--config: want a file name"),
        (["train", "--config", "no/such.json"], "no/such.json: want a configuration file"),
    ],
)
def test_mistakes_are_named(words: list[str], named: str, capsys):
    assert main(words) == 2
    out = capsys.readouterr()
    assert named in out.err and "Traceback" not in out.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", "demo", "--rollout.groupsize", "4"], "--rollout.groupsize"),
        (["train", "demo", "--steps", "many"], "--steps"),
        (["train", "demo", "--loss.kl", "k9"], "--loss.kl"),
        (["data", "phantom", "--out", "x", "--size", "3"], "size"),
        (["base"], "--out"),
    ],
)
def test_wrong_options_are_named(words: list[str], named: str, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_one_rank_tells_what_all_know_and_each_what_it_alone_knows(capsys, monkeypatch):
    from medground.sharding import SharedError

    def fail(words: list[str]):
        raise {"shared": SharedError, "own": ValueError}[words[0]]("the file is torn")

    monkeypatch.setitem(cli._COMMANDS, "fail", fail)
    monkeypatch.setenv("RANK", "1")
    assert main(["fail", "shared"]) == 2
    assert capsys.readouterr().err == ""
    assert main(["fail", "own"]) == 2
    assert "error on rank 1: the file is torn" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["fail", "shared"]) == 2
    assert "error: the file is torn" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(capsys, monkeypatch):
    def stop(words: list[str]):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "stop", stop)
    assert main(["stop"]) == 130
    assert capsys.readouterr().err == "medground: interrupted\n"


def test_nothing_asked_shows_the_commands(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_a_saved_configuration_is_taken_up_again(tmp_path: Path):
    config = train_config(["demo", "--steps", "7", "--loss.beta", "0.1", "--model.freeze-vision"])
    assert (config.steps, config.loss.beta, config.model.freeze_vision) == (7, 0.1, True)
    save_config(config, tmp_path / "config.json")
    again = train_config([f"--config={tmp_path / 'config.json'}", "--seed", "3"])
    assert again == train_config(["--config", str(tmp_path / "config.json"), "--seed", "3"])
    assert again.seed == 3 and again.loss == config.loss and again.steps == 7
    assert PRESETS["demo"][1].steps != 7


def test_phantom_and_report_verbs(tmp_path: Path, capsys, monkeypatch):
    words = ["--out", str(tmp_path / "data"), "--count", "12", "--val", "3", "--test", "3", "--size", "56"]
    assert main(["data", "phantom", *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "records.jsonl").read_text().splitlines()]
    assert len(rows) >= 12
    assert main(["report", str(tmp_path / "none"), str(tmp_path / "data")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["report", "one"])
    assert stop.value.code == 2


def test_verbs_hand_over_their_options(monkeypatch, tmp_path: Path):
    import medground.base_model
    import medground.demo
    import medground.train

    seen = []
    for module, name in (
        (medground.base_model, "build_base"),
        (medground.demo, "run_demo"),
        (medground.train, "train"),
    ):
        monkeypatch.setattr(module, name, seen.append)
    assert main(["base", "--out", "b", "--steps", "3"]) == 0
    assert main(["demo", "--films", "700"]) == 0
    assert main(["train", "demo", "--steps", "9"]) == 0
    assert (seen[0].steps, seen[1].films, seen[2].steps) == (3, 700, 9)
    verbs = {"demo", "data phantom", "data prepare", "data audit", "base", "prompt", "train", "plan", "report"}
    verbs |= {"audit rewards", "eval", "eval compare", "predict", "watch", "score", "encoders check", "encoders build"}
    assert set(cli._COMMANDS) == verbs


@pytest.mark.parametrize("source", cli._SOURCES)
def test_each_source_tells_its_options(source: str, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "prepare", source, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: medground data prepare {source} " in told and "--out STR" in told and "--leave-out-faulty" in told


def test_a_source_may_be_named_with_its_options(tmp_path: Path, capsys):
    words = ["--annotations", str(tmp_path / "no.csv"), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["data", "prepare", "csv", *words]) == 2
    assert f"{tmp_path}/no.csv: no such file" in capsys.readouterr().err
    assert main(["data", "prepare", "xray", *words]) == 2
    assert "unknown source 'xray'; known are ms-cxr, chestxray8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["data", "prepare"])
    assert stop.value.code == 2 and "m3d-refseg" in capsys.readouterr().out
