"""Log-probability and entropy of each sampled token, in one pass over the logits.

    z = logits / temperature
    logp[n]    = z[n, targets[n]] - logsumexp(z[n, :])
    entropy[n] = logsumexp(z[n, :]) - sum_v softmax(z[n, :])[v] * z[n, v]

    dlogits[n, v] = (dlogp[n] * (1[v = targets[n]] - p) - dentropy[n] * p * (log p + entropy[n])) / temperature,
                    p = softmax(z[n, :])[v]

A row is cut into splits, one program each, that keep a running maximum, sum and weighted sum in every
lane, that is for what a thread loads at once (Milakov & Gimelshein 2018, arXiv:1805.02867); a second,
small kernel puts the splits together in their order. Forward reads the logits once; backward reads them
once and writes the gradient, in the logits' own memory if asked. Kept for backward beside the logits: 3N
floats. Everything is float32 whatever the dtype of the logits (a bfloat16 log-softmax is off by up to
4e-3), and logits are divided by the temperature only after their maximum is taken away: a logit of 1e4
would lose three digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medground_kernels.backend import cdiv, check_devices, jit, next_power_of_2, runs_triton, tl

BLOCK, NUM_WARPS = 4096, 8  # not measured yet
_PROGRAMS = 132 * 16  # several for each of an H100's processors, so that a row cut finely keeps all of them busy
_SPLIT = 32_768  # columns a program reads at most: short programs make a short tail
_TORCH_ELEMENTS = 1 << 20  # logits that the plain torch path holds in float32 at once


class TokenLogprob(NamedTuple):
    """Per scored token, in nats: `logp` [N] and `entropy` [N], float32."""

    logp: Tensor
    entropy: Tensor


def token_logprob_reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenLogprob:
    """The definition, in the dtype of `logits`; float64 logits give the truth."""
    scored = targets >= 0
    all_logp = (logits / temperature).log_softmax(-1)
    logp = all_logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    # a logit of -inf has probability 0 and adds nothing
    entropy = -(all_logp.exp() * all_logp.masked_fill(all_logp == -torch.inf, 0)).sum(-1)
    return TokenLogprob(logp.masked_fill(~scored, 0.0), entropy.masked_fill(~scored, 0.0))


@jit
def fold_block(logits, inv_temp, peak, total, centred):
    """Fold logits [LANES, WIDTH] into each lane's running maximum, sum of e = exp(z - maximum) and sum of e * log e."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # as long as all logits are -inf
    shift = tl.maximum((peak - base) * inv_temp, -1e4)  # exp is 0 there, and 0 * -inf would not be
    shrink = tl.exp(shift)
    delta = (logits - base[:, None]) * inv_temp
    e = tl.exp(delta)
    centred = shrink * (centred + shift * total) + tl.sum(e * tl.maximum(delta, -1e4), 1)
    total = shrink * total + tl.sum(e, 1)
    return new_peak, total, centred


