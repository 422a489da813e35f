"""Log-probability and entropy of each sampled token.

    z = logits / temperature
    logp[n]    = z[n, targets[n]] - logsumexp(z[n, :])
    entropy[n] = logsumexp(z[n, :]) - sum_v softmax(z[n, :])[v] * z[n, v]

Plain torch, in float32 whatever the dtype of the logits: a bfloat16 log-softmax is off by up to 4e-3.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprob(NamedTuple):
    """Per scored token, in nats: `logp` [N] and `entropy` [N], float32."""

    logp: Tensor
    entropy: Tensor


def token_logprob(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> TokenLogprob:
    """Log-probability of each target, and entropy of its distribution, under the policy.

    Args:
        logits: [N, V], a floating dtype.
        targets: [N], int64, below V; a negative target gives 0, 0 and no gradient.
        temperature: sampling temperature, > 0.

    Returns:
        TokenLogprob of float32 [N], both differentiable in `logits`.

    Raises:
        ValueError: shapes, dtypes or the temperature are not as above.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"want logits [N, V], targets [N]; got {tuple(logits.shape)}, {tuple(targets.shape)}")
    if not logits.is_floating_point() or targets.dtype != torch.int64:
        raise ValueError(f"want floating logits, int64 targets; got {logits.dtype}, {targets.dtype}")
    if not temperature > 0:
        raise ValueError(f"want temperature > 0; got {temperature}")
    scored = targets >= 0
    all_logp = (logits.float() / temperature).log_softmax(-1)
    logp = all_logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(all_logp.exp() * all_logp).sum(-1)
    return TokenLogprob(logp.masked_fill(~scored, 0.0), entropy.masked_fill(~scored, 0.0))
