"""The GRPO objective over flat, unpadded tokens: clipped policy loss, KL, entropy bonus and statistics.

For token t of sequence s, with A = advantages[s] and r = exp(logp - old_logp), or at sequence level (GSPO, Zheng et
al. 2025, arXiv:2507.18071) r = exp(mean over the tokens of s of logp - old_logp):

    policy[t] = -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)       grpo, bnpo, dr_grpo, dapo
                at most -dual_clip A where A < 0                    (Ye et al. 2020, arXiv:1912.09729)
              = -min(r, epsilon_high) A logp[t], the weight without gradient              cispo
              = -4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A                     sapo
    loss      = sum_t w[t] (policy[t] + beta kl[t]) - entropy_coef mean_t entropy[t]

    w[t] = 1 / (S * tokens of s)            grpo     (Shao et al. 2024, arXiv:2402.03300)
                                            sapo     (Gao et al. 2025, arXiv:2511.20347)
           1 / tokens                       bnpo
           1 / (S * max_completion_length)  dr_grpo  (Liu et al. 2025, arXiv:2503.20783)
           1 / total_tokens                 dapo     (Yu et al. 2025, arXiv:2503.14476)
                                            cispo    (MiniMax 2025, arXiv:2506.13585)

    kl with d = ref_logp - logp:   k1 = -d,   k2 = d*d / 2,   k3 = exp(d) - d - 1,   times r with kl_ratio
                                   (Schulman 2020, joschu.net/blog/kl-approx.html)

Each equals TRL 1.16's loss of the same name where TRL has it. The gradient of a token is known as soon as its terms
are, so the forward pass makes it. Three kernels: the sequences' counts and ratios, the tokens' terms, their sums,
added up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medground_kernels.backend import cdiv, check_devices, jit, runs_triton, tl
from medground_kernels.grpo_options import STAT_NAMES, GrpoOptions, GrpoOutput
from medground_kernels.grpo_sums import BLOCK, finish, sequence_sums
from medground_kernels.grpo_terms import TERMS, Scored, kernel_options, token_terms, token_terms_torch

__all__ = ["STAT_NAMES", "GrpoOptions", "GrpoOutput", "grpo_loss", "grpo_loss_reference"]


def grpo_loss_reference(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    targets: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    options: GrpoOptions | None = None,
    total_tokens: int | Tensor | None = None,
) -> GrpoOutput:
    """The definition, in the dtype of `logp`, differentiable by autograd; float64 gives the truth."""
    o = options or GrpoOptions()
    S, N = len(advantages), len(logp)
    valid = torch.ones_like(logp) if targets is None else (targets >= 0).to(logp.dtype)
    s = torch.repeat_interleave(torch.arange(S, device=logp.device), cu_seqlens.diff().long())

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(S).index_add(0, s, values * valid)

    count, A = summed(valid), advantages.to(logp.dtype)[s]
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    if o.ratio_level == "sequence":
        log_ratio = (summed(log_ratio) / count.clamp(min=1))[s]
    ratio = log_ratio.exp()
    bounded = ratio if o.delta is None else ratio.clamp(max=o.delta)
    if o.loss_type == "cispo":
        policy = -ratio.clamp(max=o.epsilon_high).detach() * A * logp
    elif o.loss_type == "sapo":
        tau = torch.where(A > 0, o.sapo_temperature_pos, o.sapo_temperature_neg).to(logp.dtype)
        policy = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * A
    else:
        policy = -torch.minimum(bounded * A, ratio.clamp(1 - o.epsilon_low, 1 + o.epsilon_high) * A)
        if o.dual_clip is not None:
            policy = torch.where(A < 0, torch.minimum(policy, -o.dual_clip * A), policy)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        d = ref_logp - logp
        kl = -d if o.kl == "k1" else d * d / 2 if o.kl == "k2" else d.exp() - d - 1
        kl = kl * ratio if o.kl_ratio else kl
    tokens = valid.sum()
    if o.loss_type in ("grpo", "sapo"):
        share = 1 / (S * count.clamp(min=1)[s])
    elif o.loss_type == "dr_grpo":
        share = torch.full_like(logp, 1 / (max(S, 1) * (o.max_completion_length or 1)))
    else:
        share = 1 / (tokens.clamp(min=1) if o.loss_type == "bnpo" or total_tokens is None else total_tokens) * valid
    H = torch.zeros_like(logp) if entropy is None else entropy
    loss = ((policy + o.beta * kl) * share * valid).sum() - o.entropy_coef * (H * valid).sum() / tokens.clamp(min=1)
    low, high = (bounded < 1 - o.epsilon_low) & (A < 0), (bounded > 1 + o.epsilon_high) & (A > 0)
    if o.loss_type in ("cispo", "sapo"):
        low, high = torch.zeros_like(low), (ratio > o.epsilon_high) & (A > 0) & (o.loss_type == "cispo")
    means = [(t * valid).sum() / tokens.clamp(min=1) for t in (policy, kl, H, low, high, ratio)]
    seen = ratio[valid > 0] if tokens else ratio.new_ones(1)
    stats = torch.stack([*means, seen.amin(), seen.amax(), tokens, N - tokens])
    return GrpoOutput(loss, stats.detach(), logp.detach())


@jit(do_not_specialize=["N"])
def _token_kernel(
    targets_ptr, logp_ptr, entropy_ptr, old_ptr, ref_ptr, advantages_ptr, of_token_ptr, weight_ptr, log_ratio_ptr,
    mean_kl_ptr, tokens_ptr, terms_ptr, dlogp_ptr, dentropy_ptr, N,
    epsilon_low, epsilon_high, delta, dual_clip, beta, entropy_coef, tau_pos, tau_neg,
    OBJECTIVE: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, SEQUENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    valid = inside
    if HAS_TARGETS:
        valid = tl.load(targets_ptr + at, mask=inside, other=-1) >= 0
    s = tl.load(of_token_ptr + at, mask=inside, other=0)
    logp = tl.load(logp_ptr + at, mask=valid, other=0.0)
    entropy = tl.zeros([BLOCK], tl.float32)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + at, mask=valid, other=0.0)
    log_ratio = tl.zeros([BLOCK], tl.float32)
    mean_kl = log_ratio
    if SEQUENCE:
        log_ratio = tl.load(log_ratio_ptr + s, mask=inside, other=0.0)
        mean_kl = tl.load(mean_kl_ptr + s, mask=inside, other=0.0)
    elif HAS_OLD:
        log_ratio = logp - tl.load(old_ptr + at, mask=valid, other=0.0)
    ref = log_ratio
    if HAS_REF:
        ref = tl.load(ref_ptr + at, mask=valid, other=0.0)
    dlogp, dentropy = token_terms(
        terms_ptr, at, inside, valid, logp, entropy, log_ratio, mean_kl, ref,
        tl.load(advantages_ptr + s, mask=inside, other=0.0), tl.load(weight_ptr + s, mask=inside, other=0.0),
        tl.load(tokens_ptr), epsilon_low, epsilon_high, delta, dual_clip, beta, entropy_coef, tau_pos, tau_neg,
        OBJECTIVE, KL, KL_RATIO, SEQUENCE, HAS_REF
    )  # fmt: skip
    tl.store(dlogp_ptr + at, dlogp, mask=inside)
    tl.store(dentropy_ptr + at, dentropy, mask=inside)


def _forward(
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    cu_seqlens: Tensor,
    scored: Scored,
    options: GrpoOptions,
    total_tokens: int | Tensor | None,
) -> tuple[Tensor, ...]:
    N = len(logp)
    at_sequence = logp if options.ratio_level == "sequence" else None
    sequences = sequence_sums(scored, cu_seqlens, N, options, total_tokens, at_sequence)
    terms = logp.new_empty((N, TERMS))
    if not runs_triton(logp):
        H = torch.zeros_like(logp) if entropy is None else entropy
        grads = token_terms_torch(slice(0, N), logp, H, scored, sequences, advantages, options, terms)
        return *finish(terms), *grads
    dlogp, dentropy = torch.empty_like(logp), torch.empty_like(logp)
    if N:
        _token_kernel[(cdiv(N, BLOCK),)](
            scored.targets, logp, entropy, scored.old_logp, scored.ref_logp, advantages, *sequences, terms, dlogp,
            dentropy, N, **kernel_options(options, scored.ref_logp is not None),
            HAS_TARGETS=scored.targets is not None, HAS_ENTROPY=entropy is not None,
            HAS_OLD=scored.old_logp is not None, BLOCK=BLOCK
        )  # fmt: skip
    return *finish(terms), dlogp, dentropy


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, entropy: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, stats, dlogp, dentropy = _forward(logp, entropy, *rest)
        ctx.save_for_backward(dlogp, dentropy)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dlogp, dentropy = ctx.saved_tensors
        return dlogp * dloss, dentropy * dloss if ctx.needs_input_grad[1] else None, *[None] * 5


def check_sequences(advantages: Tensor, cu_seqlens: Tensor, N: int, options: GrpoOptions, scored: Scored) -> None:
    """Shapes, dtypes and devices; on a CPU, where it costs no waiting, also that the sequences cover the tokens."""
    S = len(advantages) if advantages.dim() else 0
    wrong = {name: tuple(t.shape) for name, t in scored._asdict().items() if t is not None and t.shape != (N,)}
    if advantages.dim() != 1 or cu_seqlens.shape != (S + 1,) or cu_seqlens.dtype != torch.int32 or wrong:
        raise ValueError(
            f"want advantages [S], cu_seqlens [S+1] int32 and per token [{N}]; got {tuple(advantages.shape)}, "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, {wrong}"
        )
    if scored.targets is not None and scored.targets.dtype != torch.int64:
        raise ValueError(f"want targets int64; got {scored.targets.dtype}")
    check_devices(advantages=advantages, cu_seqlens=cu_seqlens, **scored._asdict())
    if options.beta > 0 and scored.ref_logp is None:
        raise ValueError(f"beta {options.beta}: want ref_logp; got None")
    if not cu_seqlens.is_cuda and (cu_seqlens[0] != 0 or cu_seqlens[-1] != N or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"want cu_seqlens from 0 up to {N}; got {cu_seqlens.tolist()}")


def as_float(t: Tensor | None) -> Tensor | None:
    """Float32, contiguous."""
    return None if t is None else t.detach().float().contiguous()


def grpo_loss(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    targets: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    options: GrpoOptions | None = None,
    total_tokens: int | Tensor | None = None,
) -> GrpoOutput:
    """GRPO loss of N scored tokens in S sequences.

    Args:
        logp: [N], a floating dtype, log-probability of each token under the policy; carries the gradient.
        advantages: [S], float32.
        cu_seqlens: [S+1], int32, from 0 to N: where each sequence starts in the flat tokens. Seen to be so on a
            CPU alone, where looking does not wait.
        targets: [N], int64, the tokens; a negative one takes no part. None if all do.
        old_logp: [N], under the policy that sampled; None means the policy itself (ratio 1).
        ref_logp: [N], under the reference policy; required when beta > 0.
        entropy: [N], of each token's distribution; required when entropy_coef is not 0, and carries its gradient.
        options: what to compute; None for the defaults.
        total_tokens: divisor of dapo and cispo, in tokens, as a number or a scalar on the device; None for the
            tokens that take part.

    Returns:
        GrpoOutput(loss, stats, logp).

    Raises:
        ValueError: shapes do not agree, or something required is missing.
    """
    options = options or GrpoOptions()
    if logp.dim() != 1 or not logp.is_floating_point() or (entropy is not None and entropy.shape != logp.shape):
        shape = None if entropy is None else tuple(entropy.shape)
        raise ValueError(f"want floating logp [N] and entropy [N]; got {tuple(logp.shape)} {logp.dtype}, {shape}")
    check_devices(logp=logp, entropy=entropy, advantages=advantages)
    if options.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef {options.entropy_coef}: want entropy; got None")
    scored = Scored(targets, as_float(old_logp), as_float(ref_logp))
    check_sequences(advantages, cu_seqlens, len(logp), options, scored)
    logp = logp.float().contiguous()
    loss, stats = _GrpoLoss.apply(
        logp, None if entropy is None else entropy.float().contiguous(), as_float(advantages), cu_seqlens.contiguous(),
        scored._replace(targets=None if targets is None else targets.contiguous()), options, total_tokens
    )  # fmt: skip
    return GrpoOutput(loss, stats, logp.detach())
