"""The GRPO loss straight from the hidden states, its gradients made in the forward pass.

    logits = (hidden @ weight.T + bias) / temperature,  logp and entropy as in kernels/token_logprob.py,
    loss and statistics as in kernels/grpo_loss.py

A token's gradient is known as soon as its row's log-sum-exp is. So for each chunk of rows (kernels/head.py) there is
one product that makes the logits, one kernel that turns each row into log-probability, entropy, ratio, clip, KL, loss
and statistics and overwrites it with its gradient, and two products for the gradients of hidden and weight: three in
all, the floor. Autograd's backward would make the logits a second time (Liger, TRL), or keep them. The kernel reads a
row twice, the second time from its end, where it is still in the cache.

A ratio of sequences (GSPO) needs every log-probability first: one more product, unless one chunk holds all rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medground_kernels.backend import check_devices, jit, runs_triton, tl
from medground_kernels.grpo_loss import as_float, check_sequences, grpo_loss_reference
from medground_kernels.grpo_options import GrpoOptions, GrpoOutput
from medground_kernels.grpo_sums import finish, sequence_sums
from medground_kernels.grpo_terms import TERMS, Scored, Sequences, kernel_options, token_terms, token_terms_torch
from medground_kernels.head import HeadGradients, check_head, head_logits, row_chunks, scale_
from medground_kernels.linear_logprob import linear_logprob_reference
from medground_kernels.token_logprob import check_targets, dlogits_block, fold_block, forward_rows, join_lanes

# two programs a processor: one waits for its row's sums while the other reads. The rows that they are at (264 of 304
# kB) pass the cache of 50 MB, so part of the second reading goes to memory. Not measured yet
BLOCK, NUM_WARPS = 16_384, 32
_TORCH_ELEMENTS = 1 << 18  # logits that the plain torch path looks at at once: what a core's cache holds


def linear_grpo_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    options: GrpoOptions | None = None,
    **more: Any,
) -> GrpoOutput:
    """The definition, in the dtype of `hidden`, differentiable by autograd; float64 gives the truth."""
    options = options or GrpoOptions()
    logp, entropy = linear_logprob_reference(hidden, weight, targets, options.temperature, bias)
    return grpo_loss_reference(logp, advantages, cu_seqlens, targets=targets, entropy=entropy, options=options, **more)


@jit
def _row_kernel(
    logits_ptr, targets_ptr, old_ptr, ref_ptr, advantages_ptr, of_token_ptr, weight_ptr, log_ratio_ptr, mean_kl_ptr,
    tokens_ptr, terms_ptr, logp_ptr, V, row_stride, inv_temp,
    epsilon_low, epsilon_high, delta, dual_clip, beta, entropy_coef, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, SEQUENCE: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # int64: 14k rows of a 152k vocabulary pass 2**31 elements
    row = tl.program_id(0).to(tl.int64)
    one = row + tl.arange(0, 1)
    # what is known of the token is asked for first, so that nothing waits for it later
    target = tl.load(targets_ptr + row)
    s = tl.load(of_token_ptr + one)
    advantage, weight, tokens = tl.load(advantages_ptr + s), tl.load(weight_ptr + s), tl.load(tokens_ptr)
    old = tl.zeros([1], tl.float32)
    ref = old
    mean_kl = old
    if SEQUENCE:
        old = tl.load(log_ratio_ptr + s)
        mean_kl = tl.load(mean_kl_ptr + s)
    elif HAS_OLD:
        old = tl.load(old_ptr + one)
    if HAS_REF:
        ref = tl.load(ref_ptr + one)
    logits_row = logits_ptr + row * row_stride
    # a token beyond the vocabulary has no log-probability
    logit = tl.load(logits_row + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)

    peak = tl.full([BLOCK // WIDTH], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // WIDTH], tl.float32)
    centred = tl.zeros([BLOCK // WIDTH], tl.float32)
    if target >= 0:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            block = tl.load(logits_row + cols, mask=cols < V, other=-float("inf"), eviction_policy="evict_last")
            block = tl.reshape(block.to(tl.float32), [BLOCK // WIDTH, WIDTH])
            peak, total, centred = fold_block(block, inv_temp, peak, total, centred)
    top, exp_sum, centred_sum = join_lanes(inv_temp, peak, total, centred)
    log_total = tl.log(exp_sum)
    entropy = log_total - centred_sum / exp_sum
    valid = (one >= 0) & (target >= 0)
    logp = tl.where(valid, (logit - top) * inv_temp - log_total, 0.0)
    tl.store(logp_ptr + one, logp)
    log_ratio = tl.zeros([1], tl.float32)
    if SEQUENCE:
        log_ratio = old
    elif HAS_OLD:
        log_ratio = logp - old
    dlogp, dentropy = token_terms(
        terms_ptr, one, one >= 0, valid, logp, entropy, log_ratio, mean_kl, ref, advantage, weight, tokens,
        epsilon_low, epsilon_high, delta, dual_clip, beta, entropy_coef, tau_pos, tau_neg,
        OBJECTIVE, KL, KL_RATIO, SEQUENCE, HAS_REF
    )  # fmt: skip
    if GRADIENT:
        # a warp may be here while another still has to read the target's logit
        tl.debug_barrier()
        dlogp, dentropy = tl.sum(dlogp, 0), tl.sum(dentropy, 0)
        last = (V - 1) // BLOCK * BLOCK
        for back in range(0, V, BLOCK):
            cols = last - back + tl.arange(0, BLOCK)
            grad = tl.zeros([BLOCK], tl.float32)
            if target >= 0:
                block = tl.load(logits_row + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
                grad = dlogits_block(block, cols, target, top, log_total, entropy, dlogp, dentropy, inv_temp)
            tl.store(logits_row + cols, grad, mask=cols < V)


class _Batch(NamedTuple):
    """What goes with the hidden states: targets, advantages, bounds, known log-probabilities, and what to do."""

    targets: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    scored: Scored
    options: GrpoOptions
    total_tokens: int | Tensor | None
    chunks: list[slice]


def _rows(
    rows: slice, logits: Tensor, batch: _Batch, sequences: Sequences, terms: Tensor, logp: Tensor, gradient: bool
) -> None:
    """Terms and log-probabilities of a chunk's rows; with `gradient` its logits become their gradient."""
    o, scored = batch.options, Scored(*(None if t is None else t[rows] for t in batch.scored))
    if not runs_triton(logits):
        _rows_torch(rows, logits, batch, sequences, terms, logp, gradient)
        return
    _row_kernel[(len(logits),)](
        logits, scored.targets, scored.old_logp, scored.ref_logp, batch.advantages, sequences.of_token[rows],
        *sequences[1:], terms[rows], logp[rows], logits.shape[1], logits.stride(0), 1 / o.temperature,
        **kernel_options(o, scored.ref_logp is not None), HAS_OLD=scored.old_logp is not None, GRADIENT=gradient,
        WIDTH=16 // logits.element_size(), BLOCK=BLOCK, num_warps=NUM_WARPS
    )  # fmt: skip


