"""Memory of a rank by running its step on nothing: the real code, on tensors without memory, among ranks in name only.

Each phase's peak comes with what it is made of:

    weights           what is trained, in float32, and what is frozen: this rank's shard
    reference         shard of the reference policy
    optimizer         AdamW's moments
    gradients         shard of the gradients
    whole_gradients   gradients of whole weights: those that wait for the last micro-batch, those that are being reduced
    rollout_weights   what decodes, whole
    cache             keys and values of the rows being decoded, with the rows' state
    gathered          whole weights of the units that compute
    batch             tokens and images
    activations       what the forward pass keeps and works with
    backward          what the backward pass works with, recomputed activations included
    head              a chunk of logits, gradients of head and hidden states
    score, rollout, other
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from medground.config import Config
from medground.plan.pretend import pretend
from medground.plan.rehearsal import BESIDE, Facts, Job, Rehearsal, nothing_there
from medground.plan.tracker import Peak, Tracker

_CUDA_GRAIN = 512  # bytes that torch's caching allocator rounds up to


Tries = Callable[["DryRun", dict[int, Peak]], int | None]
"""From what a step took, and what updates took since then, the next `loss.micro_batch_tokens` to try."""


class DryRun(NamedTuple):
    """What a dry run found.

    Attributes:
        peaks: by phase: load, evaluation, rollout, score, update, optimizer.
        facts: what seconds depend on.
        micro_batches: of its update.
        moved: bytes of whole tensors that collectives gave out, by phase and kind of collective.
    """

    peaks: dict[str, Peak]
    facts: Facts
    micro_batches: int
    moved: dict[tuple[str, str], int]

    @property
    def highest(self) -> Peak:
        """Of all phases."""
        return max(self.peaks.values(), key=lambda peak: peak.total)


def with_precision(config: Config, cuda: bool) -> Config:
    """What `auto` comes to on the device in question."""
    if config.model.precision != "auto":
        return config
    return replace(config, model=replace(config.model, precision="bfloat16" if cuda else "float32"))


def dry_run(
    job: Job,
    config: Config,
    ranks: int,
    *,
    cuda: bool,
    tell: Callable[[str], None] = lambda phase: None,
    tries: Tries = lambda found, tried: None,
) -> tuple[DryRun, dict[int, Peak]]:
    """Run a step.

    Args:
        job: the prompt and the model.
        config: of the run.
        ranks: of the run.
        cuda: on GPUs.
        tell: hears what is being run.
        tries: asked after the step, and after each update that it wanted; None to stop.

    Returns:
        What the step took, and the peaks of updates with other micro-batches by `loss.micro_batch_tokens`.
    """
    config = with_precision(config, cuda)
    tracker = Tracker(_CUDA_GRAIN if cuda else 1)
    with pretend(ranks, cuda=cuda, tracker=tracker) as alike, nothing_there(job.model, tracker):
        tell("load")
        step = Rehearsal(job, config, Path(config.model.path), alike, tracker)
        tell("evaluation")
        step.evaluate()
        tell("rollout")
        step.roll_out()
        tell("update")
        count = step.update()
        phases = {name: peak for name, peak in tracker.peaks.items() if name != BESIDE}
        found = DryRun(phases, step.facts, count, dict(tracker.moved))
        tried: dict[int, Peak] = {}
        while budget := tries(found, tried):
            tell(f"micro-batches of {budget} tokens")
            tracker.peaks.clear()
            step.update(budget)
            tried[budget] = max(tracker.peaks.values(), key=lambda peak: peak.total)
    return found, tried
