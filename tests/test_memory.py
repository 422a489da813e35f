"""A failed allocation says what the run was doing and what to lower."""

import pytest
import torch

from medground.job.memory import OutOfMemory, memory_explained
from medground.job.watch import Progress


def test_a_real_allocation_that_fails():
    progress = Progress()
    progress.now("update", "step 4: a micro-batch of 4096 tokens, 2 images, 16 completions of 900 tokens")
    with pytest.raises(OutOfMemory) as said, memory_explained(progress):
        torch.empty(1 << 50)
    text = str(said.value)
    assert text.startswith("out of memory in update of step 4: a micro-batch of 4096 tokens, 2 images, 16 completions")
    assert "lower loss.micro_batch_tokens" in text and "you tried to allocate" in text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
@pytest.mark.parametrize("phase", ["load", "rollout", "evaluation", "score", "update", "optimizer", "export"])
def test_every_phase_has_advice(phase: str, error: Exception):
    progress = Progress()
    progress.now(phase)
    with (
        pytest.raises(OutOfMemory, match=f"out of memory in {phase}: (lower|take) ") as said,
        memory_explained(progress),
    ):
        raise error
    assert said.value.__cause__ is error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^something else$"), memory_explained(Progress()):
        raise RuntimeError("something else")
    with pytest.raises(ValueError, match="mine"), memory_explained(Progress()):
        raise ValueError("mine")