@jit
def join_lanes(inv_temp, peak, total, centred):
    """Put lanes [LANES] together, as `fold_block` has them."""
    top = tl.max(peak, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    shift = tl.maximum((peak - base) * inv_temp, -1e4)
    shrink = tl.exp(shift)
    return top, tl.sum(shrink * total, 0), tl.sum(shrink * (centred + shift * total), 0)


@jit
def dlogits_block(logits, cols, target, top, log_total, entropy, dlogp, dentropy, inv_temp):
    """Gradient of dlogp * logp + dentropy * entropy in the logits of columns `cols`."""
    logp = (logits - top) * inv_temp - log_total
    bonus = dentropy * (tl.maximum(logp, -1e4) + entropy)
    return (tl.where(cols == target, dlogp, 0.0) - tl.exp(logp) * (dlogp + bonus)) * inv_temp


@jit(do_not_specialize=["splits"])
def _logprob_split_kernel(
    logits_ptr, targets_ptr, partial_ptr, V, row_stride, split_cols, splits, inv_temp,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # int64: 14k rows of a 152k vocabulary pass 2**31 elements
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if tl.load(targets_ptr + row) >= 0:
        peak = tl.full([BLOCK // WIDTH], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK // WIDTH], tl.float32)
        centred = tl.zeros([BLOCK // WIDTH], tl.float32)
        for start in range(split * split_cols, tl.minimum((split + 1) * split_cols, V), BLOCK):
            cols = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + row * row_stride + cols, mask=cols < V, other=-float("inf"))
            logits = tl.reshape(logits.to(tl.float32), [BLOCK // WIDTH, WIDTH])
            peak, total, centred = fold_block(logits, inv_temp, peak, total, centred)
        top, total_sum, centred_sum = join_lanes(inv_temp, peak, total, centred)
        place = partial_ptr + row * splits * 3 + split
        tl.store(place, top)
        tl.store(place + splits, total_sum)
        tl.store(place + splits * 2, centred_sum)


@jit(do_not_specialize=["splits"])
def _logprob_join_kernel(
    logits_ptr, targets_ptr, partial_ptr, logp_ptr, entropy_ptr, top_ptr, log_total_ptr,
    V, row_stride, splits, inv_temp, SPLITS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logp = 0.0
    entropy = 0.0
    top = 0.0
    log_total = 0.0
    if target >= 0:
        lanes = tl.arange(0, SPLITS)
        place = partial_ptr + row * splits * 3 + lanes
        peak = tl.load(place, mask=lanes < splits, other=-float("inf"))
        total = tl.load(place + splits, mask=lanes < splits, other=0.0)
        centred = tl.load(place + splits * 2, mask=lanes < splits, other=0.0)
        top, total, centred = join_lanes(inv_temp, peak, total, centred)
        log_total = tl.log(total)
        # a token beyond the vocabulary has no log-probability
        logit = tl.load(logits_ptr + row * row_stride + target, mask=target < V, other=float("nan")).to(tl.float32)
        logp = (logit - top) * inv_temp - log_total
        entropy = log_total - centred / total
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(top_ptr + row, top)
    tl.store(log_total_ptr + row, log_total)


@jit
def _logprob_backward_kernel(
    dlogp_ptr, dentropy_ptr, logits_ptr, targets_ptr, entropy_ptr, top_ptr, log_total_ptr, dlogits_ptr,
    V, row_stride, out_stride, inv_temp, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    grad = tl.zeros([BLOCK], tl.float32)
    if target >= 0:
        logits = tl.load(logits_ptr + row * row_stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        top, log_total, entropy = tl.load(top_ptr + row), tl.load(log_total_ptr + row), tl.load(entropy_ptr + row)
        dlogp, dentropy = tl.load(dlogp_ptr + row), tl.load(dentropy_ptr + row)
        grad = dlogits_block(logits, cols, target, top, log_total, entropy, dlogp, dentropy, inv_temp)
    tl.store(dlogits_ptr + row * out_stride + cols, grad, mask=cols < V)


class Softmax(NamedTuple):
    """What backward needs of each row, float32 [N]: entropy, largest logit, log sum of exp(z - its maximum)."""

    entropy: Tensor
    top: Tensor
    log_total: Tensor


def forward_rows(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Softmax]:
    """Log-probability, float32 [N], of each target, and the softmax that `backward_rows` continues from."""
    N, V = logits.shape
    logp, entropy, top, log_total = (logits.new_empty(N, dtype=torch.float32) for _ in range(4))
    if not N:
        return logp, Softmax(entropy, top, log_total)
    if not runs_triton(logits):
        _forward_torch(logits, targets, temperature, logp, entropy, top, log_total)
        return logp, Softmax(entropy, top, log_total)
    split_cols = BLOCK * cdiv(cdiv(V, max(cdiv(V, _SPLIT), cdiv(_PROGRAMS, N))), BLOCK)
    splits = cdiv(V, split_cols)
    partial = torch.empty((N, 3, splits), dtype=torch.float32, device=logits.device)
    _logprob_split_kernel[(N, splits)](
        logits, targets, partial, V, logits.stride(0), split_cols, splits, 1 / temperature,
        WIDTH=16 // logits.element_size(), BLOCK=BLOCK, num_warps=NUM_WARPS
    )  # fmt: skip
    _logprob_join_kernel[(N,)](
        logits, targets, partial, logp, entropy, top, log_total, V, logits.stride(0), splits, 1 / temperature,
        SPLITS=max(next_power_of_2(splits), 64), num_warps=1
    )  # fmt: skip
    return logp, Softmax(entropy, top, log_total)


def backward_rows(
    dlogp: Tensor, dentropy: Tensor, logits: Tensor, targets: Tensor, softmax: Softmax, temperature: float, out: Tensor
) -> None:
    """Write the gradient in the logits into `out` [N, V], which may be `logits` itself."""
    N, V = logits.shape
    if not N:
        return
    if not runs_triton(logits):
        _backward_torch(dlogp, dentropy, logits, targets, softmax, temperature, out)
        return
    _logprob_backward_kernel[(N, cdiv(V, BLOCK))](
        dlogp, dentropy, logits, targets, *softmax, out, V, logits.stride(0), out.stride(0), 1 / temperature,
        BLOCK=BLOCK, num_warps=NUM_WARPS
    )  # fmt: skip


def _forward_torch(logits, targets, temperature, logp, entropy, top, log_total):
    for rows in _row_blocks(*logits.shape):
        raw = logits[rows].float()
        top[rows] = raw.amax(-1)
        z = raw - top[rows, None]
        z = z if temperature == 1 else z.div_(temperature)
        e = z.exp()
        total = e.sum(-1)  # log_softmax would be faster, but adds 150k numbers up one after the other
        log_total[rows] = total.log()
        logp[rows] = z.gather(-1, targets[rows].clamp(min=0)[:, None])[:, 0] - log_total[rows]
        entropy[rows] = log_total[rows] - e.mul_(z.clamp_(min=-1e4)).sum(-1) / total
    for result in (logp, entropy):
        result.masked_fill_(targets < 0, 0.0)


def _backward_torch(dlogp, dentropy, logits, targets, softmax, temperature, out):
    masked = (targets < 0)[:, None]
    column = targets.clamp(min=0)[:, None]
    dlogp, dentropy = dlogp[:, None] / temperature, dentropy[:, None] / temperature
    for rows in _row_blocks(*logits.shape):
        logp = logits[rows].float() - softmax.top[rows, None]
        logp = (logp if temperature == 1 else logp.div_(temperature)).sub_(softmax.log_total[rows, None])
        p = logp.exp()
        if dentropy[rows].any():
            weight = logp.clamp_(min=-1e4).add_(softmax.entropy[rows, None]).mul_(-dentropy[rows])
            grad = p.mul_(weight.sub_(dlogp[rows]))
        else:
            grad = p.mul_(-dlogp[rows])
        grad.scatter_add_(-1, column[rows], dlogp[rows])
        out[rows] = grad.masked_fill_(masked[rows], 0.0) if masked[rows].any() else grad


def _row_blocks(N: int, V: int) -> list[slice]:
    step = max(_TORCH_ELEMENTS // V, 1)
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, inplace: bool) -> tuple[Tensor, Tensor]:
        logp, softmax = forward_rows(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, *softmax)
        ctx.temperature, ctx.inplace = temperature, inplace
        return logp, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, *softmax = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        backward_rows(
            dlogp.contiguous(), dentropy.contiguous(), logits, targets, Softmax(*softmax), ctx.temperature, out
        )
        if ctx.inplace:
            # so that autograd notices whoever else still needs the logits
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None


def check_targets(targets: Tensor, N: int, V: int) -> Tensor:
    """Targets, contiguous; on a CPU, where it costs no waiting, also seen to be below V."""
    if targets.shape != (N,) or targets.dtype != torch.int64:
        raise ValueError(f"want targets [{N}] int64; got {tuple(targets.shape)} {targets.dtype}")
    if not targets.is_cuda and N and targets.max() >= V:
        raise ValueError(f"want targets below V = {V}; got {targets.max()}")
    return targets.contiguous()


def token_logprob(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, inplace_backward: bool = False
) -> TokenLogprob:
    """Log-probability of each target, and entropy of its distribution, under the policy.

    Args:
        logits: [N, V], float32, bfloat16 or float16, unit stride in V, any stride in N.
        targets: [N], int64, below V; a negative target gives 0, 0 and no gradient.
        temperature: sampling temperature, > 0.
        inplace_backward: write the gradient into the memory of `logits`, which nothing else may need.

    Returns:
        TokenLogprob of float32 [N], both differentiable in `logits`.

    Raises:
        ValueError: an input is not as above. Targets >= V are seen on a CPU alone (to look would wait for
            the GPU); on CUDA their log-probability is NaN.
    """
    if logits.dim() != 2 or logits.shape[1] < 1 or targets.shape != logits.shape[:1]:
        raise ValueError(f"want logits [N, V], targets [N]; got {tuple(logits.shape)}, {tuple(targets.shape)}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"want float32, bfloat16 or float16 logits; got {logits.dtype}")
    N, V = logits.shape
    if (V > 1 and logits.stride(1) != 1) or (inplace_backward and N > 1 and logits.stride(0) < V):
        raise ValueError(f"want logits with unit stride in V and rows that do not overlap; got {logits.stride()}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"want temperature > 0; got {temperature}")
    check_devices(logits=logits, targets=targets)
    targets = check_targets(targets, N, V)
    return TokenLogprob(*_TokenLogprob.apply(logits, targets, temperature, inplace_backward))
