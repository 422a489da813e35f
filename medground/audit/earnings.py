"""What each policy of cheats.py earns, scored as training scores it, and which cheats earn more than a rough truth.

    difference[cheat] = mean over records of  reward(cheat) - reward(truth 25 % off)

over the records that the cheat has a meaning for, those with a finding and those without each by themselves. Its 95 %
interval resamples patients (`scoring.clustered_means`). A cheat is above the rough truth where the whole interval is
above 0 by more than ROUNDING; where it holds 0 the two are not told apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medground.audit.cheats import CHEATS, EMPTY, FAIR, HONEST, JITTERED, Case, completions
from medground.config import LossConfig, RewardConfig, Template
from medground.evaluate import read_answer
from medground.records import Box, Example, Group, Prompt, Rollout
from medground.reward_watch import rank_correlation
from medground.rewards.total import Rewards, Scorer
from medground.scoring import clustered_means
from medground.taking_part import advantages_of

CHUNK = 32
"""Records that are scored at once."""
RESAMPLES = 2000
ROUNDING = 1e-6
"""Of rewards, which are float32."""
SHOWN, HIDDEN = "present", "absent"

Columns = NDArray[np.float64]


class Earned(NamedTuple):
    """What K completions of each of R records said and earned.

    Attributes:
        examples: [R].
        boxes: [R][K], what was answered, original; None for an unreadable answer.
        said: [R, K], False where a policy has no meaning for a record.
        rewards: [R, K] each, of the policies in the order of `names`, then of the fair policy's completions.
        names: of the policies.
    """

    examples: list[Example]
    boxes: list[list[tuple[Box, ...] | None]]
    said: Tensor
    rewards: Rewards
    names: tuple[str, ...]


def earn(
    prompts: Iterator[Prompt],
    priors: Sequence[tuple[Box, ...]],
    scorer: Scorer,
    template: Template,
    *,
    fairs: int,
    seed: int,
    tokens: Callable[[list[str]], list[int]] | None = None,
) -> Earned:
    """Let every policy answer to every prompt, and score it.

    Args:
        prompts: R of them; with their images where the reward looks at them.
        priors: what the blind baseline answers to each (`scoring.blind_answers`).
        scorer: of the run.
        template: that completions answer to.
        fairs: completions of the fair policy for each record.
        seed: of what is drawn.
        tokens: lengths of texts in tokens, stop token included; without it they count 0.

    Raises:
        ValueError: a reward of the user's own failed.
    """
    policies = (*HONEST, *CHEATS)
    examples, boxes, parts = [], [], []
    said: list[list[bool]] = []
    while chunk := list(islice(prompts, CHUNK)):
        groups = []
        for prompt in chunk:
            case = Case(prompt, template, priors[len(said)], np.random.default_rng([seed, len(said)]))
            texts = completions(case, policies, fairs)
            said.append([text is not None for text in texts])
            groups.append(_group(prompt, [text or "" for text in texts], tokens))
        answers = [[read_answer(r.text, group.prompt) for r in group.rollouts] for group in groups]
        parts.append(scorer(groups, answers))
        examples += [prompt.example for prompt in chunk]
        boxes += [[answer.boxes for answer in row] for row in answers]
    names = tuple(policy.name for policy in policies)
    return Earned(examples, boxes, torch.tensor(said), reduce(Rewards.and_of, parts), names)


def _group(prompt: Prompt, texts: list[str], tokens: Callable[[list[str]], list[int]] | None) -> Group:
    lengths = tokens(texts) if tokens else [0] * len(texts)
    nothing = torch.zeros(max(lengths, default=0))
    made = [Rollout(nothing[:n].long(), nothing[:n], text, True) for n, text in zip(lengths, texts, strict=True)]
    return Group(prompt, tuple(made))


def judge(earned: Earned, *, per_reward: bool = False) -> dict[str, Any]:
    """Means by policy, advantages, rank correlations, and which cheats are above the rough truth.

    Args:
        earned: of one fair completion a record at least; the advantages are those in groups of as many.
        per_reward: as `loss.per_reward`.

    Returns:
        Values that JSON has: `policies`, `spearman`, `against_jittered_truth`, `cheats_above_jittered_truth` and
        `cheats_not_told_apart` (docs/rewards.md).
    """
    places = {SHOWN: [bool(e.boxes) for e in earned.examples], HIDDEN: [not e.boxes for e in earned.examples]}
    rows = {name: np.flatnonzero(held) for name, held in places.items()}
    columns = _columns(earned, per_reward)
    policies = {
        policy.name: {"about": policy.about, "honest": policy in HONEST}
        | {place: _means(columns[policy.name], rows[place]) for place in rows}
        for policy in (*HONEST, *CHEATS)
    }
    fair = {"about": "a mixture of rough truths and the prior", "honest": True}
    policies[FAIR] = fair | {place: _means(columns[FAIR], rows[place]) for place in rows}
    against = {place: _differences(earned, columns, rows[place], place) for place in rows}
    flat = [{"cheat": name, "records": place} | row for place, found in against.items() for name, row in found.items()]
    return {
        "records": {place: len(where) for place, where in rows.items()},
        "policies": policies,
        "spearman": _correlations(earned, rows[SHOWN]),
        "against_jittered_truth": against,
        "cheats_above_jittered_truth": [row for row in flat if row["low"] > ROUNDING],
        "cheats_not_told_apart": [row for row in flat if row["low"] <= ROUNDING and row["high"] >= -ROUNDING],
    }


def _columns(earned: Earned, per_reward: bool) -> dict[str, dict[str, Columns]]:
    """Of each policy and what it earned, [R] numbers, nan where it has no meaning."""
    rewards, first = earned.rewards, len(earned.names)
    fairs = list(range(first, rewards.total.shape[1]))
    out = {}
    for name, column in [*((name, k) for k, name in enumerate(earned.names)), (FAIR, first)]:
        whose = fairs if name == FAIR else [column]
        values = {"reward": rewards.total, "iou": rewards.iou}
        values |= {f"reward_{part}": scores for part, scores in rewards.parts.items()}
        found = {key: scores[:, whose].double().mean(1) for key, scores in values.items()}
        group = _picked(rewards, [column, *fairs[1:]])
        if len(fairs) > 1:
            for key, kind in (("advantage", "group"), ("advantage_mean_only", "none")):
                loss = LossConfig(advantage=kind, per_reward=per_reward and kind == "group")  # type: ignore[arg-type]
                found[key] = advantages_of(group, loss)[:, 0].double()
        out[name] = {key: v.masked_fill(~earned.said[:, column], torch.nan).numpy() for key, v in found.items()}
    return out


def _picked(rewards: Rewards, columns: list[int]) -> Rewards:
    parts = {name: part[:, columns] for name, part in rewards.parts.items()}
    return Rewards(rewards.total[:, columns], parts, rewards.weights, rewards.iou[:, columns])


def _means(columns: dict[str, Columns], rows: NDArray[np.int64]) -> dict[str, Any] | None:
    """Means over those records that a policy has a meaning for; None where there is none."""
    here = rows[~np.isnan(columns["reward"][rows])]
    if not len(here):
        return None
    return {"n": len(here)} | {name: float(values[here].mean()) for name, values in columns.items()}


def _differences(
    earned: Earned, columns: dict[str, dict[str, Columns]], rows: NDArray[np.int64], place: str
) -> dict[str, Any]:
    """Of each cheat, how far it is above the rough truth on these records, with its interval."""
    cheats = [policy.name for policy in CHEATS if not (place == HIDDEN and policy.name == EMPTY)]
    if not len(rows):
        return {}
    truth = columns[JITTERED]["reward"][rows]
    table = np.stack([columns[name]["reward"][rows] - truth for name in cheats], 1)
    patients = [earned.examples[row].patient for row in rows]
    found = {}
    for name, column, estimate in zip(cheats, table.T, clustered_means(table, patients, RESAMPLES, 0), strict=True):
        if estimate["n"]:
            here = ~np.isnan(column)
            found[name] = {
                "reward": float(columns[name]["reward"][rows][here].mean()),
                "jittered_truth": float(truth[here].mean()),
                "difference": estimate["value"],
                "low": estimate["low"],
                "high": estimate["high"],
                "n": estimate["n"],
            }
    return found


def _correlations(earned: Earned, rows: NDArray[np.int64]) -> dict[str, float | None]:
    """Spearman's between reward and IoU, over completions to records with a finding."""
    honest = torch.tensor([name in {p.name for p in HONEST} for name in earned.names])
    fairs = torch.ones(earned.said.shape[1] - len(honest), dtype=torch.bool)
    out = {}
    for name, chosen in (
        ("all", torch.ones_like(earned.said)),
        ("honest", torch.cat([honest, fairs]).expand_as(earned.said)),
    ):
        here = (chosen & earned.said)[rows]
        out[name] = rank_correlation(earned.rewards.total[rows][here].numpy(), earned.rewards.iou[rows][here].numpy())
    return out


def described(config: RewardConfig, template: Template, seed: int) -> dict[str, Any]:
    """What the numbers depend on beside the records."""
    return {"template": template, "seed": seed, "reward": dataclasses.asdict(config)}
