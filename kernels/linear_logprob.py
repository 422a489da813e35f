"""Log-probability and entropy of each sampled token, straight from the hidden states.

    logits = hidden @ weight.T + bias,    then kernels/token_logprob.py

for a chunk of rows at a time (kernels/head.py), so that the logits are never whole in memory: one matrix product
forward. Backward, which must know the upstream gradient of each token first, makes the logits again and turns them
into their gradient where they lie: three more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medground_kernels.backend import check_devices
from medground_kernels.head import HeadGradients, check_head, head_logits, row_chunks
from medground_kernels.token_logprob import (
    Softmax,
    TokenLogprob,
    backward_rows,
    check_targets,
    forward_rows,
    token_logprob_reference,
)


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, bias: Tensor | None = None
) -> TokenLogprob:
    """The definition, in the dtype of `hidden`; float64 gives the truth."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return token_logprob_reference(logits, targets, temperature)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        chunks: list[slice]
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N = len(hidden)
        buffer = hidden.new_empty(chunks[0].stop if chunks else 0, len(weight))
        parts = [
            forward_rows(head_logits(hidden[rows], weight, bias, buffer), targets[rows], temperature) for rows in chunks
        ]
        logp = torch.cat([part for part, _ in parts]) if parts else hidden.new_empty(N, dtype=torch.float32)
        softmax = Softmax(*(torch.cat(list(t)) for t in zip(*(s for _, s in parts), strict=True))) if parts else None
        ctx.save_for_backward(hidden, weight, bias, targets, *(softmax or ()))
        ctx.temperature, ctx.chunks = temperature, chunks
        return logp, softmax.entropy if softmax else torch.empty_like(logp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dlogp.contiguous(), dentropy.contiguous()).finish(), None, None, None


def _backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> HeadGradients:
    """Sums of the gradients; the logits are gone when it returns."""
    hidden, weight, bias, targets, *saved = ctx.saved_tensors
    gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3], len(ctx.chunks))
    buffer = hidden.new_empty(ctx.chunks[0].stop if ctx.chunks else 0, len(weight))
    for rows in ctx.chunks:
        logits = head_logits(hidden[rows], weight, bias, buffer)
        softmax = Softmax(*(t[rows] for t in saved))
        backward_rows(dlogp[rows], dentropy[rows], logits, targets[rows], softmax, ctx.temperature, logits)
        gradients.add(rows, logits)
    return gradients


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    memory_budget: int | None = None,
) -> TokenLogprob:
    """Log-probability of each target, and entropy of its distribution, from the head's input.

    Args:
        hidden: [N, H], float32 or bfloat16, the final hidden state that predicts each target.
        weight: [V, H], the head, of the same dtype.
        targets: [N], int64, below V; a negative target gives 0, 0 and no gradient.
        temperature: sampling temperature, > 0.
        bias: [V], of the same dtype.
        memory_budget: bytes that the logits may take at once; None for 1.25 GB on CUDA, 32 MiB on a CPU.

    Returns:
        TokenLogprob of float32 [N], both differentiable in `hidden`, `weight` and `bias`; the gradient of a
        weight that needs none is not made.

    Raises:
        ValueError: an input is not as above. Targets >= V are seen on a CPU alone; on CUDA they give NaN.
    """
    check_head(hidden, weight, bias)
    check_devices(hidden=hidden, targets=targets)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"want temperature > 0; got {temperature}")
    targets = check_targets(targets, len(hidden), len(weight))
    chunks = row_chunks(len(hidden), weight, memory_budget)
    return TokenLogprob(*_LinearLogprob.apply(hidden, weight, bias, targets, temperature, chunks))
