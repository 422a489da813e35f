"""Sample the next token of each row, with random numbers that depend on nothing but (seed, step).

    token = argmax_v (logits[v] / temperature + gumbel[v])        temperature > 0 (the Gumbel-max trick)
            argmax_v  logits[v]                                   temperature 0
    gumbel[v] = -log(-log(u)),   u from Philox-4x32-10 (Salmon et al. 2011) with key = seed and
                                 counter = (v // 4, step, 0, 0)

So a row draws the same token whatever its neighbours, the batch or the number of ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class SampledToken(NamedTuple):
    """`token` [R], int64; `logp` [R], float32, under the distribution that was sampled from."""

    token: Tensor
    logp: Tensor


def sample_token(
    logits: Tensor, *, temperature: float, seeds: Tensor, step: int, banned: Tensor | None = None
) -> SampledToken:
    """Draw one token per row.

    Args:
        logits: [R, V], a floating dtype.
        temperature: > 0 to sample, 0 for the most likely token.
        seeds: [R], int64 >= 0, one random stream a row.
        step: position in that stream, 0 <= step < 2**32.
        banned: [K], int64, tokens that are never drawn; they stay in the distribution of `logp`.

    Returns:
        SampledToken. `logp` is under the softmax of all V logits / temperature (temperature 0: of the
        logits), which is what the loss assumes.

    Raises:
        ValueError: shapes, dtypes or the temperature are not as above.
    """
    if logits.dim() != 2 or seeds.shape != logits.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(
            f"want logits [R, V], seeds [R] int64; got {tuple(logits.shape)}, {tuple(seeds.shape)} {seeds.dtype}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"want temperature >= 0; got {temperature}")
    z = logits.float() / (temperature or 1.0)
    noisy = z + _gumbel(seeds, step, z.shape[1]) if temperature else z.clone()
    if banned is not None:
        noisy[:, banned] = -torch.inf
    token = noisy.argmax(-1)
    logp = z.gather(-1, token[:, None])[:, 0] - z.logsumexp(-1)
    return SampledToken(token, logp)


def _gumbel(seeds: Tensor, step: int, V: int) -> Tensor:
    quads = torch.arange(-(-V // 4), device=seeds.device)
    counter = [quads[None], torch.full_like(quads, step)[None], torch.zeros_like(quads)[None]]
    words = _philox(counter[0], counter[1], counter[2], counter[2], seeds[:, None])
    u = _uniform(torch.stack(words, -1).flatten(1)[:, :V])
    return -(-u.log()).log()


def _uniform(bits: Tensor) -> Tensor:
    """32 random bits -> float32 strictly between 0 and 1."""
    # 23 of them: with 24, k + 0.5 would round up and u reach 1, where the noise is infinite
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> list[Tensor]:
    """Ten rounds of Philox-4x32 in int64 arithmetic, whose products wrap as uint64 ones do."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p2 >> 32) & _MASK ^ c1 ^ k0, p2 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0.expand(len(seed), -1), c1.expand(len(seed), -1), c2.expand(len(seed), -1), c3.expand(len(seed), -1)]
