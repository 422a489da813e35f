"""Sample the next token of each row, with random numbers that depend on nothing but (seed, step).

    token = argmax_v (logits[v] / temperature + gumbel[v])        temperature > 0 (the Gumbel-max trick)
            argmax_v  logits[v]                                   temperature 0

over the tokens v that are not banned and that top-k and top-p leave; the lowest of equals wins. The noise
depends on (seed, step, v) alone (`gumbel_noise`), so a row draws the same token whatever its neighbours,
the batch or the number of ranks.

A row is cut into splits, one program each, that keep in every lane the best token so far and a running
maximum and sum; a second, small kernel joins them and adds the banned tokens' logits, which only `full_logp`
counts. The logits are read once (with top-k or top-p, `logit_threshold` reads them before).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from medground_kernels.backend import cdiv, jit, next_power_of_2, runs_triton, tl
from medground_kernels.gumbel_noise import gumbel_block, gumbel_noise
from medground_kernels.logit_threshold import load_allowed, logit_threshold, logit_threshold_reference

BLOCK, NUM_WARPS = 1024, 4  # not measured yet
_PROGRAMS = 132 * 16  # several for each of an H100's processors
_TORCH_ELEMENTS = 1 << 20  # logits that the plain torch path works on at once
_MOST_BANNED = 64


class SampledToken(NamedTuple):
    """Per row: `token` [R], int64; in nats, float32 [R]: `logp` as drawn, `full_logp` with nothing left out."""

    token: Tensor
    logp: Tensor
    full_logp: Tensor


def sample_token_reference(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor,
    step: int | Tensor,
    banned: Tensor | None = None,
) -> SampledToken:
    """The definition, in the dtype of `logits`; float64 logits give the truth."""
    z = logits / (temperature or 1.0)
    kept = z if banned is None else z.index_fill(-1, banned, -torch.inf)
    noisy = kept
    if temperature and (top_k or top_p < 1):
        lowest = logit_threshold_reference(logits, temperature=temperature, top_k=top_k, top_p=top_p, banned=banned)
        kept = kept.masked_fill(logits < lowest[:, None], -torch.inf)
    if temperature:
        noisy = kept + gumbel_noise(seeds, step, z.shape[1], z.dtype)
    token = noisy.argmax(-1, keepdim=True)
    full_logp = z.log_softmax(-1).gather(-1, token)[:, 0]
    logp = kept.log_softmax(-1).gather(-1, token)[:, 0] if temperature else torch.zeros_like(full_logp)
    return SampledToken(token[:, 0], logp, full_logp)


@jit
def _fold_block(logits, lowest, rate, peak, total, kept, TRUNCATED: tl.constexpr):
    """Fold logits [LANES, WIDTH] into each lane's running maximum and sums of exp(z - maximum), all and kept."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # as long as all logits are -inf
    shrink = tl.exp2((peak - base) * rate)
    e = tl.exp2((logits - base[:, None]) * rate)
    total = shrink * total + tl.sum(e, 1)
    if TRUNCATED:
        kept = shrink * kept + tl.sum(tl.where(logits >= lowest, e, 0.0), 1)
    return new_peak, total, kept