def _rows_torch(rows, logits, batch, sequences, terms, logp, gradient):
    n, V = logits.shape
    T = batch.options.temperature
    step = max(_TORCH_ELEMENTS // V, 1)
    for start in range(0, n, step):
        stop = min(start + step, n)
        at = slice(rows.start + start, rows.start + stop)
        block, targets = logits[start:stop], batch.targets[at]
        column, masked = targets.clamp(min=0)[:, None], (targets < 0)[:, None]
        raw = block.float()
        top = raw.amax(-1, keepdim=True)
        logit = raw.gather(-1, column)
        z = raw.sub(top).div_(T)
        e = z.exp()
        total = e.sum(-1, keepdim=True)
        log_total = total.log()
        mean = torch.linalg.vecdot(e, z.clamp_(min=-1e4))[:, None] / total
        entropy = (log_total - mean).masked_fill(masked, 0.0)[:, 0]
        logp[at] = ((logit - top) / T - log_total).masked_fill(masked, 0.0)[:, 0]
        dlogp, dentropy = token_terms_torch(
            at, logp[at], entropy, batch.scored, sequences, batch.advantages, batch.options, terms
        )
        if not gradient:
            continue
        if batch.options.entropy_coef:
            # -p * (dlogp + dentropy * (log p + entropy)), log p = z - log_total, entropy = log_total - mean
            grad = e.mul_(z.sub_(mean).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(-1 / total / T))
        else:
            grad = e.mul_(-dlogp[:, None] / total / T)
        grad.scatter_add_(-1, column, dlogp[:, None] / T)
        block.copy_(grad.masked_fill_(masked, 0.0) if masked.any() else grad)


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: _Batch, needed: tuple[bool, ...]
) -> tuple[HeadGradients, Tensor, Tensor]:
    """Sums of the gradients, terms [N, 8] and log-probabilities [N]; the logits are gone when it returns."""
    N, chunks = len(hidden), batch.chunks
    buffer = hidden.new_empty(chunks[0].stop if chunks else 0, len(weight))
    logp = hidden.new_empty(N, dtype=torch.float32)
    terms = hidden.new_empty((N, TERMS), dtype=torch.float32)
    at_sequence = batch.options.ratio_level == "sequence"
    if at_sequence:
        for rows in chunks:
            logits = head_logits(hidden[rows], weight, bias, buffer)
            logp[rows] = forward_rows(logits, batch.targets[rows], batch.options.temperature)[0]
    sequences = sequence_sums(
        batch.scored, batch.cu_seqlens, N, batch.options, batch.total_tokens, logp if at_sequence else None
    )
    gradients = HeadGradients(hidden, weight, bias, needed, len(chunks))
    for rows in chunks:
        if not (at_sequence and len(chunks) == 1):  # a single chunk's logits are still there
            logits = head_logits(hidden[rows], weight, bias, buffer)
        _rows(rows, logits, batch, sequences, terms, logp, any(needed))
        gradients.add(rows, logits)
    return gradients, terms, logp


