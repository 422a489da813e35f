"""`medground eval`: what it leaves, going on after a stop, what a user may get wrong. On ranks: test_ranks.py."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from medground import evaluate_model as module
from medground.datasets.manifest import load_records
from medground.eval_config import EvalConfig
from medground.eval_folder import Part
from medground.evaluate_model import evaluate_model
from medground.run_folder import hold
from medground.scoring import blind_baseline

pytestmark = pytest.mark.slow

ALL = ("shuffled", "blank", "flipped", "blind", "whole", "centre")
OF_RECORDS = ("true", "shuffled", "blank", "flipped", "whole", "centre")


@pytest.fixture(scope="module")
def asked(base_folder: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    """Of a copy of the model and of the data, which tests may change and put back."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(base_folder, folder / "model")
    shutil.copytree(phantoms, folder / "data")
    return EvalConfig(
        model=str(folder / "model"), data=(str(folder / "data"),), template="brief", max_new_tokens=24, piece=8,
        controls=ALL, out=str(folder / "straight"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(asked: EvalConfig) -> Path:
    evaluate_model(asked)
    return Path(asked.out)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("predictions*")}


def test_what_it_leaves(straight: Path, asked: EvalConfig):
    result = json.loads((straight / "eval.json").read_text())
    records = load_records(asked.data[0])
    test = [record for record in records if record.split == "test"]
    assert result["records"] == len(test) and list(result["evaluations"]) == [*OF_RECORDS, "blind"]
    for name in OF_RECORDS:
        found = result["evaluations"][name]
        predictions = rows(straight / found["predictions"])
        assert [row["id"] for row in predictions] == [record.id for record in test], name
        ious = [row["iou"] for row in predictions if row["truth"]]
        estimate = found["metrics"]["miou"]
        assert estimate["value"] == pytest.approx(sum(ious) / len(ious)) and estimate["n"] == len(ious)
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    train = [record for record in records if record.split == "train"]
    assert result["evaluations"]["blind"] == blind_baseline(train, test)
    assert result["evaluations"]["flipped"]["agreement"]["n"] > 0
    assert result["options"]["dtype"] in ("float32", "bfloat16") and len(result["options"]["model_sha256"]) == 64
    assert result["environment"]["packages"]["torch"]
    assert {path.name for path in straight.iterdir()} == {"eval.json", "options.json", ".lock", *files(straight)}


def test_a_finished_evaluation_is_shown_again(straight: Path, asked: EvalConfig, capsys, monkeypatch):
    monkeypatch.setattr(module, "build_whole", None)  # would be called
    evaluate_model(asked)
    shown = capsys.readouterr().out
    for name in (
        "the model",
        "another patient's image",
        "a grey image",
        "mirrored image",
        "best constant",
        "whole",
        "middle",
    ):
        assert name in shown
    evaluate_model(replace(asked, json=True, workers=1))
    assert json.loads(capsys.readouterr().out) == json.loads((straight / "eval.json").read_text())


class StoppedError(Exception):
    pass


def test_a_stopped_evaluation_goes_on_to_the_same_bytes(straight: Path, asked: EvalConfig, tmp_path: Path, monkeypatch):
    config, add, begun = replace(asked, out=str(tmp_path / "part")), Part.add, []

    def until_the_sixth(part, piece, found):
        begun.append(piece)
        if len(begun) == 6:
            raise StoppedError
        add(part, piece, found)

    monkeypatch.setattr(Part, "add", until_the_sixth)
    with pytest.raises(StoppedError):
        evaluate_model(config)
    monkeypatch.undo()
    part = tmp_path / "part" / "parts" / "rank-0.jsonl"
    part.write_bytes(part.read_bytes()[:-30])  # as if it had been killed within the fifth line
    assert not (tmp_path / "part" / "eval.json").exists()
    again = []
    monkeypatch.setattr(Part, "add", lambda part, piece, found: (again.append(piece), add(part, piece, found)))
    evaluate_model(config)
    assert again[:2] == begun[4:6] and len(again) + 4 == 4 * 4, "what was finished is not asked again"
    assert files(tmp_path / "part") == files(straight)


def test_several_samples(asked: EvalConfig, tmp_path: Path):
    config = replace(asked, split="val", controls=(), samples=3, temperature=1.0, out=str(tmp_path / "out"))
    evaluate_model(config)
    for seed in (0, 1):
        evaluate_model(replace(config, seed=seed, piece=64, out=str(tmp_path / f"{seed}")))
    same, other = ([row["completion"] for row in rows(tmp_path / name / "predictions.jsonl")] for name in ("0", "1"))
    assert same != other
    found = rows(tmp_path / "out" / "predictions.jsonl")
    assert [row["sample"] for row in found] == [0, 1, 2] * (len(found) // 3)
    assert len({row["completion"] for row in found[:3]}) > 1
    assert [row["completion"] for row in found] == same, "whatever the pieces"
    scores = json.loads((tmp_path / "out" / "eval.json").read_text())["evaluations"]["true"]
    best = [max(row["iou"] for row in found[i : i + 3]) for i in range(0, len(found), 3) if found[i]["truth"]]
    assert scores["best_of_k"]["miou"]["value"] == pytest.approx(sum(best) / len(best))
    assert scores["best_of_k"]["miou"]["value"] > scores["metrics"]["miou"]["value"]


def test_another_evaluation_is_refused(straight: Path, asked: EvalConfig, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"options that it was started with; got seed: 1 against 0; max_new_tokens: 25 "
    ):
        evaluate_model(replace(asked, max_new_tokens=25, seed=1))
    for file, changed in (("data/records.jsonl", "data_sha256"), ("model/model.safetensors", "model_sha256")):
        path = straight.parent / file
        kept = path.read_bytes()
        try:
            if changed == "data_sha256":
                path.write_bytes(kept.replace(b"nodule", b"module"))
            else:
                path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            with pytest.raises(ValueError, match=f"got {changed}: '"):
                evaluate_model(asked)
        finally:
            path.write_bytes(kept)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        evaluate_model(replace(asked, out=str(tmp_path)))
    with pytest.raises(ValueError, match="want a folder; got the file"):
        evaluate_model(replace(asked, out=str(tmp_path / "thesis.txt")))
    with hold(straight), pytest.raises(ValueError, match="folder that no run writes to; process"):
        evaluate_model(asked)


def test_a_damaged_part_is_named(asked: EvalConfig, straight: Path, tmp_path: Path):
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    shutil.copyfile(straight / "options.json", out / "options.json")
    (out / "parts" / "rank-0.jsonl").write_text('{"evaluation": "true", "piece": 0, "rows": []}\n{"eval\n{}\n')
    with pytest.raises(ValueError, match=r"rank-0\.jsonl:2: want a finished piece"):
        evaluate_model(replace(asked, out=str(out)))


def test_mistakes_are_named(asked: EvalConfig, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    one_patient = tmp_path / "one"
    shutil.copytree(asked.data[0], one_patient)
    lines = [json.loads(line) for line in (one_patient / "records.jsonl").read_text().splitlines()]
    test = [row for row in lines if row["split"] == "test"]
    few = [row for row in test if row["patient"] == test[0]["patient"]]
    (one_patient / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    for changes, wanted in (
        ({"model": str(tmp_path)}, "holds adapters alone"),
        ({"model": str(tmp_path / "run")}, "is one of a run, whose model is .*run/export"),
        ({"model": str(tmp_path / "nowhere")}, "^model: want a model folder or a name on the hub"),
        ({"data": (str(one_patient),), "controls": ("shuffled",)}, "two patients"),
        ({"data": (str(one_patient),), "controls": ("blind",)}, "want records of split 'train'"),
        ({"data": (str(one_patient),), "split": "val"}, "want records of split 'val'"),
        ({"max_new_tokens": 100_000}, "max_new_tokens: want a prompt and 100000 new tokens within the model's context"),
        ({"cache_gb": 1e-9}, "^cache_gb: want at least"),
    ):
        with pytest.raises(ValueError, match=wanted):
            evaluate_model(replace(asked, out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"samples": 2}, "temperature: want a number > 0 with 2 samples"),
        ({"temperature": -1.0}, "temperature: want 0, or"),
        ({"controls": ("blank", "blank")}, "controls: want each control once"),
        ({"data": ()}, "data: want"),
        ({"piece": 0}, "piece: want >= 1; got 0"),
    ],
)
def test_impossible_options(changes: dict, wanted: str):
    with pytest.raises(ValueError, match=wanted):
        EvalConfig(**({"model": "m", "data": ("d",)} | changes))


def test_its_folder_is_named_after_its_options(asked: EvalConfig):
    options = {"model": "m", "seed": 0}
    names = {module._named(asked, values) for values in (options, options | {"seed": 1})}
    assert len(names) == 2 and all(name.startswith("runs/eval/") and "-model-test-" in name for name in names)
