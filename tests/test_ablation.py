"""The ablation: its tables on made-up runs, its configurations, what is done again; no training."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from tqdm import tqdm

from bench.ablation import ARMS, collect, run_config, template_of, train_all, train_arm, unfinished
from bench.ablation_table import METRICS, Run, over_seeds, read_run, render, summarise
from medground.config import load_config, save_config

NAN = float("nan")


def made_up(mean: float, seed: int, records: int = 300, shift: float = 0.0) -> Run:
    """Records of patients with two each, who are alike; `shift` is added to what the seed gives."""
    rng = np.random.default_rng(seed)
    score = np.repeat(rng.normal(mean, 0.2, records // 2), 2) + shift
    absent = np.where(np.arange(records) % 10 == 0, 1.0, NAN)
    scores = dict.fromkeys(METRICS, score) | {"absent": absent}
    figures = {"tokens": 20.0 + seed, "shuffled": 0.2, "sampled": 0.3, "blind": 0.25, "seconds": 60.0}
    return Run([str(i) for i in range(records)], [f"p{i // 2}" for i in range(records)], scores, figures)


def test_a_mean_over_seeds_and_its_interval():
    runs = {seed: made_up(mean, seed) for seed, mean in ((1, 0.3), (2, 0.5))}
    patients = {seed: run.patients for seed, run in runs.items()}
    found = over_seeds(patients, {seed: run.scores["miou"] for seed, run in runs.items()})
    means = [run.scores["miou"].mean() for run in runs.values()]
    assert found["value"] == pytest.approx(np.mean(means)) and found["spread"] == pytest.approx(np.std(means, ddof=1))
    # 150 patients of two records alike: the mean of a seed has a deviation of 0.2 / sqrt(150), of both a sqrt(2)th
    half = 1.96 * 0.2 / np.sqrt(150)
    for seed, mean in zip(runs, means, strict=True):
        one = found["seeds"][seed]
        assert one["n"] == 300 and one["value"] == pytest.approx(mean)
        assert one["high"] - one["low"] == pytest.approx(2 * half, rel=0.2)
    assert found["high"] - found["low"] == pytest.approx(2 * half / np.sqrt(2), rel=0.2)
    assert found["low"] < found["value"] < found["high"]
    assert found == over_seeds(patients, {seed: run.scores["miou"] for seed, run in runs.items()}), "the same again"


def test_what_does_not_apply_does_not_count():
    scores = np.array([1.0, NAN, 0.0, NAN])
    found = over_seeds({1: list("aabb")}, {1: scores}, 200)
    assert found["value"] == 0.5 and found["seeds"][1]["n"] == 2 and found["spread"] is None
    assert found["low"] == 0 and found["high"] == 1
    none = over_seeds({1: list("aabb"), 2: list("ab")}, {1: scores, 2: np.array([NAN, NAN])}, 200)
    assert none["value"] is None and none["seeds"][2]["n"] == 0 and none["seeds"][1]["value"] == 0.5


def test_differences_are_those_of_the_same_records():
    soft = {seed: made_up(0.4, seed) for seed in (1, 2, 3)}
    better = {seed: made_up(0.4, seed, shift=0.02 * seed) for seed in (1, 2)}
    found = summarise({"soft": soft, "hard": better}, "soft", 500)
    at = found["differences"]["hard"]["miou"]
    assert set(found["differences"]) == {"hard"} and list(at["seeds"]) == [1, 2]
    assert at["value"] == pytest.approx(0.03) and at["spread"] == pytest.approx(0.02 / np.sqrt(2))
    assert at["low"] == pytest.approx(at["high"]), "every record gained alike: nothing is left to chance"
    assert found["arms"]["hard"]["tokens"] == 21.5 and found["arms"]["hard"]["absent"]["value"] == 1
    text = render(found, "soft")
    assert "| hard | +0.030 [+0.030, +0.030] |" in text and "| +0.020, +0.040 | 0.014 |" in text
    assert text.count("| hard | ") == 1 + 1 + 2 and "mIoU of 0.250" in text
    wrong = {1: soft[1]._replace(ids=["x", *soft[1].ids[1:]])}
    with pytest.raises(ValueError, match="hard, seed 1: want the held-out records of soft"):
        summarise({"soft": soft, "hard": wrong}, "soft", 10)
    assert "minus" not in render(summarise({"hard": better}, "soft", 10), "soft")


def test_every_arm_is_a_run_that_can_be_asked_for(tmp_path: Path):
    configs = {arm: run_config(tmp_path, arm, 12, 100) for arm in ARMS}
    for arm, config in configs.items():
        save_config(config, tmp_path / "a.json")
        assert load_config(tmp_path / "a.json") == config
        assert config.out.endswith(f"12/{arm}") and config.seed == 12 and config.prompt.template == template_of(arm)
    rewards = {arm: config.reward for arm, config in configs.items()}
    assert rewards["format"].spatial_weight == 0 < rewards["format"].format_weight
    assert all(rewards[arm].spatial == arm for arm in ("soft", "hard", "curriculum", "giou"))
    semantic = {arm: reward.semantic for arm, reward in rewards.items() if reward.semantic_weight}
    assert semantic == {"soft+cosine": "cosine", "soft+contrast": "contrast"}
    assert rewards["soft"] == rewards["soft+chain"] and configs["soft"].model != configs["soft+chain"].model
    assert configs["soft+chain"].prompt.template == "brief-chain" and configs["soft"].prompt.template == "brief"


def finished(config, before: str, after: str) -> None:
    """A run's folder, as far as tables want it: one record, and what was answered to it."""
    run = Path(config.out)
    (run / "eval").mkdir(parents=True)
    save_config(config, run / "config.json")
    row = {"id": "r", "image": "", "width": 10, "height": 10, "phrase": "left nodule", "category": "nodule",
           "patient": "p", "truth": [[6, 0, 10, 10]], "logp": -1.0, "iou": 1.0}  # fmt: skip
    for step, text, boxes in ((0, before, [[0, 0, 4, 10]]), (config.steps, after, [[6, 0, 10, 10]])):
        line = json.dumps(row | {"completion": text, "boxes": boxes})
        (run / f"eval/step-{step:06d}.predictions.jsonl").write_text(line + "\n")
    metrics = [{"step": i + 1, "completion_length": 40.0 - i, "iou": i / 20} for i in range(config.steps)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    summary = {"miou_before_shuffled_images": 0.1, "miou_after_shuffled_images": 0.3, "miou_blind_baseline": 0.2}
    (run / "summary.json").write_text(json.dumps(summary | {"seconds_total": 70.0}))


CHAINED = '<think>left lung {"bbox_2d": [5, 0, 10, 10]}</think><answer>{"bbox_2d": [6, 0, 10, 10]}</answer>'
PLAIN = '<think>left</think><answer>{"bbox_2d": [6, 0, 10, 10]}</answer>'


def test_finished_runs_are_read_and_not_run_again(tmp_path: Path, capsys):
    configs = [run_config(tmp_path, arm, 12, 20) for arm in ("soft", "soft+chain")]
    for config in configs:
        finished(config, PLAIN, CHAINED if config is configs[1] else PLAIN)
    assert train_all(configs, 1) == [] and "2 runs, 2 of them finished already" in capsys.readouterr().out
    run = read_run(Path(configs[1].out), "brief-chain", 0)
    assert run.scores["format"].tolist() == [0] and run.scores["side"].tolist() == [0] and run.figures["tokens"] == 40
    found = collect(tmp_path, ["soft", "soft+chain", "hard"], [12, 13], 20)
    assert list(found["arms"]) == ["before", "before, chain", "soft", "soft+chain"], "hard is not there yet"
    chain = found["arms"]["soft+chain"]
    assert chain["format"]["value"] == chain["miou"]["value"] == chain["side"]["value"] == 1
    assert chain["tokens"] == pytest.approx(np.mean(np.arange(21, 31))) and chain["seconds"] == 70
    assert chain["sampled"] == pytest.approx(14.5 / 20) and found["arms"]["before"]["sampled"] == 0
    assert found["arms"]["soft"]["shuffled"] == 0.3 and found["arms"]["before"]["shuffled"] == 0.1
    assert "seconds" not in found["arms"]["before"] and "| 25.5 | 70 |" in render(found, "soft")


def test_what_is_left_of_a_stopped_run_goes(tmp_path: Path):
    config = run_config(tmp_path, "soft", 12, 20)
    run = Path(config.out)
    assert unfinished(config)
    finished(config, PLAIN, PLAIN)
    assert not unfinished(config)
    with pytest.raises(ValueError, match=r"want the configuration it was started with; got steps: 30 against 20"):
        unfinished(run_config(tmp_path, "soft", 12, 30))
    (run / "summary.json").unlink()
    (run / ".lock").write_text("process 7 on host")
    with (run / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="want a run that has ended; process 7 on host writes to it"):
            unfinished(config)
    assert unfinished(config) and not run.exists()
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds something else"):
        unfinished(config)
    assert (run / "thesis.txt").exists()


def test_runs_that_fail_are_told_and_those_that_are_stopped_end(tmp_path: Path, monkeypatch):
    start = subprocess.Popen
    config = run_config(tmp_path, "soft", 12, 20)

    def trainer(code: str) -> None:
        monkeypatch.setattr(subprocess, "Popen", lambda words, **more: start([sys.executable, "-c", code], **more))

    trainer("print('no such thing'); raise SystemExit(3)")
    log = tmp_path / "runs" / "12" / "soft.log"
    assert train_all([config], 1) == [f"seed 12, soft: ended with status 3 after 0 steps; {log}"]
    assert log.read_text() == "no such thing\n" and load_config(log.with_name("soft.json")) == config
    trainer("import time; time.sleep(60)")
    stop = Event()
    stop.set()
    assert "ended with status -15" in train_arm(config, tqdm(disable=True), stop)
    assert collect(tmp_path, ["soft"], [12], 20)["arms"] == {}
