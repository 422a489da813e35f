"""The numbers of a step, over all ranks (docs/run_folder.md, metrics.jsonl)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from medground.records import Answer, Group
from medground_kernels.grpo_options import STAT_NAMES

if TYPE_CHECKING:
    from medground.rewards.total import Rewards
    from medground.sharding import Ranks


class Totals(NamedTuple):
    """Of a step, over all ranks."""

    tokens: int
    sequences: int
    means: dict[str, float]


def step_totals(groups: Sequence[Group], rewards: Rewards, ranks: Ranks) -> Totals:
    """Add up a step's completions and what they earned; every rank must call it."""
    rollouts = [r for g in groups for r in g.rollouts]
    spread = rewards.total.amax(1) > rewards.total.amin(1)
    mine = {
        "reward": rewards.total.double().sum().item(),
        "reward_format": rewards.format.double().sum().item(),
        "reward_spatial": rewards.spatial.double().sum().item(),
        "iou": rewards.iou.double().sum().item(),
        "zero_spread_groups": (~spread).sum().item() * len(rollouts) / len(groups),
        "completion_length": float(sum(len(r.tokens) for r in rollouts)),
        "truncated": float(sum(not r.finished for r in rollouts)),
    }
    shares = ranks.gather((len(rollouts), mine))
    sequences = sum(count for count, _ in shares)
    means = {name: sum(share[name] for _, share in shares) / sequences for name in mine}
    tokens = round(means["completion_length"] * sequences)
    return Totals(tokens, sequences, means | {"completion_tokens": tokens})


def update_statistics(
    stats: list[Tensor], losses: list[Tensor], norms: list[Tensor], epochs: int, ranks: Ranks
) -> dict[str, float]:
    """Put the micro-batches of an update together; every rank must call it.

    Args:
        stats: `GrpoOutput.stats` of each.
        losses: each one's share of the loss, scalars.
        norms: gradient norm of each optimizer step, the same on every rank.
        epochs: optimizer steps that the micro-batches belong to.
        ranks: to add up over.

    Returns:
        Means over the tokens of every micro-batch, epoch and rank; extremes where a statistic is one.
    """
    local = torch.stack(stats).double().cpu()  # one wait for the device
    loss = float(torch.stack(losses).double().sum()) / epochs
    shares = ranks.gather((local, loss))
    table = torch.cat([share for share, _ in shares])  # [micro-batches, statistics]
    tokens = table[:, STAT_NAMES.index("tokens")]
    out = {"loss": sum(part for _, part in shares), "grad_norm": float(torch.stack(norms).mean())}
    for name, column in zip(STAT_NAMES, table.T, strict=True):
        if name in ("tokens", "masked_tokens"):
            continue
        if name.endswith("_min"):
            out[name] = float(column.min())
        else:
            out[name] = float(column.max() if name.endswith("_max") else (column * tokens).sum() / tokens.sum())
    return out


def sample_rows(
    groups: Sequence[Group], answers: Sequence[Sequence[Answer]], rewards: Rewards, advantages: Tensor
) -> list[dict[str, Any]]:
    """What this rank's completions were and earned: the lines of samples/step-*.jsonl."""
    return [
        {
            "id": group.prompt.example.id,
            "index": g,
            "completion": rollout.text,
            "finished": rollout.finished,
            "boxes": answers[b][g].boxes,
            "iou": rewards.iou[b, g].item(),
            "reward": rewards.total[b, g].item(),
            "reward_format": rewards.format[b, g].item(),
            "reward_spatial": rewards.spatial[b, g].item(),
            "advantage": advantages[b, g].item(),
            "logp": rollout.logp.sum().item(),
        }
        for b, group in enumerate(groups)
        for g, rollout in enumerate(group.rollouts)
    ]


class Clock:
    """Seconds of a step's phases."""

    def __init__(self) -> None:
        """Start the step."""
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._laps[f"seconds_{phase}"] = now - self._last
        self._last = now

    def seconds(self, tokens: int) -> dict[str, float]:
        """The step's seconds, its phases' and its completion tokens per second."""
        whole = self._last - self._start
        return {"tokens_per_second": tokens / whole, "seconds": whole} | self._laps