class _LinearGrpo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: _Batch, grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = tuple(grad_enabled and need for need in ctx.needs_input_grad[:3])
        gradients, terms, logp = _chunks(hidden, weight, bias, batch, needed)
        ctx.gradients = gradients.finish()
        loss, stats = finish(terms)
        ctx.mark_non_differentiable(stats, logp)
        return loss, stats, logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of linear_grpo are made once, in the forward pass, and have been given out"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else scale_(g, dloss) for g in gradients), None, None


def linear_grpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    options: GrpoOptions | None = None,
    total_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    memory_budget: int | None = None,
) -> GrpoOutput:
    """GRPO loss of N scored tokens in S sequences, from the head's input; backward only hands its gradients out.

    Args:
        hidden: [N, H], float32 or bfloat16, the final hidden state that predicts each target.
        weight: [V, H], the head, of the same dtype; its gradient is not made when it needs none.
        targets: [N], int64, below V; a negative target takes no part.
        advantages: [S], float32.
        cu_seqlens: [S+1], int32, from 0 to N: where each sequence starts in the flat tokens.
        old_logp: [N], under the policy that sampled; None means the policy itself (ratio 1).
        ref_logp: [N], under the reference policy; required when beta > 0.
        options: what to compute, the temperature included; None for the defaults.
        total_tokens: divisor of dapo and cispo, as a number or a scalar on the device; None for the tokens that
            take part.
        bias: [V], of the weight's dtype.
        memory_budget: bytes that the logits may take at once; None for 1.25 GB on CUDA, 32 MiB on a CPU. Beside
            them there are the gradients, the weight's in float32 when more than one chunk adds to it.

    Returns:
        GrpoOutput(loss, stats, logp). `backward` may be called once: ask for all gradients together. An upstream
        gradient of 1 costs nothing; another is multiplied in, over the gradients' memory and in their dtype.

    Raises:
        ValueError: an input is not as above. Targets >= V and wrong cu_seqlens are seen on a CPU alone; on CUDA
            such a target gives NaN.
    """
    options = options or GrpoOptions()
    check_head(hidden, weight, bias)
    check_devices(hidden=hidden, targets=targets, advantages=advantages)
    N = len(hidden)
    targets = check_targets(targets, N, len(weight))
    scored = Scored(targets, as_float(old_logp), as_float(ref_logp))
    check_sequences(advantages, cu_seqlens, N, options, scored)
    batch = _Batch(
        targets, advantages.detach().float().contiguous(), cu_seqlens.contiguous(), scored, options, total_tokens,
        row_chunks(N, weight, memory_budget)
    )  # fmt: skip
    return GrpoOutput(*_LinearGrpo.apply(hidden, weight, bias, batch, torch.is_grad_enabled()))
