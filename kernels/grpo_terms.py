"""A token's terms in the GRPO loss and its gradient: what grpo_loss and linear_grpo share.

kernels/grpo_loss.py has the formulas. Everything is float32 and comes twice, for kernels and in plain torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from medground_kernels.backend import jit, tl
from medground_kernels.grpo_options import GrpoOptions

TERMS = 8  # of a token: policy, kl, entropy, clipped low, clipped high, ratio, loss, 1; all 0 where it is masked


class Sequences(NamedTuple):
    """What a token needs to know of its sequence, and of all of them.

    Attributes:
        of_token: [N], int32, the sequence of each token.
        weight: [S], float32, of each of its tokens in the loss.
        log_ratio: [S], float32, mean of logp - old_logp; empty at token level.
        mean_kl: [S], float32; empty at token level.
        tokens: [1], float32, how many count in all sequences.
    """

    of_token: Tensor
    weight: Tensor
    log_ratio: Tensor
    mean_kl: Tensor
    tokens: Tensor


class Scored(NamedTuple):
    """Tokens and what is known of them beforehand: float32 [N], or None; targets int64 [N], < 0 where masked."""

    targets: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None


def objective(options: GrpoOptions) -> str:
    """Which of the three policy terms a loss type has."""
    return options.loss_type if options.loss_type in ("cispo", "sapo") else "clip"


def kernel_options(options: GrpoOptions, has_ref: bool) -> dict[str, Any]:
    """Run-time numbers and compile-time choices of `token_terms`, by the names that kernels give them."""
    return {
        # an integer would be another type, and 1 another kernel
        "epsilon_low": float(options.epsilon_low),
        "epsilon_high": float(options.epsilon_high),
        "delta": float("inf") if options.delta is None else float(options.delta),
        "dual_clip": float("inf") if options.dual_clip is None else float(options.dual_clip),
        "beta": float(options.beta),
        "entropy_coef": float(options.entropy_coef),
        "tau_pos": float(options.sapo_temperature_pos),
        "tau_neg": float(options.sapo_temperature_neg),
        "OBJECTIVE": objective(options),
        # without a reference all kinds are one kernel
        "KL": options.kl if has_ref else "k3",
        "KL_RATIO": options.kl_ratio and has_ref,
        "SEQUENCE": options.ratio_level == "sequence",
        "HAS_REF": has_ref,
    }


@jit
def kl_terms(logp, ref, KL: tl.constexpr):
    """Estimate of the divergence, and its derivative in logp."""
    d = ref - logp
    if KL == "k1":
        return -d, tl.full(d.shape, 1.0, tl.float32)
    elif KL == "k2":
        return d * d / 2, -d
    else:
        return tl.exp(d) - d - 1, 1 - tl.exp(d)


@jit
def policy_terms(
    logp, ratio, advantage, epsilon_low, epsilon_high, delta, dual_clip, tau_pos, tau_neg, OBJECTIVE: tl.constexpr
):
    """Policy loss of a token, its derivative in logp, and whether the ratio was clipped below or above."""
    if OBJECTIVE == "cispo":
        weight = tl.minimum(ratio, epsilon_high) * advantage
        return -weight * logp, -weight, ratio != ratio, (ratio > epsilon_high) & (advantage > 0)
    elif OBJECTIVE == "sapo":
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        gate = 1 / (1 + tl.exp(tau * (1 - ratio)))
        slope = gate * (1 - gate) * tl.minimum(ratio, 3e38)  # not 0 * inf
        return -4 / tau * gate * advantage, -4 * slope * advantage, ratio != ratio, ratio != ratio
    else:
        low, high = 1 - epsilon_low, 1 + epsilon_high
        bounded = tl.minimum(ratio, delta)
        clipped = tl.minimum(tl.maximum(ratio, low), high)
        first = bounded * advantage < clipped * advantage  # never where advantage is 0, though ratio may be inf
        policy = -tl.where(first, bounded, clipped) * advantage
        free = tl.where(first, ratio <= delta, (ratio >= low) & (ratio <= high))
        costly = (advantage < 0) & (policy > -dual_clip * advantage)
        policy = tl.where(costly, -dual_clip * advantage, policy)
        slope = tl.where(free & (costly == 0), -ratio * advantage, 0.0)
        return policy, slope, (bounded < low) & (advantage < 0), (bounded > high) & (advantage > 0)


@jit
def token_terms(
    terms_ptr, at, inside, valid, logp, entropy, log_ratio, mean_kl, ref, advantage, weight, tokens,
    epsilon_low, epsilon_high, delta, dual_clip, beta, entropy_coef, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, SEQUENCE: tl.constexpr, HAS_REF: tl.constexpr
):  # fmt: skip
    """Store the terms of tokens `at`; return the loss's derivatives in their logp and entropy."""
    ratio = tl.exp(log_ratio)
    policy, slope, low, high = policy_terms(
        logp, ratio, advantage, epsilon_low, epsilon_high, delta, dual_clip, tau_pos, tau_neg, OBJECTIVE
    )
    # minima and maxima would drop it, and a broken rollout train unseen
    lost = (log_ratio != log_ratio) | (logp != logp)
    policy = tl.where(lost, float("nan"), policy)
    slope = tl.where(lost, float("nan"), slope)
    kl = tl.zeros(logp.shape, tl.float32)
    if HAS_REF:
        kl, kl_slope = kl_terms(logp, ref, KL)
        if KL_RATIO:
            if not SEQUENCE:
                mean_kl = kl
            kl_slope = ratio * (kl_slope + mean_kl)
            kl = ratio * kl
        slope += beta * kl_slope
    bonus = entropy_coef / tl.maximum(tokens, 1.0)
    place = terms_ptr + at.to(tl.int64) * 8
    tl.store(place, tl.where(valid, policy, 0.0), mask=inside)
    tl.store(place + 1, tl.where(valid, kl, 0.0), mask=inside)
    tl.store(place + 2, tl.where(valid, entropy, 0.0), mask=inside)
    tl.store(place + 3, tl.where(valid & low, 1.0, 0.0), mask=inside)
    tl.store(place + 4, tl.where(valid & high, 1.0, 0.0), mask=inside)
    tl.store(place + 5, tl.where(valid, ratio, 0.0), mask=inside)
    tl.store(place + 6, tl.where(valid, weight * (policy + beta * kl) - bonus * entropy, 0.0), mask=inside)
    tl.store(place + 7, tl.where(valid, 1.0, 0.0), mask=inside)
    return tl.where(valid, weight * slope, 0.0), tl.where(valid, -bonus, 0.0)


