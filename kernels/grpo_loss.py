"""The GRPO objective over flat, unpadded tokens: clipped policy loss, KL, and statistics.

For token t of sequence s, with r = exp(logp - old_logp):

    policy[t] = -min(r * A[s], clip(r, 1 - epsilon_low, 1 + epsilon_high) * A[s])
    loss      = sum_t w[t] * (policy[t] + beta * kl[t])

    w[t] = 1 / (S * tokens of s)            grpo     (Shao et al. 2024, arXiv:2402.03300)
           1 / (S * max_completion_length)  dr_grpo  (Liu et al. 2025, arXiv:2503.20783)
           1 / total_tokens                 dapo     (Yu et al. 2025, arXiv:2503.14476)

    kl with d = ref_logp - logp:   k1 = -d,   k2 = d*d / 2,   k3 = exp(d) - d - 1
                                   (Schulman 2020, joschu.net/blog/kl-approx.html)
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

STAT_NAMES = ("policy_loss", "kl", "entropy", "clip_low", "clip_high", "ratio_mean", "ratio_min", "ratio_max", "tokens")


@dataclass(frozen=True, kw_only=True)
class GrpoOptions:
    """What the loss computes; the module's docstring has the formulas."""

    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """What the sum over tokens is divided by."""
    epsilon_low: float = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above at 1 + epsilon_high."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference policy."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence."""
    max_completion_length: int | None = None
    """Constant divisor of dr_grpo, in tokens."""

    def __post_init__(self) -> None:
        if self.loss_type not in ("grpo", "dr_grpo", "dapo") or self.kl not in ("k1", "k2", "k3"):
            raise ValueError(
                f"want loss_type grpo, dr_grpo or dapo, kl k1, k2 or k3; got {self.loss_type!r}, {self.kl!r}"
            )
        if not (0 <= self.epsilon_low < 1 and self.epsilon_high >= 0 and self.beta >= 0):
            raise ValueError(
                f"want 0 <= epsilon_low < 1, epsilon_high >= 0, beta >= 0; "
                f"got {self.epsilon_low}, {self.epsilon_high}, {self.beta}"
            )
        if self.loss_type == "dr_grpo" and (self.max_completion_length is None or self.max_completion_length < 1):
            raise ValueError(f"dr_grpo: want max_completion_length >= 1; got {self.max_completion_length}")


class GrpoOutput(NamedTuple):
    """`loss`: float32 scalar. `stats`: float32 [9], detached, in the order of STAT_NAMES, means over tokens."""

    loss: Tensor
    stats: Tensor


def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    options: GrpoOptions | None = None,
    total_tokens: int | None = None,
) -> GrpoOutput:
    """GRPO loss of N scored tokens in S sequences.

    Args:
        logp: [N], float32, log-probability of each token under the policy; carries the gradient.
        advantages: [S], float32.
        cu_seqlens: [S+1], int32, where each sequence starts in the flat tokens.
        old_logp: [N], under the policy that sampled; None means the policy itself (ratio 1).
        ref_logp: [N], under the reference policy; required when beta > 0.
        entropy: [N], for the statistics only.
        options: what to compute; None for the defaults.
        total_tokens: divisor of dapo, in tokens; None for N.

    Returns:
        GrpoOutput(loss, stats).

    Raises:
        ValueError: shapes do not agree, or beta > 0 without ref_logp.
    """
    options = options or GrpoOptions()
    N, S = len(logp), len(advantages)
    given = {"old_logp": old_logp, "ref_logp": ref_logp, "entropy": entropy}
    wrong = {name: tuple(t.shape) for name, t in given.items() if t is not None and t.shape != (N,)}
    if logp.dim() != 1 or advantages.dim() != 1 or cu_seqlens.shape != (S + 1,) or wrong:
        raise ValueError(
            f"want logp [N], advantages [S], cu_seqlens [S+1] and the rest [N]; got {tuple(logp.shape)}, "
            f"{tuple(advantages.shape)}, {tuple(cu_seqlens.shape)}, {wrong}"
        )
    if options.beta > 0 and ref_logp is None:
        raise ValueError(f"beta {options.beta}: want ref_logp; got None")

    lengths = cu_seqlens.diff().long()
    advantage = advantages.repeat_interleave(lengths, output_size=N)
    ratio = (logp - (logp.detach() if old_logp is None else old_logp)).exp()
    clipped = ratio.clamp(1 - options.epsilon_low, 1 + options.epsilon_high)
    policy = -torch.minimum(ratio * advantage, clipped * advantage)
    kl = torch.zeros_like(logp) if ref_logp is None else _kl(logp, ref_logp, options.kl)
    per_token = policy + options.beta * kl
    loss = (per_token * _weights(lengths, N, S, options, total_tokens)).sum()

    low = (ratio < 1 - options.epsilon_low) & (advantage < 0)
    high = (ratio > 1 + options.epsilon_high) & (advantage > 0)
    means = [policy, kl, entropy if entropy is not None else torch.zeros_like(logp), low.float(), high.float(), ratio]
    stats = [t.detach().sum() / max(N, 1) for t in means]
    extremes = [ratio.detach().amin(), ratio.detach().amax()] if N else [logp.new_ones(()), logp.new_ones(())]
    return GrpoOutput(loss, torch.stack([*stats, *extremes, logp.new_tensor(N)]))


def _kl(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    d = ref_logp - logp
    if kind == "k1":
        return -d
    return d.square() / 2 if kind == "k2" else d.exp() - d - 1


def _weights(lengths: Tensor, N: int, S: int, options: GrpoOptions, total_tokens: int | None) -> Tensor | float:
    if options.loss_type == "dapo":
        return 1 / max(total_tokens if total_tokens is not None else N, 1)
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length is not None
        return 1 / (S * options.max_completion_length)
    return (1 / (S * lengths.clamp(min=1).float())).repeat_interleave(lengths, output_size=N)
