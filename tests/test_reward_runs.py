"""A run with every reward and every choice about groups, and the same one resumed."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from chaos import differences
from launch import torchrun

from medground.config import LossConfig, RewardConfig, load_config, save_config
from medground.encoder_tools import BuildConfig, build_encoder
from medground.rewards.encoders import load_encoder
from medground.train import train

REWARDS = ("format", "spatial", "semantic", "length", "custom")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tiny_job, phantoms: Path, tmp_path_factory):
    """Five steps; the encoder is hardly trained, which the run need not care about."""
    folder = tmp_path_factory.mktemp("rewards")
    build_encoder(BuildConfig(data=str(phantoms), out=str(folder / "encoder"), steps=2))
    (folder / "boxes_wanted.py").write_text(
        "def one(batch):\n    return [[float(len(a.boxes or ()) == 1) for a in group] for group in batch.answers]\n"
    )
    config = tiny_job(folder / "run", **{"steps": 5, "checkpoint.every": 2, "checkpoint.keep": 3, "samples-every": 10})
    reward = RewardConfig(
        spatial="curriculum", curriculum_start=0.0, curriculum_window=4, curriculum_reward=0.0, curriculum_spread=1.0,
        semantic_weight=1.0, encoder=f"phantom:{folder / 'encoder'}", length_weight=0.5, length_buffer=20,
        custom="boxes_wanted:one",
    )  # fmt: skip
    loss = LossConfig(
        beta=0.05,
        micro_batch_tokens=1000,
        per_reward=True,
        drop_zero_spread=True,
        mask_truncated=True,
        resample_prompts=3,
    )
    config = dataclasses.replace(config, reward=reward, loss=loss)
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, max_new_tokens=40, group_size=2, temperature=0.3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("medground.rewards.curriculum.MARGIN", 0.0)  # the tiny model does not get that far
        # every window of four steps is a warning
        patch.setattr("medground.reward_watch.WINDOW", 2)
        patch.setattr("medground.reward_watch.BOUND", -1e9)
        patch.setattr("medground.preflight.load_encoder", (loaded := Mock(wraps=load_encoder)))
        patch.setattr("medground.rewards.total.load_encoder", loaded)
        train(config)
        assert loaded.call_count == 1
        yield folder / "run"


def test_every_reward_is_told(straight: Path):
    rows = metrics(straight)
    assert len(rows) == 5 and all(row[f"reward_{name}"] is not None for row in rows for name in REWARDS)
    assert any(row["reward_semantic"] > 0 for row in rows) and any(row["reward_custom"] > 0 for row in rows)
    assert rows[0]["threshold"] == 0 < rows[-1]["threshold"]
    sample = json.loads((straight / "samples" / "step-000001.jsonl").read_text().splitlines()[0])
    want = sample["reward_length"] * 0.5 + sum(sample[f"reward_{name}"] for name in REWARDS if name != "length")
    assert sample["reward"] == pytest.approx(want)
    assert load_config(straight / "config.json").reward.thresholds == (0.3, 0.5, 0.7)


def test_boxes_and_correlation_are_told(straight: Path):
    rows = metrics(straight)
    assert all(0 <= row["whole_boxes"] + row["tiny_boxes"] <= 1 and 0 < row["box_area"] < 1 for row in rows)
    assert all(row["reward_iou_corr"] is None or -1 <= row["reward_iou_corr"] <= 1 for row in rows)


def test_the_reward_is_audited_before_the_first_step(straight: Path):
    found = json.loads((straight / "audit" / "rewards.json").read_text())
    assert found["template"] == "brief" and found["policies"]["whole image"]["present"]["reward_custom"] == 1
    assert found["policies"]["whole image"]["present"]["reward_length"] <= 0
    assert 2 <= sum(found["records"].values()) <= 16


def test_where_reward_and_iou_part_the_step_has_its_samples(straight: Path):
    (warning,) = [json.loads(line) for line in (straight / "warnings.jsonl").read_text().splitlines()]
    assert warning["step"] == 4 and "the reward rises while the IoU falls: over 4 steps" in warning["text"]
    assert sorted(path.name for path in (straight / "samples").iterdir()) == [
        f"step-00000{step}.jsonl" for step in (1, 4, 5)
    ]
    assert "the reward rises while the IoU falls" in (straight / "report.html").read_text()


def test_a_resumed_run_has_the_curriculum_where_it_was(straight: Path, tmp_path: Path):
    part = tmp_path / "part"
    shutil.copytree(straight, part)
    for name in ("checkpoints/step-000004", "checkpoints/step-000005", "export"):
        shutil.rmtree(part / name)
    for name in ("summary.json", "report.html"):
        (part / name).unlink()
    (part / "config.json").write_text((part / "config.json").read_text().replace(str(straight), str(part)))
    train(dataclasses.replace(load_config(part / "config.json"), resume=True))
    ours, theirs = metrics(part), metrics(straight)
    assert [row["threshold"] for row in ours] == [row["threshold"] for row in theirs]
    for name in ("reward", "loss", "grad_norm", *(f"reward_{name}" for name in REWARDS)):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    assert (part / "warnings.jsonl").read_text() == (straight / "warnings.jsonl").read_text()
    assert [path.name for path in sorted((part / "samples").iterdir())] == [
        path.name for path in sorted((straight / "samples").iterdir())
    ]


def test_two_ranks_earn_and_learn_what_one_does(straight: Path, tmp_path: Path):
    """Groups leave the update on one rank and not on the other, and the curriculum sees those of both."""
    config = dataclasses.replace(load_config(straight / "config.json"), out=str(tmp_path / "run"))
    save_config(config, tmp_path / "config.json")
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(straight.parent)!r})\n"
        "import medground.rewards.curriculum\nmedground.rewards.curriculum.MARGIN = 0.0\n"
        "import medground.reward_watch as watch\nwatch.WINDOW, watch.BOUND = 2, -1e9\n"
        f"from medground.cli import main\nsys.exit(main(['train', '--config', {str(tmp_path / 'config.json')!r}]))\n"
    )
    done = torchrun(2, str(script))
    assert done.returncode == 0, done.stderr
    assert any(0 < row["zero_spread_groups"] < 1 for row in metrics(straight)), "a group was left out"
    assert 1 in {row["resampled_prompts"] for row in metrics(straight)}, "one rank asks while the other has nothing to"
    assert differences(straight, tmp_path / "run", atol=1e-5) == []
    assert (tmp_path / "run" / "warnings.jsonl").exists()