@jit(do_not_specialize=["K", "splits"])
def _sample_split_kernel(
    logits_ptr, seeds_ptr, steps_ptr, banned_ptr, lowest_ptr, partial_ptr, best_token_ptr,
    V, K, row_stride, split_cols, splits, inv_temp,
    GREEDY: tl.constexpr, TRUNCATED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # int64: 14k rows of a 152k vocabulary pass 2**31 elements
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    rate = inv_temp * 1.4426950408889634  # exp(x) = 2 ** (x log2 e)
    seed = tl.load(seeds_ptr + row)
    step = tl.load(steps_ptr + row)
    lowest = -float("inf")
    if TRUNCATED:
        lowest = tl.load(lowest_ptr + row)
    peak = tl.full([BLOCK // WIDTH], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // WIDTH], tl.float32)
    kept = tl.zeros([BLOCK // WIDTH], tl.float32)
    best = tl.full([BLOCK // WIDTH, WIDTH], -float("inf"), tl.float32)
    best_start = tl.zeros([BLOCK // WIDTH, WIDTH], tl.int32)
    first, last = split * split_cols, tl.minimum((split + 1) * split_cols, V)
    here = 0
    for k in range(K):
        token = tl.load(banned_ptr + k)
        here += ((token >= first) & (token < last)).to(tl.int32)
    K = tl.where(here > 0, K, 0)  # most splits have no banned token to look for in every block
    for start in range(first, last, BLOCK):
        logits = load_allowed(logits_ptr + row * row_stride, banned_ptr, start, V, K, BLOCK)
        logits = tl.reshape(logits, [BLOCK // WIDTH, WIDTH])
        peak, total, kept = _fold_block(logits, lowest, rate, peak, total, kept, TRUNCATED)
        noisy = logits
        if TRUNCATED:
            noisy = tl.where(logits >= lowest, logits, -float("inf"))
        if not GREEDY:
            noisy = noisy * inv_temp + gumbel_block(start, step, seed, WIDTH, BLOCK)
        better = noisy > best  # the first of equals stays; NaN never wins
        best = tl.where(better, noisy, best)
        best_start = tl.where(better, start, best_start)
    top = tl.max(peak, 0)
    shrink = tl.exp2((peak - tl.where(top == -float("inf"), 0.0, top)) * rate)
    best = tl.reshape(best, [BLOCK])
    best_value = tl.max(best, 0)
    place = partial_ptr + row * splits * 4 + split
    tl.store(place, top)
    tl.store(place + splits, tl.sum(shrink * total, 0))
    tl.store(place + splits * 2, tl.sum(shrink * (kept if TRUNCATED else total), 0))
    tl.store(place + splits * 3, best_value)
    token = tl.reshape(best_start, [BLOCK]) + tl.arange(0, BLOCK)
    tl.store(best_token_ptr + row * splits + split, tl.min(tl.where(best == best_value, token, V), 0))


@jit(do_not_specialize=["K", "splits"])
def _sample_join_kernel(
    logits_ptr, banned_ptr, partial_ptr, best_token_ptr, token_ptr, logp_ptr, full_logp_ptr,
    V, K, row_stride, splits, inv_temp, GREEDY: tl.constexpr, SPLITS: tl.constexpr, BANNED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rate = inv_temp * 1.4426950408889634
    lanes = tl.arange(0, SPLITS)
    place = partial_ptr + row * splits * 4 + lanes
    peak = tl.load(place, mask=lanes < splits, other=-float("inf"))
    total = tl.load(place + splits, mask=lanes < splits, other=0.0)
    kept = tl.load(place + splits * 2, mask=lanes < splits, other=0.0)
    best = tl.load(place + splits * 3, mask=lanes < splits, other=-float("inf"))
    tokens = tl.load(best_token_ptr + row * splits + lanes, mask=lanes < splits, other=0)
    best_value = tl.max(best, 0)
    token = tl.min(tl.where(best == best_value, tokens, V), 0)

    nth = tl.arange(0, BANNED)
    ids = tl.load(banned_ptr + nth, mask=nth < K, other=-1)
    before = tl.sum(((ids[:, None] == ids[None, :]) & (nth[:, None] > nth[None, :])).to(tl.int32), 1)
    counts = (ids >= 0) & (ids < V) & (before == 0)
    banned = tl.load(logits_ptr + row * row_stride + ids, mask=counts, other=-float("inf")).to(tl.float32)

    top = tl.max(peak, 0)
    full_top = tl.maximum(top, tl.max(banned, 0))
    full_total = tl.sum(tl.exp2((peak - full_top) * rate) * total, 0) + tl.sum(tl.exp2((banned - full_top) * rate), 0)
    # where no token is possible there is no log-probability
    possible = best_value > -float("inf")
    logit = tl.load(logits_ptr + row * row_stride + token, mask=possible, other=float("nan")).to(tl.float32)
    full_logp = (logit - full_top) * inv_temp - tl.log(full_total)
    logp = (logit - top) * inv_temp
    if not GREEDY:
        logp -= tl.log(tl.sum(tl.exp2((peak - top) * rate) * kept, 0))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, tl.where(full_logp == full_logp, logp, full_logp))  # NaN anywhere shows
    tl.store(full_logp_ptr + row, full_logp)


def _launch(logits, temperature, lowest, seeds, steps, banned):
    R, V = logits.shape
    token = torch.empty(R, dtype=torch.int64, device=logits.device)
    logp, full_logp = (torch.empty(R, dtype=torch.float32, device=logits.device) for _ in range(2))
    K = 0 if banned is None else len(banned)
    banned = seeds if banned is None else banned
    inv_temp = 1 / (temperature or 1.0)
    split_cols = BLOCK * cdiv(cdiv(V, cdiv(_PROGRAMS, R)), BLOCK)
    splits = cdiv(V, split_cols)
    partial = torch.empty((R, 4, splits), dtype=torch.float32, device=logits.device)
    best_token = torch.empty((R, splits), dtype=torch.int32, device=logits.device)
    _sample_split_kernel[(R, splits)](
        logits, seeds, steps, banned, logits if lowest is None else lowest, partial, best_token,
        V, K, logits.stride(0), split_cols, splits, inv_temp,
        GREEDY=not temperature, TRUNCATED=lowest is not None, WIDTH=16 // logits.element_size(),
        BLOCK=BLOCK, num_warps=NUM_WARPS
    )  # fmt: skip
    _sample_join_kernel[(R,)](
        logits, banned, partial, best_token, token, logp, full_logp, V, K, logits.stride(0), splits, inv_temp,
        GREEDY=not temperature, SPLITS=next_power_of_2(splits), BANNED=next_power_of_2(max(K, 1)), num_warps=1
    )  # fmt: skip
    return SampledToken(token, logp, full_logp)


def _sample_torch(logits, temperature, lowest, seeds, steps, banned):
    R, V = logits.shape
    at_once = max(_TORCH_ELEMENTS // V, 1)
    parts = []
    for start in range(0, R, at_once):
        rows = slice(start, start + at_once)
        kept_from = None if lowest is None else lowest[rows]
        parts.append(_sample_rows(logits[rows], temperature, kept_from, seeds[rows], steps[rows], banned))
    return SampledToken(*map(torch.cat, zip(*parts, strict=True)))


def _sample_rows(logits, temperature, lowest, seeds, steps, banned):
    raw = logits.float()
    kept = raw if banned is None else raw.index_fill(-1, banned, -torch.inf)
    if lowest is not None:
        kept = kept.masked_fill(kept < lowest[:, None], -torch.inf)
    inv_temp = 1 / (temperature or 1.0)
    noisy = kept.masked_fill(kept.isnan(), -torch.inf)
    if temperature:
        noisy = noisy * inv_temp + gumbel_noise(seeds, steps, raw.shape[1], raw.dtype)
    best, token = noisy.max(-1)
    logit = raw.gather(-1, token[:, None])[:, 0].masked_fill(best == -torch.inf, torch.nan)

    def minus_log_total(values):
        top = values.amax(-1)
        return (logit - top) * inv_temp - ((values - top[:, None]) * inv_temp).exp().sum(-1).log()

    full_logp = minus_log_total(raw)
    logp = minus_log_total(kept) if temperature else torch.zeros_like(full_logp)
    return SampledToken(token, logp.where(~full_logp.isnan(), full_logp), full_logp)


def sample_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor,
    step: int | Tensor,
    banned: Tensor | None = None,
) -> SampledToken:
    """Draw one token per row, without waiting for the GPU.

    Args:
        logits: [R, V], float32, bfloat16 or float16, unit stride in V. A logit of -inf is never drawn.
        temperature: at least 1e-6 to sample; 0 for the most likely token, the lowest of equals, whatever
            top_k and top_p.
        top_k: draw from the `top_k` largest logits and those equal to the last of them; 0 for all.
        top_p: of these, from the fewest, largest first, that have `top_p` of the probability, and those
            equal to the last of them; 0 < top_p <= 1.
        seeds: [R], int64, one random stream a row.
        step: position in that stream, 0 <= step < 2**32; or [R], int64, one a row.
        banned: [K], int64, K <= 64, tokens that are never drawn and that top-k and top-p don't count; one may
            come twice.

    Returns:
        SampledToken. `logp` is the log-probability of the token under the distribution that it was drawn
        from (temperature 0: 0); `full_logp` that under the softmax of all V logits / temperature
        (temperature 0: of the logits), which is what the loss assumes. A row with NaN or +inf, or in which
        no token is possible, gets some token below V, and NaN for both.

    Raises:
        ValueError: an input is not as above, or all V tokens are banned. The ids in `banned` are looked at
            on a CPU alone (on a GPU that would wait for it): there, ids outside 0 .. V - 1 ban nothing.
    """
    _check(logits, temperature, top_k, top_p, seeds, step, banned)
    R, V = logits.shape
    if not R:
        nothing = logits.new_empty(0, dtype=torch.float32)
        return SampledToken(seeds.new_empty(0), nothing, nothing.clone())
    banned = None if banned is None else banned.contiguous()
    lowest = None
    if temperature and (0 < top_k < V or top_p < 1):
        lowest = logit_threshold(logits, temperature=temperature, top_k=top_k, top_p=top_p, banned=banned)
    draw = _launch if runs_triton(logits) else _sample_torch
    steps = step if isinstance(step, Tensor) else torch.full_like(seeds, step)
    return draw(logits, temperature, lowest, seeds.contiguous(), steps.contiguous(), banned)


def _check(logits, temperature, top_k, top_p, seeds, step, banned):
    if logits.dim() != 2 or logits.shape[1] < 1 or seeds.shape != logits.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(
            f"want logits [R, V], seeds [R] int64; got {tuple(logits.shape)}, {tuple(seeds.shape)} {seeds.dtype}"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"want float32, bfloat16 or float16 logits; got {logits.dtype}")
    V = logits.shape[1]
    if V > 1 and logits.stride(1) != 1:
        raise ValueError(f"want logits with unit stride in V; got {logits.stride()}")
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise ValueError(f"want temperature 0 or at least 1e-6; got {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"want top_k >= 0 and 0 < top_p <= 1; got {top_k}, {top_p}")
    if isinstance(step, Tensor):
        if step.shape != seeds.shape or step.dtype != torch.int64:
            raise ValueError(f"want step [R] int64; got {tuple(step.shape)} {step.dtype}")
    elif not 0 <= step < 2**32:
        raise ValueError(f"want 0 <= step < 2**32; got {step}")
    if banned is not None:
        if banned.dim() != 1 or len(banned) > _MOST_BANNED or banned.dtype != torch.int64:
            raise ValueError(f"want banned [K <= {_MOST_BANNED}] int64; got {tuple(banned.shape)} {banned.dtype}")
        if not banned.is_cuda and len(banned):
            if banned.min() < 0 or banned.max() >= V:
                raise ValueError(f"want banned tokens from 0 to V - 1 = {V - 1}; got {banned.tolist()}")
            if len(banned.unique()) == V:
                raise ValueError(f"want a token that is not banned; got all {V}")
