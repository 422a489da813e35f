"""The loop: ranks, resumption, micro-batches, references, exports; and what a user may get wrong."""

import dataclasses
import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from uneven_update import LARGEST, all_groups, assert_same_gradient, update

from medground.config import LossConfig, load_config
from medground.predict import Grounder
from medground.sharding import join_ranks
from medground.train import _learning_rate, train

pytestmark = pytest.mark.slow

REPEATABLE = ("reward", "iou", "loss", "grad_norm", "kl", "entropy", "ratio_mean", "completion_tokens")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def tokens(run: Path) -> list[str]:
    return [json.loads(line)["completion"] for file in sorted(run.glob("samples/*")) for line in file.open()]


def assert_same(a: Path, b: Path, atol: float) -> None:
    assert tokens(a) == tokens(b)
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for name in REPEATABLE:
            assert x[name] == pytest.approx(y[name], abs=atol), (x["step"], name)
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], atol=atol, rtol=0, msg=name)


@pytest.fixture(scope="module")
def straight(tiny_job, tmp_path_factory) -> Path:
    """Five steps on one rank, off-policy and with a reference, so that every term of the loss is there."""
    out = tmp_path_factory.mktemp("straight") / "run"
    changes = {"loss.inner-epochs": 2, "loss.beta": 0.05, "checkpoint.every": 2, "model.precision": "float32"}
    train(tiny_job(out, **changes))
    return out