def kl_torch(logp: Tensor, ref: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`kl_terms` in plain torch."""
    d = ref - logp
    if kind == "k1":
        return -d, torch.ones_like(d)
    return (d * d / 2, -d) if kind == "k2" else (d.exp() - d - 1, 1 - d.exp())


def _policy_torch(logp: Tensor, ratio: Tensor, A: Tensor, options: GrpoOptions) -> tuple[Tensor, ...]:
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if options.loss_type == "cispo":
        weight = ratio.clamp(max=options.epsilon_high) * A
        return -weight * logp, -weight, never, (ratio > options.epsilon_high) & (A > 0)
    if options.loss_type == "sapo":
        tau = torch.where(A > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -4 / tau * gate * A, -4 * gate * (1 - gate) * ratio.clamp(max=3e38) * A, never, never
    low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    delta, dual_clip = (float("inf") if x is None else x for x in (options.delta, options.dual_clip))
    bounded, clipped = ratio.clamp(max=delta), ratio.clamp(low, high)
    first = bounded * A < clipped * A
    policy = -torch.where(first, bounded, clipped) * A
    free = torch.where(first, ratio <= delta, (ratio >= low) & (ratio <= high))
    costly = (A < 0) & (policy > -dual_clip * A)
    policy = torch.where(costly, -dual_clip * A, policy)
    slope = torch.where(free & ~costly, -ratio * A, 0.0)
    return policy, slope, (bounded < low) & (A < 0), (bounded > high) & (A > 0)


def token_terms_torch(
    at: slice, logp: Tensor, entropy: Tensor, scored: Scored, sequences: Sequences, advantages: Tensor,
    options: GrpoOptions, terms: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the terms of tokens `at`; return the loss's derivatives in their logp and entropy."""
    s = sequences.of_token[at].long()
    valid = torch.ones_like(s, dtype=torch.bool) if scored.targets is None else scored.targets[at] >= 0
    log_ratio = torch.zeros_like(logp) if scored.old_logp is None else logp - scored.old_logp[at]
    if options.ratio_level == "sequence":
        log_ratio = sequences.log_ratio[s]
    ratio = log_ratio.exp()
    policy, slope, low, high = _policy_torch(logp, ratio, advantages[s], options)
    lost = log_ratio.isnan() | logp.isnan()
    policy, slope = policy.masked_fill(lost, torch.nan), slope.masked_fill(lost, torch.nan)
    kl = torch.zeros_like(logp)
    if scored.ref_logp is not None:
        kl, kl_slope = kl_torch(logp, scored.ref_logp[at], options.kl)
        if options.kl_ratio:
            kl_slope = ratio * (kl_slope + (sequences.mean_kl[s] if options.ratio_level == "sequence" else kl))
            kl = ratio * kl
        slope = slope + options.beta * kl_slope
    bonus = options.entropy_coef / sequences.tokens.clamp(min=1)
    loss = sequences.weight[s] * (policy + options.beta * kl) - bonus * entropy
    columns = (policy, kl, entropy, low, high, ratio, loss, torch.ones_like(logp))
    terms[at] = torch.stack([column.float() for column in columns], 1).where(valid[:, None], 0.0)
    return (sequences.weight[s] * slope).where(valid, 0.0), (-bonus).expand(len(s)).where(valid, 0.0)
