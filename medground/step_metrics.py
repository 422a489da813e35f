"""The numbers of a step, over all ranks (docs/run_folder.md, metrics.jsonl)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from medground.records import Answer, Group
from medground_kernels.grpo_options import STAT_NAMES

if TYPE_CHECKING:
    from medground.rewards.total import Rewards
    from medground.rollout.engine import RolloutStats
    from medground.sharding import Ranks


PHASE_END = "end of "


class Totals(NamedTuple):
    """Of a step, over all ranks."""

    tokens: int
    sequences: int
    means: dict[str, float]

    def of(self, groups: Sequence[Group], kept: Tensor, ranks: Ranks) -> Totals:
        """The same counts of the completions that are kept, [B, G] of this rank's; every rank must call it."""
        lengths = torch.tensor([[len(rollout.tokens) for rollout in group.rollouts] for group in groups])
        shares = ranks.gather((int((lengths * kept).sum()), int(kept.sum())))
        tokens, sequences = (sum(column) for column in zip(*shares, strict=True))
        # where nothing is kept every loss is 0, whatever it is divided by
        return Totals(max(tokens, 1), max(sequences, 1), self.means)


def step_totals(
    groups: Sequence[Group], rewards: Rewards, rollout: RolloutStats, operations: Mapping[str, float], ranks: Ranks
) -> Totals:
    """Add up a step's completions, how they were sampled, what they earned and cost; every rank must call it.

    Args:
        groups: of this rank, as are the next three.
        rewards: what they earned.
        rollout: how they were sampled.
        operations: what they cost, by phase (`costs.step_operations`).
        ranks: to add up over.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    mine = {
        "reward": rewards.total.double().sum().item(),
        **{f"reward_{name}": part.double().sum().item() for name, part in rewards.parts.items()},
        "iou": rewards.iou.double().sum().item(),
        "zero_spread_groups": (~rewards.spread).sum().item() * len(rollouts) / len(groups),
        "completion_length": float(sum(len(r.tokens) for r in rollouts)),
        "truncated": float(sum(not r.finished for r in rollouts)),
    }
    counts = {
        "prompt_tokens": sum(len(g.prompt.input_ids) for g in groups),
        # what G rows [prompt | completion] would have added, in roll-out, scoring and update alike
        "tokens_avoided": sum(len(g.prompt.input_ids) * (len(g.rollouts) - 1) for g in groups),
        "decode_steps": rollout.steps,
        "decode_slots": rollout.slots,
        "operations": sum(operations.values()),
    }
    shares = ranks.gather((len(rollouts), mine, counts))
    sequences = sum(count for count, _, _ in shares)
    means = {name: sum(share[name] for _, share, _ in shares) / sequences for name in mine}
    tokens = round(means["completion_length"] * sequences)
    sums = {name: sum(share[name] for _, _, share in shares) for name in counts}
    sums["decode_steps"] = max(share["decode_steps"] for _, _, share in shares)
    slots = sums.pop("decode_slots")
    return Totals(
        tokens,
        sequences,
        means | {"completion_tokens": tokens, "slots_filled": (tokens - sequences) / slots if slots else 1.0} | sums,
    )


def update_statistics(
    stats: list[Tensor], losses: list[Tensor], norms: list[Tensor], gaps: list[Tensor], epochs: int, ranks: Ranks
) -> dict[str, float]:
    """Put the micro-batches of an update together; every rank must call it.

    Args:
        stats: `GrpoOutput.stats` of each.
        losses: each one's share of the loss, scalars.
        norms: gradient norm of each optimizer step, the same on every rank.
        gaps: of each micro-batch of the first, [N], how much the training forward's log-probabilities differ from
            those that came with the tokens.
        epochs: optimizer steps that the micro-batches belong to.
        ranks: to add up over.

    Returns:
        Means over the tokens of every micro-batch, epoch and rank; extremes where a statistic is one.
    """
    local = torch.stack(stats).double().cpu()  # one wait for the device
    loss = float(torch.stack(losses).double().sum()) / epochs
    gap = torch.cat([gap.abs().double() for gap in gaps])
    shares = ranks.gather((local, loss, (gap.sum().item(), gap.amax().item() if len(gap) else 0.0, len(gap))))
    table = torch.cat([share[0] for share in shares])  # [micro-batches, statistics]
    tokens = table[:, STAT_NAMES.index("tokens")]
    out = {
        "loss": sum(share[1] for share in shares),
        "grad_norm": float(torch.stack(norms).mean()),
        "logp_gap": sum(share[2][0] for share in shares) / max(sum(share[2][2] for share in shares), 1),
        "logp_gap_max": max(share[2][1] for share in shares),
    }
    for name, column in zip(STAT_NAMES, table.T, strict=True):
        if name in ("tokens", "masked_tokens"):
            continue
        if name.endswith("_min"):
            out[name] = float(column.min())
        else:
            out[name] = float(
                column.max() if name.endswith("_max") else (column * tokens).sum() / tokens.sum().clamp(min=1)
            )
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
            **{f"reward_{name}": part[b, g].item() for name, part in rewards.parts.items()},
            "advantage": advantages[b, g].item(),
            "logp": rollout.logp.sum().item(),
        }
        for b, group in enumerate(groups)
        for g, rollout in enumerate(group.rollouts)
    ]


class Clock:
    """Seconds of a step's phases, and what they make of its tokens (docs/performance.md)."""

    def __init__(self, checkpoint: float = 0.0, peak: float | None = None) -> None:
        """Start the step.

        Args:
            checkpoint: seconds that saving took since the last one.
            peak: most operations a second of all ranks' GPUs (`costs.peak_of`); None where that is not known.
        """
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}
        self._checkpoint, self._peak = checkpoint, peak

    def lap(self, phase: str, seconds: float | None = None) -> None:
        """End a phase, which took the time since the last one ended, or `seconds` of it; one that returns adds up."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if seconds is None:
            with record_function(f"{PHASE_END}{phase}"):  # tells a profile where phases lie
                now = time.perf_counter()
        else:
            now = self._last + seconds
        self._laps[f"seconds_{phase}"] = self._laps.get(f"seconds_{phase}", 0.0) + now - self._last
        self._last = now

    def seconds(self, totals: Totals) -> dict[str, float]:
        """The step's seconds, its phases' and what they make of its tokens a second."""
        whole = self._last - self._start
        decode, update = self._laps["seconds_decode"], self._laps["seconds_update"]
        packed = totals.tokens + totals.means["prompt_tokens"]
        operations = totals.means["operations"]
        return {
            "tokens_per_second": totals.tokens / whole,
            "processed_tokens_per_second": packed / whole,
            "unpacked_tokens_per_second": (packed + totals.means["tokens_avoided"]) / whole,
            "samples_per_second": totals.sequences / whole,
            "decode_tokens_per_second": totals.tokens / decode,
            "update_tokens_per_second": packed / update,
            "operations_per_second": operations / whole,
            **({"mfu": operations / whole / self._peak} if self._peak else {}),
            "seconds": whole,
            **self._laps,
            "seconds_checkpoint": self._checkpoint,
        }
