"""What the GRPO loss computes, and what it returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:  # a configuration names these options without waiting for torch
    from torch import Tensor

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]

STAT_NAMES = (
    "policy_loss",
    "kl",
    "entropy",
    "clip_low",
    "clip_high",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "tokens",
    "masked_tokens",
)


@dataclass(frozen=True, kw_only=True)
class GrpoOptions:
    """What the loss computes; kernels/grpo_loss.py has the formulas."""

    loss_type: LossType = "dapo"
    """The objective of a token, and what the sum over tokens is divided by."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or one for a sequence: the geometric mean of its tokens' (GSPO)."""
    epsilon_low: float = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above at 1 + epsilon_high; cispo caps its weight at epsilon_high itself (5.0, say)."""
    delta: float | None = None
    """Upper bound of the unclipped ratio too (two-sided clipping), best above 1 + epsilon_high; None for no bound."""
    dual_clip: float | None = None
    """Most that the ratio can cost where the advantage is negative, above 1 (dual-clip PPO); None for no bound."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference policy."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence."""
    kl_ratio: bool = False
    """Multiply the divergence by the ratio: no bias off policy (TRL's use_bias_correction_kl)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the mean entropy of the tokens, whatever the loss type."""
    temperature: float = 1.0
    """Logits are divided by this, as in sampling; linear_grpo alone looks at it."""
    max_completion_length: int | None = None
    """Constant divisor of dr_grpo, in tokens."""
    sapo_temperature_pos: float = 1.0
    """Steepness of sapo's gate where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Steepness of sapo's gate elsewhere."""

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, *get_args(LossType))
        _one_of("ratio_level", self.ratio_level, "token", "sequence")
        _one_of("kl", self.kl, "k1", "k2", "k3")
        _check("epsilon_low", self.epsilon_low, 0 <= self.epsilon_low < 1, "0 <= epsilon_low < 1")
        _check("epsilon_high", self.epsilon_high, self.epsilon_high >= 0, "epsilon_high >= 0")
        _check("beta", self.beta, self.beta >= 0, "beta >= 0")
        _check("entropy_coef", self.entropy_coef, True, "a finite entropy_coef")
        for name in ("temperature", "sapo_temperature_pos", "sapo_temperature_neg"):
            _check(name, getattr(self, name), getattr(self, name) > 0, f"{name} > 0")
        for name, least in (("delta", 0), ("dual_clip", 1)):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, value > least, f"{name} > {least}")
                _one_of(f"loss_type beside {name}", self.loss_type, "grpo", "bnpo", "dr_grpo", "dapo")
        if self.delta is not None and self.dual_clip is not None:
            raise ValueError(f"want delta or dual_clip, not both; got {self.delta}, {self.dual_clip}")
        if self.loss_type == "dr_grpo":
            length = self.max_completion_length
            _check("max_completion_length", length, length is not None and length >= 1, "a length >= 1 for dr_grpo")


class GrpoOutput(NamedTuple):
    """Result of the loss.

    Attributes:
        loss: scalar, float32.
        stats: [10], float32, detached, in the order of STAT_NAMES: means over the tokens that count, but for
            the extremes of the ratio (1 without a token) and the two counts.
        logp: [N], float32, detached: log-probability of each token.
    """

    loss: Tensor
    stats: Tensor
    logp: Tensor

    def named(self) -> dict[str, Tensor]:
        """The statistics by name, scalars on the device."""
        return dict(zip(STAT_NAMES, self.stats.unbind(), strict=True))


def _one_of(name: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: want one of {', '.join(allowed)}; got {value!r}")


def _check(name: str, value: float | None, holds: bool, wanted: str) -> None:
    if not holds or (value is not None and not math.isfinite(value)):
        raise ValueError(f"{name}: want {wanted}; got {value}")
