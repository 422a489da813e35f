"""Advantages of completions within their group.

    R[b, g] = sum_k weights[k] * rewards[b, g, k]

    normalize="group":  A[b, g] = (R[b, g] - mean_g R[b]) / (std_g R[b] + eps)
    normalize="batch":  A[b, g] = (R[b, g] - mean_g R[b]) / (std R + eps)
    normalize="none":   A[b, g] =  R[b, g] - mean_g R[b]

    per_reward:         S[b, g] = sum_k weights[k] * (r[b, g, k] - mean_g r[b, :, k]) / (std_g r[b, :, k] + eps)
    normalize="group":  A[b, g] = S[b, g]
    normalize="batch":  A[b, g] = (S[b, g] - mean_g S[b]) / (std S + eps)

std is the sample standard deviation (n - 1): `std_g` over a group, `std` over the whole batch. GRPO: Shao
et al. 2024, arXiv:2402.03300; without the spread Dr. GRPO, Liu et al. 2025, arXiv:2503.20783; over the
batch PPO Lite, Liu et al. 2025, arXiv:2508.08221; a reward at a time GDPO, arXiv:2601.05242. With eps = 1e-4
these are TRL 1.16's `scale_rewards` group, batch and none, and with `per_reward`, "batch" is its
`multi_objective_aggregation="normalize_then_sum"`. Two things differ: a group without spread gives 0
exactly, where TRL leaves the rounding of the mean, and NaN is not passed over.

Arithmetic is float64 on rewards of float32: the mean of equal rewards is then exactly the reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medground_kernels.backend import cdiv, jit, next_power_of_2, runs_triton, tl

Normalize = Literal["group", "batch", "none"]
BLOCK, NUM_WARPS = 1024, 4  # of the second launch of "batch"; not measured yet


def group_advantage_reference(
    rewards: Tensor,
    *,
    weights: Tensor | None = None,
    normalize: Normalize = "group",
    per_reward: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """The definition, in the dtype of `rewards`; float64 rewards give the truth."""
    rewards = rewards if rewards.dim() == 3 else rewards.unsqueeze(-1)
    if per_reward:
        rewards = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)
    total = (rewards if weights is None else rewards * weights).sum(-1)
    if per_reward and normalize == "group":
        return total
    centred = total - total.mean(1, keepdim=True)
    if normalize == "none":
        return centred
    return centred / ((total.std(1, keepdim=True) if normalize == "group" else total.std()) + eps)


@jit
def _centre(values, here, G):
    """Values [GROUP] less their mean (0 where not `here`), the mean, and the sum of the squares; NaN if not finite."""
    mean = tl.sum(tl.where(here, values, 0.0), 0) / G
    mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
    centred = tl.where(here, values - mean, 0.0)
    return centred, mean, tl.sum(centred * centred, 0)


@jit(do_not_specialize=["B", "G", "K", "stride_b", "stride_g", "stride_k"])
def _group_kernel(
    rewards_ptr, weights_ptr, out_ptr, moments_ptr, B, G, K, stride_b, stride_g, stride_k, eps,
    NORMALIZE: tl.constexpr, PER_REWARD: tl.constexpr, WEIGHTED: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, GROUP)
    here = lanes < G
    place = rewards_ptr + group * stride_b + lanes.to(tl.int64) * stride_g
    total = tl.zeros([GROUP], tl.float64)
    for k in range(0, K):
        reward = tl.load(place, mask=here, other=0.0).to(tl.float64)
        place += stride_k
        if PER_REWARD:
            centred, mean, squares = _centre(reward, here, G)
            reward = centred / (tl.sqrt(squares / (G - 1)) + eps)
        if WEIGHTED:
            reward *= tl.load(weights_ptr + k).to(tl.float64)
        total += reward
    if not PER_REWARD:
        # so that G equal numbers add up without rounding
        total = total.to(tl.float32).to(tl.float64)
    centred, mean, squares = _centre(total, here, G)
    if NORMALIZE == "group" and not PER_REWARD:
        centred = centred / (tl.sqrt(squares / (G - 1)) + eps)
    if NORMALIZE == "batch":
        tl.store(moments_ptr + group, mean)
        tl.store(moments_ptr + B + group, squares)
    tl.store(out_ptr + group * G + lanes, centred, mask=here)


@jit(do_not_specialize=["total", "B", "G"])
def _batch_kernel(out_ptr, moments_ptr, total, B, G, eps, BLOCK: tl.constexpr):
    # every program puts the groups together, in the same order; groups that hold a NaN are left out
    lanes = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.float64)
    means = tl.zeros([BLOCK], tl.float64)
    for start in range(0, B, BLOCK):
        mean = tl.load(moments_ptr + start + lanes, mask=start + lanes < B, other=float("nan"))
        counts += tl.where(mean == mean, 1.0, 0.0)
        means += tl.where(mean == mean, mean, 0.0)
    groups = tl.sum(counts, 0)
    middle = tl.sum(means, 0) / groups
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, B, BLOCK):
        mean = tl.load(moments_ptr + start + lanes, mask=start + lanes < B, other=float("nan"))
        within = tl.load(moments_ptr + B + start + lanes, mask=start + lanes < B, other=0.0)
        squares += tl.where(mean == mean, within + (mean - middle) * (mean - middle) * G, 0.0)
    spread = tl.sqrt(tl.sum(squares, 0) / (groups * G - 1))
    place = tl.program_id(0).to(tl.int64) * BLOCK + lanes
    centred = tl.load(out_ptr + place, mask=place < total, other=0.0).to(tl.float64)
    tl.store(out_ptr + place, centred / (spread + eps), mask=place < total)


def _launch(rewards: Tensor, weights: Tensor | None, normalize: str, per_reward: bool, eps: float) -> Tensor:
    B, G, K = rewards.shape
    out = torch.empty((B, G), dtype=torch.float32, device=rewards.device)
    moments = torch.empty((2, B), dtype=torch.float64, device=rewards.device) if normalize == "batch" else out
    group = next_power_of_2(G)
    _group_kernel[(B,)](
        rewards, rewards if weights is None else weights, out, moments, B, G, K, *rewards.stride(), eps,
        NORMALIZE=normalize, PER_REWARD=per_reward, WEIGHTED=weights is not None, GROUP=group,
        num_warps=min(max(group // 64, 1), 16)
    )  # fmt: skip
    if normalize == "batch":
        _batch_kernel[(cdiv(B * G, BLOCK),)](out, moments, B * G, B, G, eps, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def _normalise_torch(values: Tensor, eps: float) -> Tensor:
    centred, _ = _centre_torch(values)
    return centred / ((centred.square().sum(1, keepdim=True) / (values.shape[1] - 1)).sqrt() + eps)


def _centre_torch(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.mean(1, keepdim=True)
    return values - mean.where(mean.isfinite(), torch.nan), mean


def _advantage_torch(rewards: Tensor, weights: Tensor | None, normalize: str, per_reward: bool, eps: float) -> Tensor:
    scores = _normalise_torch(rewards.double(), eps) if per_reward else rewards.double()
    total = (scores if weights is None else scores * weights.double()).sum(-1)
    total = total if per_reward else total.float().double()
    if normalize == "group" and not per_reward:
        return _normalise_torch(total, eps).float()
    centred, mean = _centre_torch(total)
    if normalize == "batch":
        finite = total[mean.isfinite()[:, 0]]
        centred = centred / (finite.std() + eps) if len(finite) else centred
    return centred.float()


def group_advantage(
    rewards: Tensor,
    *,
    weights: Tensor | None = None,
    normalize: Normalize = "group",
    per_reward: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each completion over the others of its prompt.

    Args:
        rewards: [B, G], or [B, G, K] for K kinds of reward; float32, bfloat16 or float16, any strides, G >= 2.
        weights: [K], float32; None weighs all kinds with 1.
        normalize: what the distance from the group's mean is divided by: the group's spread, that of all
            rewards of the batch, or nothing.
        per_reward: divide each kind of reward by its own spread within the group, then sum: a kind with small
            numbers counts as much as one with large. "batch" divides the sums by their spread; "none" is refused.
        eps: added to each spread, > 0; in units of reward.

    Returns:
        [B, G], float32, not differentiable. A group whose rewards are all equal gives exactly 0 everywhere.
        A group with a reward that is NaN or infinite gives NaN everywhere and touches no other group.

    Raises:
        ValueError: an input is not as above.
    """
    if rewards.dim() not in (2, 3) or rewards.shape[1] < 2 or 0 in rewards.shape[2:]:
        raise ValueError(f"want rewards [B, G] or [B, G, K] with G >= 2, K >= 1; got {tuple(rewards.shape)}")
    if rewards.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"want float32, bfloat16 or float16 rewards; got {rewards.dtype}")
    if weights is not None and (weights.shape != rewards.shape[2:] or rewards.dim() != 3):
        raise ValueError(f"want weights [K] for rewards [B, G, K]; got {tuple(weights.shape)}, {tuple(rewards.shape)}")
    if weights is not None and weights.dtype != torch.float32:
        raise ValueError(f"want float32 weights; got {weights.dtype}")
    if normalize not in ("group", "batch", "none") or (per_reward and normalize == "none"):
        raise ValueError(f"want normalize group, batch or, not per_reward, none; got {normalize!r}, {per_reward=}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"want eps > 0; got {eps}")
    rewards = rewards.detach() if rewards.dim() == 3 else rewards.detach().unsqueeze(-1)
    weights = None if weights is None else weights.detach().contiguous()
    if not len(rewards):
        return torch.empty(rewards.shape[:2], dtype=torch.float32, device=rewards.device)
    run = _launch if runs_triton(rewards) else _advantage_torch
    return run(rewards, weights, normalize, per_reward, eps)