def test_a_run_leaves_what_it_should(straight: Path):
    names = {str(path.relative_to(straight)) for path in straight.rglob("*") if path.is_file()}
    want = {"config.json", "environment.json", "metrics.jsonl", "summary.json", "report.html", "export/config.json"}
    want |= {"eval/baselines.json", "export/README.md", "export/medground.json"}
    want |= {f"eval/step-{step:06d}{kind}" for step in (0, 5) for kind in (".json", ".shuffled.json", ".curve.json")}
    want |= {f"eval/step-{step:06d}{kind}.predictions.jsonl" for step in (0, 5) for kind in ("", ".shuffled", ".curve")}
    want |= {f"samples/step-{step:06d}.jsonl" for step in range(1, 6)}
    assert want <= names
    assert any(name.startswith("tensorboard/") for name in names)
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    rows = metrics(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["ratio_max"] != 1 and rows[1]["kl"] != 0
    sample = json.loads((straight / "samples" / "step-000001.jsonl").read_text().splitlines()[0])
    assert set(sample) == {
        "id", "index", "completion", "finished", "boxes", "iou", "reward", "reward_format", "reward_spatial",
        "advantage", "logp",
    }  # fmt: skip
    summary = json.loads((straight / "summary.json").read_text())
    for key in ("miou_before", "miou_after", "miou_after_shuffled_images", "miou_blind_baseline", "side_after"):
        assert 0 <= summary[key] <= 1
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and len(environment["data_sha256"]) == 64


def test_the_export_answers_as_the_last_evaluation_did(straight: Path, phantoms: Path):
    rows = [json.loads(line) for line in (straight / "eval/step-000005.predictions.jsonl").read_text().splitlines()][:4]
    grounder = Grounder.load(straight / "export")
    for row in rows:
        (found,) = grounder.locate(phantoms / row["image"], row["phrase"])
        assert found.completion == row["completion"]
        assert [list(box) for box in found.boxes] == (row["boxes"] or [])
    card = (straight / "export/README.md").read_text()
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["data_sha256"] in card and all(v in card for v in environment["manifests_sha256"].values())
    assert environment["manifests_sha256"] and f"| {environment['records']['train']} |" in card
    assert str(straight) not in card and str(phantoms) not in card


def test_training_changes_every_weight(straight: Path, base_folder: Path):
    before = load_file(base_folder / "model.safetensors")
    after = weights(straight)
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.fixture(scope="module")
def adapted(tiny_job, tmp_path_factory) -> Path:
    """The same with adapters, which take a larger learning rate."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("adapted") / "run"
    changes = {"loss.inner-epochs": 2, "loss.beta": 0.05, "checkpoint.every": 2, "model.precision": "float32"}
    train(tiny_job(out, **changes, **{"model.lora.rank": 4, "optimizer.lr": 1e-3}))
    return out


def test_adapters_train_the_layers_alone(adapted: Path, base_folder: Path):
    before, after = load_file(base_folder / "model.safetensors"), weights(adapted)
    for name in before:
        trained = name.startswith("model.layers.") and name.endswith("_proj.weight")
        assert torch.equal(before[name], after[name]) != trained, name
    assert "library_name: peft" in (adapted / "export/adapter/README.md").read_text()
    rows = metrics(adapted)
    assert rows[0]["kl"] < 1e-3 and rows[-1]["kl"] > 2 * rows[0]["kl"]
    assert max(row["logp_gap_max"] for row in rows) < 1e-4, "what sampled is what is trained"


@pytest.mark.parametrize("run", ["straight", "adapted"])
def test_a_resumed_run_equals_the_uninterrupted_one(run: str, request: pytest.FixtureRequest, tmp_path: Path):
    straight, part = request.getfixturevalue(run), tmp_path / "part"
    config = dataclasses.replace(load_config(straight / "config.json"), out=str(part))
    shutil.copytree(straight, part)
    # as a run stands that was killed in step 5, with half a line of metrics written
    shutil.rmtree(part / "checkpoints" / "step-000005")
    shutil.rmtree(part / "export")
    for name in ("summary.json", "report.html", "eval/step-000005.json", "samples/step-000005.jsonl"):
        (part / name).unlink()
    text = (part / "metrics.jsonl").read_text()
    (part / "metrics.jsonl").write_text(text[:-40])
    (part / "config.json").write_text((part / "config.json").read_text().replace(str(straight), str(part)))
    train(dataclasses.replace(config, resume=True))
    assert_same(straight, part, atol=0)
    assert (part / "eval" / "step-000005.json").read_text() == (straight / "eval" / "step-000005.json").read_text()


@pytest.mark.parametrize("missing", [[], ["curve"], ["curve", "shuffled"], ["curve", "shuffled", ""]])
def test_a_finished_run_can_be_resumed_without_harm(missing: list[str], straight: Path):
    before = weights(straight)
    files = sorted((straight / "eval").glob("step-000005*"))
    texts = [file.read_text() for file in files]
    for kind in missing:  # stopped within its last evaluation
        (straight / "eval" / f"step-000005{'.' if kind else ''}{kind}.json").unlink()
    train(dataclasses.replace(load_config(straight / "config.json"), resume=True))
    after = weights(straight)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["step"] for row in metrics(straight)] == [1, 2, 3, 4, 5]
    assert [file.read_text() for file in files] == texts


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(loss_type="grpo", beta=0.1),
        LossConfig(loss_type="dr_grpo", beta=0.0, entropy_coef=0.01),
        LossConfig(loss_type="dapo", ratio_level="sequence", beta=0.0),
        LossConfig(loss_type="sapo", beta=0.0),
    ],
    ids=["grpo", "dr_grpo", "dapo", "sapo"],
)
def test_neither_cut_nor_order_changes_the_gradient(loss: LossConfig):
    items = all_groups()
    with join_ranks() as ranks:
        want, stats, _ = update(items, ranks, 10_000, loss)
        for budget, order in ((LARGEST, items), (250, items[::-1]), (10_000, items[3:] + items[:3])):
            ours, again, _ = update(order, ranks, budget, loss)
            assert_same_gradient(ours, want)
            assert again == pytest.approx(stats, abs=2e-6)


def test_records_that_changed_are_not_resumed(straight: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "config.json").write_text((run / "config.json").read_text().replace(str(straight), str(run)))
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"data_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="want the records that"):
        train(dataclasses.replace(load_config(run / "config.json"), resume=True))


def test_checkpointed_activations_change_nothing(tiny_job, tmp_path: Path):
    """Least of all the rollout, whose cache transformers drops in training mode."""
    for kind in ("none", "full"):
        changes = {"model.activation-checkpointing": kind, "model.precision": "float32"}
        train(tiny_job(tmp_path / kind, steps=2, **changes))
    assert_same(tmp_path / "none", tmp_path / "full", atol=1e-5)
    assert abs(metrics(tmp_path / "full")[0]["ratio_max"] - 1) < 1e-4


def test_old_log_probabilities_may_be_rescored(tiny_job, tmp_path: Path):
    """On one rank in float32 the training forward says what came with the tokens, to rounding."""
    for old in ("sampled", "rescored"):
        changes = {"rollout.old-logp": old, "loss.inner-epochs": 2, "model.precision": "float32"}
        train(tiny_job(tmp_path / old, steps=2, **changes))
    assert_same(tmp_path / "sampled", tmp_path / "rescored", atol=1e-5)
    for row in metrics(tmp_path / "rescored"):
        assert 0 < row["logp_gap"] <= row["logp_gap_max"] < 1e-5
    train(tiny_job(tmp_path / "once", steps=2, **{"rollout.old-logp": "rescored"}))
    assert [row["ratio_max"] for row in metrics(tmp_path / "once")] == [1, 1]


def test_a_step_counts_its_tokens_and_seconds(straight: Path):
    for row in metrics(straight):
        assert row["slots_filled"] == 1 and row["decode_steps"] < 24  # its 16 rows fit at once
        assert row["prompt_tokens"] * 3 == row["tokens_avoided"]
        phases = ("data", "prefill", "decode", "reward", "score", "update", "optimizer")
        assert sum(row[f"seconds_{phase}"] for phase in phases) == pytest.approx(row["seconds"])
        tokens = row["completion_tokens"] + row["prompt_tokens"]
        assert row["update_tokens_per_second"] == pytest.approx(tokens / row["seconds_update"])
        assert row["processed_tokens_per_second"] == pytest.approx(tokens / row["seconds"])
        unpacked = tokens + row["tokens_avoided"]
        assert row["unpacked_tokens_per_second"] == pytest.approx(unpacked / row["seconds"])
        assert row["samples_per_second"] == pytest.approx(16 / row["seconds"])
        assert row["operations_per_second"] == pytest.approx(row["operations"] / row["seconds"])
    assert [row["seconds_checkpoint"] > 1e-3 for row in metrics(straight)] == [False, False, True, False, True]


def test_a_frozen_vision_tower_stays(tiny_job, tmp_path: Path, base_folder: Path):
    train(
        tiny_job(
            tmp_path / "run", steps=3, **{"model.freeze-vision": True, "model.activation-checkpointing": "selective"}
        )
    )
    before, after = load_file(base_folder / "model.safetensors"), weights(tmp_path / "run")
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("visual."), name


def test_half_precision_trains_on_augmented_images_from_a_worker(tiny_job, tmp_path: Path):
    changes = {"model.precision": "bfloat16", "data.workers": 1, "data.augment.flip": 0.5, "data.augment.shift": 0.1}
    train(tiny_job(tmp_path / "run", steps=1, **changes))
    assert not multiprocessing.active_children()
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["records_never_mirrored"] > 0
    row = metrics(tmp_path / "run")[0]
    assert math.isfinite(row["grad_norm"]) and 0.8 < row["ratio_min"] <= row["ratio_max"] < 1.25


def test_learning_rate_rises_and_falls(tiny_job, tmp_path: Path):
    changes = {"steps": 10, "optimizer.warmup-steps": 4, "optimizer.lr": 1.0, "optimizer.final-lr-fraction": 0.1}
    config = tiny_job(tmp_path, **changes)
    rates = [_learning_rate(config, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28, 0.1])


def test_the_folder_of_another_run(straight: Path, tiny_job, tmp_path: Path):
    with pytest.raises(ValueError, match="holds one"):
        train(tiny_job(straight))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for other in (tmp_path / "other", tmp_path / "other" / "thesis.txt"):
        with pytest.raises(ValueError, match="it holds other files"):
            train(tiny_job(other))
    with pytest.raises(ValueError, match="has no config"):
        train(tiny_job(tmp_path / "empty", resume=True))
    config = load_config(straight / "config.json")
    other = dataclasses.replace(config, resume=True, seed=5, optimizer=dataclasses.replace(config.optimizer, lr=2e-4))
    with pytest.raises(ValueError, match=r"seed: 5 against 0; optimizer.lr: 0.0002 against 0.0001"):
        train(other)
