"""Gumbel noise for every column of a row, which depends on nothing but (seed, step, column).

    gumbel[v] = -log(-log(u[v]))
    u[v]      = (k + 0.5) / 2**23,   k the upper 23 bits of word v % 4 of Philox-4x32-10 (Salmon et al. 2011)
                                     with key = seed and counter = (v // 4, step, 0, 0)

Kernels make it where they add it. They have the same u, bit for bit. The two logarithms are most of the work
of a sampling kernel, so theirs is a polynomial without libdevice's special cases; it moves the noise by less
than float32 rounds it where it matters (it is 12 or so in the token that wins among 150k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from medground_kernels.backend import cdiv, jit, tl

_MASK = 0xFFFFFFFF


def gumbel_noise(seeds: Tensor, step: int | Tensor, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise in plain torch, which is its definition.

    Args:
        seeds: [R], int64.
        step: 0 <= step < 2**32, or [R], int64, one a row.
        V: number of columns.
        dtype: of the logarithms; the uniform numbers are float32 in any.

    Returns:
        [R, V], `dtype`, between -2.9 and 16.7.
    """
    quads = torch.arange(cdiv(V, 4), device=seeds.device)[None]
    steps = step[:, None] if isinstance(step, Tensor) else torch.full_like(quads, step)
    zero = torch.zeros_like(quads)
    words = _philox(quads, steps, zero, zero, seeds[:, None])
    u = _uniform(torch.stack(words, -1).flatten(1)[:, :V]).to(dtype)
    return -(-u.log()).log()


def _uniform(bits: Tensor) -> Tensor:
    """32 random bits -> float32 strictly between 0 and 1."""
    # 23 of them: with 24, k + 0.5 would round up and u reach 1, where the noise is infinite
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox-4x32 in int64 arithmetic, whose products wrap as uint64 ones do."""
    rounds = torch.arange(10, device=seed.device)[:, None, None]
    k0, k1 = (seed + rounds * 0x9E3779B9) & _MASK, ((seed >> 32) + rounds * 0xBB67AE85) & _MASK
    for i in range(10):
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        # the lower halves c1 and c3 keep their upper bits, which the mask takes away once they are mixed in
        c0, c2 = ((p2 >> 32) ^ c1 ^ k0[i]) & _MASK, ((p0 >> 32) ^ c3 ^ k1[i]) & _MASK
        c1, c3 = p2, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


@jit
def _philox_block(c0, c1, seed):
    """Ten rounds of Philox-4x32 with counters (c0, c1, 0, 0), uint32 [QUADS]: four words each."""
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        # one wide product instead of its two halves
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p2.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _log(x):
    """log(x) of normal, finite, positive x, to one unit in the last place or so."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # so that x * 2 ** -exponent lies between sqrt(0.5) and sqrt(2)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # log(1 + f) / f, relative error 3e-7 at most
    p = -0.1010689 * f + 0.1622258
    p = p * f - 0.1725083
    p = p * f + 0.1990017
    p = p * f - 0.2496991
    p = p * f + 0.3333506
    p = p * f - 0.5000036
    p = p * f + 0.99999994
    return f * p + exponent.to(tl.float32) * (0.6931471805599453 * 2.0**-23)


@jit
def gumbel_block(start, step, seed, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Noise of the columns from `start` on, [BLOCK // WIDTH, WIDTH]."""
    quads = (start // 4 + tl.arange(0, BLOCK // WIDTH) * (WIDTH // 4)).to(tl.uint32)
    steps = tl.zeros_like(quads) + step.to(tl.uint32)
    w0, w1, w2, w3 = _philox_block(quads, steps, seed)
    if WIDTH == 8:
        # so that each thread makes the noise of the 8 columns that it loaded at once, and none move between threads
        x0, x1, x2, x3 = _philox_block(quads + 1, steps, seed)
        w0, w1, w2, w3 = tl.join(w0, x0), tl.join(w1, x1), tl.join(w2, x2), tl.join(w3, x3)
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK // WIDTH, WIDTH])
    # 23 random bits k as the fraction of a number from 1 to 2, exactly (k + 0.5) / 2**23 once shifted
    u = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-24)
    return -_log(-_log(u))
