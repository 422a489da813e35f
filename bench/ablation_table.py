"""What the runs of an ablation come to: held-out metrics over seeds, and differences from one arm, with intervals.

A figure of an arm is the mean over seeds of its means over held-out records. Its interval says how much of it is chance
of the patients held out: a percentile bootstrap in which every resample draws, for each seed, that seed's patients. How
far seeds, of films and training, lie apart is told beside it, as the deviation of their means. A difference is that of
the same records' scores, so that what makes a record easy or hard drops out.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medground.answers import parse_answer
from medground.config import Template
from medground.rewards.format import format_reward
from medground.scoring import Prediction, record_scores

Floats = NDArray[np.floating[Any]]

METRICS = {
    "miou": "mIoU", "acc@0.5": "Acc@0.5", "side": "right side", "absent": "absent", "format": "format",
    "parse_failures": "unreadable",
}  # fmt: skip
COMPARED = ("miou", "acc@0.5", "side")
LAST = 10  # steps over which tokens are averaged


class Run(NamedTuple):
    """One evaluation of one run.

    Attributes:
        ids: of its records, R of them.
        patients: of each.
        scores: by metric, [R], nan where it does not apply.
        figures: by name, what there is one number of for the whole run.
    """

    ids: Sequence[str]
    patients: Sequence[str]
    scores: dict[str, Floats]
    figures: dict[str, float]


def read_run(folder: Path, template: Template, step: int) -> Run:
    """The evaluation of a finished run after `step` steps: 0 or the last.

    Tokens and `sampled`, the mean IoU, are those of completions sampled in the last ten steps, for step 0 in the first.
    Of base models that is the fairer figure: what is likeliest first decides for a greedy answer which side it is on.
    """
    lines = (folder / f"eval/step-{step:06d}.predictions.jsonl").read_text().splitlines()
    predictions = [Prediction.of_row(json.loads(line)) for line in lines]
    said = [[parse_answer(prediction.completion)] for prediction in predictions]
    scores = record_scores(predictions) | {"format": format_reward(said, template)[:, 0].double().numpy()}
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    some = metrics[-LAST:] if step else metrics[:1]
    figures = {
        "tokens": float(np.mean([row["completion_length"] for row in some])),
        "sampled": float(np.mean([row["iou"] for row in some])),
        "shuffled": summary[f"miou_{'after' if step else 'before'}_shuffled_images"],
        "blind": summary["miou_blind_baseline"],
    } | ({"seconds": summary["seconds_total"]} if step else {})
    return Run([p.id for p in predictions], [p.patient for p in predictions], scores, figures)


def over_seeds(
    patients: Mapping[int, Sequence[str]], scores: Mapping[int, Floats], resamples: int = 10_000
) -> dict[str, Any]:
    """A metric over seeds.

    Args:
        patients: by seed, of each of its R records.
        scores: by seed, [R], nan where the metric does not apply.
        resamples: of the bootstrap.

    Returns:
        {"value", "low", "high"}: mean over seeds and its 95 % interval; "spread": the deviation of the seeds' means,
        None for one seed; "seeds": {seed: {"value", "low", "high", "n"}}. A seed without a record that the metric
        applies to makes everything but "seeds" None.
    """
    seeds: dict[int, dict[str, Any]] = {}
    drawn = []
    for seed, values in scores.items():
        applies = ~np.isnan(values)
        if not applies.any():
            seeds[seed] = {"value": None, "low": None, "high": None, "n": 0}
            continue
        means = _resampled(values, patients[seed], seed, resamples)
        low, high = np.nanpercentile(means, [2.5, 97.5])
        seeds[seed] = {"value": float(values[applies].mean()), "low": low, "high": high, "n": int(applies.sum())}
        drawn.append(means)
    if len(drawn) < len(scores):
        return {"value": None, "low": None, "high": None, "spread": None, "seeds": seeds}
    low, high = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5])
    found = [estimate["value"] for estimate in seeds.values()]
    spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return {"value": float(np.mean(found)), "low": low, "high": high, "spread": spread, "seeds": seeds}


def _resampled(values: Floats, patients: Sequence[str], seed: int, resamples: int) -> Floats:
    """Means of `values` [R] over resamples of the patients: [resamples], nan where none of those drawn counts."""
    names, cluster = np.unique(np.array(patients), return_inverse=True)
    applies = ~np.isnan(values)
    totals = np.bincount(cluster, np.where(applies, values, 0.0), len(names))
    counts = np.bincount(cluster, applies.astype(float), len(names))
    picks = _picks(len(names), seed, resamples)
    with np.errstate(invalid="ignore"):
        return (picks @ totals) / (picks @ counts)


@lru_cache(maxsize=8)
def _picks(patients: int, seed: int, resamples: int) -> Floats:
    """How often each resample draws each patient: [resamples, patients]; the same for every metric and arm."""
    rng = np.random.default_rng([seed, patients])
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(float)


def summarise(runs: Mapping[str, Mapping[int, Run]], against: str, resamples: int = 10_000) -> dict[str, Any]:
    """Everything that tables show.

    Args:
        runs: by arm and seed.
        against: the arm that others are compared with, on the seeds that both have; without it nothing is compared.
        resamples: of the bootstrap.

    Returns:
        {"arms": {arm: {metric: as `over_seeds`, figure: mean over seeds}},
        "differences": {arm: {metric: as `over_seeds`}}}.

    Raises:
        ValueError: two runs of one seed were not evaluated on the same records.
    """
    arms: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for arm, by_seed in runs.items():
        patients = {seed: run.patients for seed, run in by_seed.items()}
        arms[arm] = {
            name: over_seeds(patients, {s: run.scores[name] for s, run in by_seed.items()}, resamples)
            for name in METRICS
        }
        for name in next(iter(by_seed.values())).figures:
            arms[arm][name] = float(np.mean([run.figures[name] for run in by_seed.values()]))
        other = runs.get(against, {})
        both = [seed for seed in by_seed if seed in other]
        if arm == against or not both:
            continue
        for seed in both:
            if list(by_seed[seed].ids) != list(other[seed].ids):
                raise ValueError(f"{arm}, seed {seed}: want the held-out records of {against}; got others")
        differences[arm] = {
            name: over_seeds(patients, {s: by_seed[s].scores[name] - other[s].scores[name] for s in both}, resamples)
            for name in COMPARED
        }
    return {"arms": arms, "differences": differences}


def render(found: Mapping[str, Any], against: str) -> str:
    """Three Markdown tables: over seeds, differences, seed by seed."""
    arms, heads = found["arms"], list(METRICS.values())
    lines = [_row(["arm", *heads, "shuffled", "sampled", "tokens", "s"]), "|" + "---|" * (len(heads) + 5)]
    for arm, at in arms.items():
        cells = [_estimate(at[name]) if name in COMPARED[:2] else _number(at[name]["value"]) for name in METRICS]
        cells += [_number(at["shuffled"]), _number(at["sampled"]), _number(at["tokens"], ".1f")]
        lines.append(_row([arm, *cells, _number(at.get("seconds"), ".0f")]))
    blind = np.mean([at["blind"] for at in arms.values()])
    lines += ["", f"95 % intervals in brackets. A guess that never looks at the image has an mIoU of {blind:.3f}.",
              "shuffled: mIoU with another patient's image. sampled: mean IoU of the last ten steps' completions, of "
              "the first step's before training; tokens: their mean length."]  # fmt: skip
    if found["differences"]:
        lines += ["", _row([f"minus {against}", *(METRICS[name] for name in COMPARED), "mIoU, seed by seed", "spread"])]
        lines += ["|" + "---|" * (len(COMPARED) + 3)]
    for arm, at in found["differences"].items():
        each = ", ".join(_number(seed["value"], "+.3f") for seed in at["miou"]["seeds"].values())
        cells = [_estimate(at[name], "+.3f") for name in COMPARED]
        lines.append(_row([arm, *cells, each, _number(at["miou"]["spread"])]))
    lines += ["", _row(["arm", "seed", "records", "mIoU", "Acc@0.5"]), "|" + "---|" * 5]
    for arm, at in arms.items():
        for seed, estimate in at["miou"]["seeds"].items():
            acc = at["acc@0.5"]["seeds"][seed]
            lines.append(_row([arm, str(seed), str(estimate["n"]), _estimate(estimate), _estimate(acc)]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None or np.isnan(value) else format(value, form)


def _estimate(at: Mapping[str, Any], form: str = ".3f") -> str:
    if at["value"] is None:
        return "-"
    return f"{at['value']:{form}} [{at['low']:{form}}, {at['high']:{form}}]"
