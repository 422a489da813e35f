"""The logit below which top-k and top-p leave no token.

    top-k: token v stays if fewer than top_k tokens have a larger logit
    top-p: of those, v stays if the probabilities softmax(logits / temperature), over those, of the tokens
           with a larger logit sum to less than top_p (Holtzman et al. 2019, arXiv:1904.09751)

So tokens with equal logits stay or go together, and one always stays. A sort of V logits is far slower
than a search: the float32 numbers in their order are the integers of 32 bits, and each pass over the row
settles two bits of the threshold, by counting (or summing the probabilities of) the tokens that three
candidates would leave. The row stays in the L2 cache meanwhile. 16-bit logits need half the passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medground_kernels.backend import jit, runs_triton, tl

BLOCK, NUM_WARPS = 8192, 16  # not measured yet
# the lowest bits of a 16-bit number made float32 are all alike; settled in pairs from the top
_LAST_SHIFT = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}


def logit_threshold_reference(
    logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, banned: Tensor | None = None
) -> Tensor:
    """The definition, with V * V comparisons a row; as `logit_threshold`, in the dtype of `logits`."""
    allowed = logits if banned is None else logits.index_fill(-1, banned, -torch.inf)
    larger = allowed[:, None, :] > allowed[:, :, None]
    stays = larger.sum(-1) < (top_k or logits.shape[-1])
    p = (allowed / temperature).masked_fill(~stays, -torch.inf).softmax(-1)
    if top_p < 1:
        stays &= (larger * p[:, None, :]).sum(-1) < top_p
    return allowed.masked_fill(~stays, torch.inf).amin(-1)


@jit
def load_allowed(row_ptr, banned_ptr, start, V, K, BLOCK: tl.constexpr):
    """Logits [BLOCK], float32, of a row's columns from `start` on; -inf for the banned and from V on."""
    lanes = tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + start + lanes, mask=start + lanes < V, other=-float("inf")).to(tl.float32)
    for k in range(K):
        lane = tl.load(banned_ptr + k) - start
        if (lane >= 0) & (lane < BLOCK):
            logits = tl.where(lanes == lane.to(tl.int32), -float("inf"), logits)
    return logits


@jit
def _float_of(key):
    """The float32 with that place (uint32) among all in their order; at least -inf."""
    key = tl.maximum(key, 0x007FFFFF)  # below are NaNs
    return tl.where(key >= 0x80000000, key ^ 0x80000000, ~key).to(tl.float32, bitcast=True)


