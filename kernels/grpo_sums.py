"""What the GRPO loss adds up: each sequence's tokens before, all tokens' terms after, in a fixed order.

kernels/grpo_loss.py has the formulas, kernels/grpo_terms.py the terms. Everything is float32 and comes twice, as a
kernel and in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medground_kernels.backend import jit, runs_triton, tl
from medground_kernels.grpo_options import GrpoOptions
from medground_kernels.grpo_terms import Scored, Sequences, kl_terms, kl_torch

BLOCK = 512  # tokens


def divisor(options: GrpoOptions) -> str:
    """What a token's share of the loss depends on."""
    return {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "length"}.get(options.loss_type, "tokens")


@jit(do_not_specialize=["N"])
def _sequence_kernel(
    targets_ptr, logp_ptr, old_ptr, ref_ptr, cu_ptr, of_token_ptr, count_ptr, log_ratio_ptr, mean_kl_ptr, N,
    HAS_TARGETS: tl.constexpr, HAS_LOGP: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    KL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    s = tl.program_id(0)
    # bounds that are wrong must not write beyond the tokens
    end = tl.minimum(tl.load(cu_ptr + s + 1), N)
    count = tl.zeros([BLOCK], tl.float32)
    log_ratio = tl.zeros([BLOCK], tl.float32)
    kl = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.maximum(tl.load(cu_ptr + s), 0), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = at < end
        tl.store(of_token_ptr + at, s, mask=at < end)
        if HAS_TARGETS:
            valid = tl.load(targets_ptr + at, mask=at < end, other=-1) >= 0
        count += tl.where(valid, 1.0, 0.0)
        if HAS_LOGP:
            logp = tl.load(logp_ptr + at, mask=valid, other=0.0)
            if HAS_OLD:
                log_ratio += logp - tl.load(old_ptr + at, mask=valid, other=0.0)
            if HAS_REF:
                kl += kl_terms(logp, tl.load(ref_ptr + at, mask=valid, other=0.0), KL)[0]
    total = tl.sum(count, 0)
    tl.store(count_ptr + s, total)
    if HAS_LOGP:
        tl.store(log_ratio_ptr + s, tl.sum(log_ratio, 0) / tl.maximum(total, 1.0))
        tl.store(mean_kl_ptr + s, tl.sum(kl, 0) / tl.maximum(total, 1.0))


@jit(do_not_specialize=["S"])
def _weight_kernel(
    count_ptr, total_ptr, weight_ptr, tokens_ptr, S, length, DIVISOR: tl.constexpr, HAS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float32)
    for first in range(0, S, BLOCK):
        counts += tl.load(count_ptr + first + lanes, mask=first + lanes < S, other=0.0)
    tokens = tl.sum(counts, 0)
    tl.store(tokens_ptr, tokens)
    if HAS_TOTAL:
        tokens = tl.load(total_ptr)
    for first in range(0, S, BLOCK):
        count = tl.load(count_ptr + first + lanes, mask=first + lanes < S, other=0.0)
        if DIVISOR == "sequence":
            weight = 1.0 / (S * tl.maximum(count, 1.0))
        elif DIVISOR == "length":
            weight = tl.full([BLOCK], 1.0, tl.float32) / (S * length)
        else:
            weight = tl.full([BLOCK], 1.0, tl.float32) / tl.maximum(tokens, 1.0)
        tl.store(weight_ptr + first + lanes, weight, mask=first + lanes < S)


@jit(do_not_specialize=["N"])
def _finish_kernel(terms_ptr, loss_ptr, stats_ptr, N, BLOCK: tl.constexpr):
    kinds = tl.arange(0, 8)
    sums = tl.zeros([BLOCK, 8], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, N, BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = terms_ptr + at.to(tl.int64) * 8
        sums += tl.load(place[:, None] + kinds[None, :], mask=(at < N)[:, None], other=0.0)
        valid = tl.load(place + 7, mask=at < N, other=0.0) > 0
        ratio = tl.load(place + 5, mask=at < N, other=0.0)
        least = tl.minimum(least, tl.where(valid, ratio, float("inf")))
        most = tl.maximum(most, tl.where(valid, ratio, -float("inf")))
    total = tl.sum(sums, 0)
    tokens = tl.sum(tl.where(kinds == 7, total, 0.0), 0)
    tl.store(loss_ptr, tl.sum(tl.where(kinds == 6, total, 0.0), 0))
    tl.store(stats_ptr + kinds, total / tl.maximum(tokens, 1.0), mask=kinds < 6)
    tl.store(stats_ptr + 6, tl.where(tokens > 0, tl.min(least, 0), 1.0))
    tl.store(stats_ptr + 7, tl.where(tokens > 0, tl.max(most, 0), 1.0))
    tl.store(stats_ptr + 8, tokens)
    tl.store(stats_ptr + 9, N - tokens)


def sequence_sums(
    scored: Scored,
    cu_seqlens: Tensor,
    N: int,
    options: GrpoOptions,
    total_tokens: int | Tensor | None,
    logp: Tensor | None,
) -> Sequences:
    """Count each sequence's tokens and weigh them; with `logp` [N], the sequence level's ratio and KL too."""
    device, S = cu_seqlens.device, len(cu_seqlens) - 1

    def numbers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device)

    if options.loss_type == "bnpo":
        total_tokens = None
    elif total_tokens is not None and not isinstance(total_tokens, Tensor):
        total_tokens = torch.full((), float(total_tokens), dtype=torch.float32, device=device)
    elif total_tokens is not None:
        total_tokens = total_tokens.float()
    if not runs_triton(cu_seqlens):
        return _sequence_sums_torch(scored, cu_seqlens, N, options, total_tokens, logp)
    of_token = torch.zeros(N, dtype=torch.int32, device=device)
    count, weight, tokens = numbers(S), numbers(S), numbers(1)
    log_ratio, mean_kl = (numbers(S if logp is not None else 0) for _ in range(2))
    if S:
        _sequence_kernel[(S,)](
            scored.targets, logp, scored.old_logp, scored.ref_logp, cu_seqlens, of_token, count, log_ratio, mean_kl, N,
            HAS_TARGETS=scored.targets is not None, HAS_LOGP=logp is not None, HAS_OLD=scored.old_logp is not None,
            HAS_REF=scored.ref_logp is not None, KL=options.kl, BLOCK=BLOCK
        )  # fmt: skip
    _weight_kernel[(1,)](
        count, total_tokens, weight, tokens, S, float(options.max_completion_length or 0), DIVISOR=divisor(options),
        HAS_TOTAL=total_tokens is not None, BLOCK=BLOCK
    )  # fmt: skip
    return Sequences(of_token, weight, log_ratio, mean_kl, tokens)


def finish(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Terms [N, 8] of all tokens -> loss, a scalar, and statistics [10]."""
    N = len(terms)
    if runs_triton(terms):
        loss, stats = terms.new_empty(()), terms.new_empty(10)
        _finish_kernel[(1,)](terms, loss, stats, N, BLOCK=BLOCK, num_warps=8)
        return loss, stats
    total = terms.sum(0)
    tokens = total[7]
    ratio = terms[terms[:, 7] > 0, 5]
    extremes = [ratio.min(), ratio.max()] if len(ratio) else [tokens.new_ones(())] * 2
    return total[6].clone(), torch.stack([*(total[:6] / tokens.clamp(min=1)), *extremes, tokens, N - tokens])


def _sequence_sums_torch(scored, cu_seqlens, N, options, total_tokens, logp):
    S, device = len(cu_seqlens) - 1, cu_seqlens.device
    of_token = torch.repeat_interleave(torch.arange(S, device=device), cu_seqlens.diff().long(), output_size=N)
    nothing = torch.zeros(N, dtype=torch.float32, device=device)
    valid = nothing + 1 if scored.targets is None else (scored.targets >= 0).float()

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(S).index_add_(0, of_token, values)

    count = summed(valid)
    log_ratio = mean_kl = nothing[:0]
    if logp is not None:
        apart = nothing if scored.old_logp is None else logp - scored.old_logp
        kl = nothing if scored.ref_logp is None else kl_torch(logp, scored.ref_logp, options.kl)[0]
        log_ratio = summed(apart.where(valid > 0, 0)) / count.clamp(min=1)
        mean_kl = summed(kl.where(valid > 0, 0)) / count.clamp(min=1)
    tokens = count.sum()
    if divisor(options) == "sequence":
        weight = 1 / (S * count.clamp(min=1))
    elif divisor(options) == "length":
        weight = torch.full_like(count, 1 / (max(S, 1) * options.max_completion_length))
    else:
        weight = (1 / (tokens if total_tokens is None else total_tokens).clamp(min=1)).expand(S)
    return Sequences(of_token.int(), weight, log_ratio, mean_kl, tokens[None])
