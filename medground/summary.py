"""A run's evaluations, and what they come to: eval/ and summary.json (docs/run_folder.md)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from medground.config import Config
from medground.controls import CONSTANT, constant_answers
from medground.evaluate import Asker, evaluate
from medground.records import Example
from medground.run_folder import RunFolder
from medground.scoring import Prediction, blind_baseline, score


class Splits(NamedTuple):
    """The records of a run."""

    train: list[Example]
    curve: list[Example]
    test: list[Example]


def evaluate_if_due(asker: Asker, splits: Splits, run: RunFolder | None, step: int) -> None:
    """The evaluation that belongs after `step` steps, unless it is written already.

    Before the first step and after the last one it is on the whole test split, with true and with shuffled images; then
    and every `evaluation.every` steps on the curve's records.
    """
    config, name = asker.config, f"step-{step:06d}"
    ends, every = step in (0, config.steps), config.evaluation.every
    curve = f"{name}.curve"  # written last
    if not (ends or (every and step % every == 0)) or asker.ranks.gather(run and run.has(f"eval/{curve}.json"))[0]:
        return
    if ends:
        split = config.data.test_split
        true = evaluate(asker, splits.test, title=f"held out, step {step}")
        shuffled = evaluate(asker, splits.test, shuffled=True, title=f"shuffled images, step {step}")
        if run:
            _write(run, name, {"step": step, "split": split, "images": "true"}, true)
            _write(run, f"{name}.shuffled", {"step": step, "split": split, "images": "shuffled"}, shuffled)
    predictions = evaluate(asker, splits.curve, title=f"curve, step {step}")
    if run:
        head = {"step": step, "split": config.data.curve_split, "images": "true"}
        scores = _write(run, curve, head, predictions)
        run.log_held_out(step, scores["metrics"])


def summarise(config: Config, splits: Splits, run: RunFolder, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The headline numbers, before and after; what comes of no model goes to eval/baselines.json.

    Args:
        config: of the run.
        splits: its records, for the blind baseline.
        run: its folder, evaluations and metrics written.
        facts: its environment.
        seconds: that the command took.
    """
    out: dict[str, Any] = {"steps": config.steps, "seed": config.seed, "records_test": len(splits.test)}
    for when, step in (("before", 0), ("after", config.steps)):
        true = run.read_json(f"eval/step-{step:06d}.json")["metrics"]
        shuffled = run.read_json(f"eval/step-{step:06d}.shuffled.json")["metrics"]
        for name, metric in _HEADLINES.items():
            out[f"{name}_{when}"] = true[metric]["value"]
        out[f"miou_{when}_interval"] = [true["miou"]["low"], true["miou"]["high"]]
        out[f"miou_{when}_shuffled_images"] = shuffled["miou"]["value"]
    baselines: dict[str, Any] = {name: score(constant_answers(splits.test, name)) for name in CONSTANT}
    baselines["blind"] = blind_baseline(splits.train, splits.test)
    run.write_json("eval/baselines.json", baselines)
    blind = baselines["blind"]["metrics"]
    out["miou_blind_baseline"] = blind["miou"]["value"]
    out["miou_blind_baseline_interval"] = [blind["miou"]["low"], blind["miou"]["high"]]
    steps = run.metrics()
    out["seconds_training"] = sum(step["seconds"] for step in steps)
    out["completion_tokens_per_second"] = sum(step["completion_tokens"] for step in steps) / out["seconds_training"]
    return out | {"seconds_total": seconds, "machine": facts["machine"], "ranks": facts["ranks"]}


_HEADLINES = {
    "miou": "miou",
    "acc50": "acc@0.5",
    "side": "side",
    "parse_failures": "parse_failures",
    "absent": "absent",
}


def _write(run: RunFolder, name: str, head: dict[str, Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
    scores = score(predictions)
    run.write_rows(f"eval/{name}.predictions.jsonl", (prediction.row() for prediction in predictions))
    run.write_json(f"eval/{name}.json", head | scores)
    return scores
