"""What a user may get wrong: exit status 2 and a sentence, before any step."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from medground.cli import main
from medground.preflight import check_job
from medground.train import train


def say(capsys, words: list[str]) -> str:
    """What `medground train WORDS` says on standard error, in one line."""
    try:
        status = main(["train", *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def break_records(phantoms: Path, folder: Path, change) -> Path:
    shutil.copytree(phantoms, folder)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    change(folder, rows[0])
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


BROKEN = {
    "missing image": (lambda folder, row: (folder / row["image"]).unlink(), "images/"),
    "no boxes": (lambda folder, row: row.pop("boxes"), "boxes"),
    "box outside": (lambda folder, row: row.update(boxes=[[1, 2, 300, 4]]), "300"),
    "lone surrogate": (lambda folder, row: row.update(phrase="a \ud800"), "surrogate"),
    "special token": (lambda folder, row: row.update(phrase="a <|image_pad|>"), "special tokens"),
}


@pytest.mark.parametrize("fault", list(BROKEN))
def test_faulty_records(fault: str, phantoms: Path, base_folder: Path, tmp_path: Path, capsys):
    change, named = BROKEN[fault]
    folder = break_records(phantoms, tmp_path / "data", change)
    words = ["demo", "--out", str(tmp_path / "run"), "--model.path", str(base_folder), "--data.path", str(folder)]
    text = say(capsys, words)
    assert named in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--data.path": "no/such/folder"}, "no/such/folder"),
        ({"--data.train-split": "dev"}, "dev"),
        ({"--rollout.group-size": "1"}, "rollout.group_size: want >= 2 (advantages compare"),
        ({"--rollout.temperature": "0"}, "rollout.temperature"),
        ({"--model.path": "no/such/model/folder"}, "model.path: want a model folder or a name on the hub"),
        ({"--optimizer.lr": "-1"}, "optimizer.lr"),
        ({"--rollout.max-new-tokens": "200000"}, "want a prompt and 200000 new tokens within the model's context of "),
        ({"--data.min-pixels": "60000000", "--data.max-pixels": "60000000"}, "the largest image 76"),
        (
            {"--loss.micro-batch-tokens": "300"},
            "loss.micro_batch_tokens: want at least 542, a prompt and 8 completions of 64 tokens; got 300; the longest",
        ),
        ({"--rollout.cache-gb": "1e-5"}, "rollout.cache_gb: want at least "),
    ],
)
def test_impossible_values(changes, named, phantoms: Path, base_folder: Path, tmp_path: Path, capsys):
    values = {"--out": str(tmp_path / "run"), "--model.path": str(base_folder), "--data.path": str(phantoms)} | changes
    assert named in say(capsys, ["demo", *(word for pair in values.items() for word in pair)])
    assert not (tmp_path / "run").exists()


def test_a_model_folder_without_processor(phantoms: Path, base_folder: Path, tmp_path: Path, capsys):
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    words = [
        "demo",
        "--out",
        str(tmp_path / "r"),
        "--model.path",
        str(tmp_path / "model"),
        "--data.path",
        str(phantoms),
    ]
    assert "want a model folder with a processor" in say(capsys, words)


def test_adapters_without_peft(tiny_job, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model.lora.rank: adapters want peft"):
        train(tiny_job(tmp_path / "run", **{"model.lora.rank": 4}))
    assert not (tmp_path / "run").exists()


def test_prompts_that_ranks_cannot_share(tiny_job, tmp_path: Path, monkeypatch):
    class Three:
        size = 3

        def gather(self, value):
            return [value] * 3

    with pytest.raises(ValueError, match=r"rollout.prompts_per_step: want a multiple of the 3 ranks; got 4"):
        check_job(tiny_job(tmp_path), Three())
