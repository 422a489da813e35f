"""What to do when memory does not suffice: which part of the work, its shapes, and the options that lower it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medground.job.watch import Progress

_OPTIONS = {
    "load": "take more ranks, or train adapters (model.lora.rank)",
    "rollout": "lower rollout.cache_gb, rollout.max_rows or rollout.prefill_tokens",
    "evaluation": "lower rollout.cache_gb, rollout.max_rows or rollout.prefill_tokens",
    "score": "lower loss.micro_batch_tokens",
    "update": "lower loss.micro_batch_tokens, recompute activations (model.activation_checkpointing), "
    "or lower data.max_pixels or rollout.max_new_tokens",
    "optimizer": "take more ranks, another optimizer.kind, or train adapters (model.lora.rank)",
}
_ELSE = "take more ranks; medground plan shows what a run needs"


class OutOfMemory(RuntimeError):  # noqa: N818  as torch has it
    """Memory does not suffice for what the run was doing."""


@contextmanager
def memory_explained(progress: Progress) -> Iterator[None]:
    """Turn a failed allocation within into a sentence.

    Raises:
        OutOfMemory: with what `progress` says, and the options to lower.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else "no more memory"
        on_cpu = "can't allocate memory" in said or "not enough memory" in said
        if not (on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
            raise
        advice = _OPTIONS.get(progress.phase, _ELSE)
        raise OutOfMemory(f"out of memory in {progress.doing}: {advice} ({said})") from error
