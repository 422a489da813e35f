"""A small made-up run folder with hostile texts in it, for the tests of the report."""

import dataclasses
import json

import numpy as np
from PIL import Image

from medground.config import save_config
from medground.presets import PRESETS

HOSTILE = (
    "</script><script>alert(1)</script x><!--<script> <img src=http://evil.test/x onerror=alert(2)> &amp; & "
    '" onclick="alert(3)" \' onfocus=\'alert(4) \u2028 \u202e {{7}}'
)
METRICS = (
    "miou", "acc@0.3", "acc@0.5", "acc@0.7", "side", "centre_hit", "absent", "false_empty", "parse_failures",
)  # fmt: skip
SERIES = (
    "reward", "iou", "entropy", "kl", "clip_low", "clip_high", "grad_norm", "lr", "completion_length", "truncated",
    "tokens_per_second", "logp_gap",
)  # fmt: skip


def estimate(value):
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 9}


def evaluation(step, value, images="true", split="test"):
    metrics = {name: estimate(value) for name in METRICS}
    metrics["absent"] = {"value": None, "low": None, "high": None, "n": 0}
    part = {"miou": estimate(value), "acc@0.5": estimate(value)}
    by_category = {"nodule": part, HOSTILE: part}
    return {"step": step, "split": split, "images": images, "metrics": metrics, "by_category": by_category}


def prediction(i, iou, boxes):
    return {
        "id": f"r{i}", "image": f"images/{i % 5}.png", "width": 64, "height": 48,
        "phrase": HOSTILE if i == 0 else f"nodule {i}" + "\ud800" * (i == 1),
        "category": HOSTILE if i == 0 else "nodule", "patient": f"p{i}",
        "truth": [] if i == 11 else [[10.0, 10.0, 30.0, 30.0]], "boxes": boxes, "iou": iou,
        "completion": HOSTILE * 60 + "\ud800" if i == 0 else f"[[{i}]]", "logp": -1.5,
    }  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(run, name, found, rows):
    (run / "eval" / f"{name}.json").write_text(json.dumps(found))
    write_lines(run / "eval" / f"{name}.predictions.jsonl", rows)


def start_run(folder, steps=(1, 2, 3, 4)):
    """A run that has trained four steps and evaluated nothing; and its data."""
    run, data = folder / "run", folder / "data"
    (run / "eval").mkdir(parents=True)
    (data / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (48, 64), dtype=np.uint8)).save(data / f"images/{i}.png")
    config = dataclasses.replace(PRESETS["demo"][1], steps=150)
    save_config(dataclasses.replace(config, model=dataclasses.replace(config.model, path=HOSTILE)), run / "config.json")
    environment = {
        "versions": {"torch": "2.11", "note": HOSTILE},
        "devices": ["cpu", "cpu"],
        "ranks": 2,
        "commit": "abc",
    }
    (run / "environment.json").write_text(json.dumps(environment))
    rows = [{"step": s, "seconds": 2.0, "seconds_decode": 1.0, **dict.fromkeys(SERIES, 0.1 * s)} for s in steps]
    write_lines(run / "metrics.jsonl", rows)
    return run, data


def finish_run(run):
    nan = float("nan")
    before = [prediction(i, 0.1, [[0.0, 0.0, 20.0, 20.0]]) for i in range(12)]
    boxes = [[[10.0, 10.0, 30.0, 31.0]]] * 8
    boxes += [None, [], [[nan, 0.0, 5.0, 5.0], [9.0, 9.0, 1.0, 1.0]], [[0.0, 0.0, 1e300, 1e300]]]
    after = [prediction(i, 0.9 - 0.05 * i, box) for i, box in enumerate(boxes)]
    after[0]["thought_boxes"] = [[1.0, 2.0, 11.0, 12.0], [20.0, 20.0, 25.0, 40.0], [nan, 0.0, 5.0, 5.0]]
    write_evaluation(run, "step-000000", evaluation(0, 0.1234), before)
    write_evaluation(run, "step-000004", evaluation(4, 0.5678), after)
    write_evaluation(run, "step-000004.shuffled", evaluation(4, 0.2345, "shuffled"), after)
    for step in (0, 2, 4):
        write_evaluation(run, f"step-{step:06d}.curve", evaluation(step, 0.1 + step / 10, split="val"), before[:3])
    (run / "summary.json").write_text(json.dumps({"miou_blind_baseline": 0.3456, "machine": "2-core CPU", "ranks": 2}))