@jit
def _amount_left(
    row_ptr, banned_ptr, V, K, t1, t2, t3, top, rate, MASS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """How many tokens, or with MASS how much of sum(exp(z - max z)), has a logit of at least t1, t2, t3."""
    left1 = tl.zeros([BLOCK // WIDTH], tl.float32)
    left2 = tl.zeros([BLOCK // WIDTH], tl.float32)
    left3 = tl.zeros([BLOCK // WIDTH], tl.float32)
    for start in range(0, V, BLOCK):
        logits = load_allowed(row_ptr, banned_ptr, start, V, K, BLOCK)
        logits = tl.reshape(logits, [BLOCK // WIDTH, WIDTH])
        weight = tl.full([BLOCK // WIDTH, WIDTH], 1.0, tl.float32)
        if MASS:
            weight = tl.exp2((logits - top) * rate)
        left1 += tl.sum(tl.where(logits >= t1, weight, 0.0), 1)
        left2 += tl.sum(tl.where(logits >= t2, weight, 0.0), 1)
        left3 += tl.sum(tl.where(logits >= t3, weight, 0.0), 1)
    return tl.sum(left1, 0), tl.sum(left2, 0), tl.sum(left3, 0)


@jit
def _largest_leaving(
    goal,
    row_ptr,
    banned_ptr,
    V,
    K,
    top,
    rate,
    MASS: tl.constexpr,
    LAST_SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest threshold that leaves the amount `goal`; -inf if none does."""
    key = tl.zeros([], tl.uint32)
    for i in range((32 - LAST_SHIFT) // 2):
        unit = tl.full([], 1, tl.uint32) << (30 - 2 * i)
        t1, t2, t3 = _float_of(key + unit), _float_of(key + 2 * unit), _float_of(key + 3 * unit)
        left1, left2, left3 = _amount_left(row_ptr, banned_ptr, V, K, t1, t2, t3, top, rate, MASS, WIDTH, BLOCK)
        digit = (left1 >= goal).to(tl.uint32) + (left2 >= goal).to(tl.uint32) + (left3 >= goal).to(tl.uint32)
        key += digit * unit
    return _float_of(key)


@jit(do_not_specialize=["K", "top_k"])
def _threshold_kernel(
    logits_ptr, banned_ptr, threshold_ptr, V, K, row_stride, top_k, top_p, inv_temp,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, LAST_SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # int64: 14k rows of a 152k vocabulary pass 2**31 elements
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    rate = inv_temp * 1.4426950408889634  # exp(x) = 2 ** (x log2 e)
    threshold = -float("inf")
    if TOP_K:
        threshold = _largest_leaving(top_k, row_ptr, banned_ptr, V, K, 0.0, rate, False, LAST_SHIFT, WIDTH, BLOCK)
    if TOP_P:
        peak = tl.full([BLOCK // WIDTH], -float("inf"), tl.float32)
        for start in range(0, V, BLOCK):
            logits = load_allowed(row_ptr, banned_ptr, start, V, K, BLOCK)
            peak = tl.maximum(peak, tl.max(tl.reshape(logits, [BLOCK // WIDTH, WIDTH]), 1))
        top = tl.max(peak, 0)
        total, _, _ = _amount_left(
            row_ptr, banned_ptr, V, K, threshold, threshold, threshold, top, rate, True, WIDTH, BLOCK
        )  # fmt: skip
        threshold = _largest_leaving(
            top_p * total, row_ptr, banned_ptr, V, K, top, rate, True, LAST_SHIFT, WIDTH, BLOCK
        )
        # where top_p is so small that top_p * total is 0
        threshold = tl.minimum(threshold, top)
    tl.store(threshold_ptr + row, threshold)


def _threshold_torch(logits, temperature, top_k, top_p, banned):
    V = logits.shape[1]
    allowed = logits.float()
    if banned is not None:
        allowed = allowed.index_fill(-1, banned, -torch.inf)
    falling = allowed.sort(-1, descending=True).values
    threshold = falling[:, top_k - 1] if 0 < top_k < V else falling[:, -1]
    if top_p < 1:
        e = ((falling - falling[:, :1]) / temperature).exp().masked_fill(falling < threshold[:, None], 0.0)
        mass = e.cumsum(-1)
        enough = (mass < top_p * mass[:, -1:]).sum(-1)
        threshold = falling.gather(-1, enough[:, None])[:, 0]
    return threshold


def logit_threshold(
    logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, banned: Tensor | None = None
) -> Tensor:
    """A threshold per row: top-k and then top-p leave the tokens whose logit is not below it.

    Args:
        logits: [R, V], float32, bfloat16 or float16, unit stride in V.
        temperature: sampling temperature, > 0; top-p depends on it.
        top_k: leave the `top_k` largest logits and those equal to the last of them; 0 for all.
        top_p: then leave the fewest tokens, largest first, that have `top_p` of the probability, and those
            equal to the last of them; 0 < top_p <= 1.
        banned: [K], int64, tokens that count as logits of -inf; may come twice.

    Returns:
        [R], float32; undefined for a row with NaN or +inf, or in which all is -inf or banned. Arguments
        are not checked: `sample_token` does.
    """
    R, V = logits.shape
    if not runs_triton(logits):
        return _threshold_torch(logits, temperature, top_k, top_p, banned)
    threshold = torch.empty(R, dtype=torch.float32, device=logits.device)
    K = 0 if banned is None else len(banned)
    _threshold_kernel[(R,)](
        logits, logits if banned is None else banned, threshold, V, K, logits.stride(0), top_k, top_p, 1 / temperature,
        TOP_K=top_k > 0, TOP_P=top_p < 1, LAST_SHIFT=_LAST_SHIFT[logits.dtype], WIDTH=16 // logits.element_size(),
        BLOCK=BLOCK, num_warps=NUM_WARPS
    )  # fmt: skip
    return threshold
