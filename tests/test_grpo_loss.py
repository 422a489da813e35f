"""The GRPO loss against a loop that follows the formulas one token at a time."""

import math

import pytest
import torch

from medground_kernels.grpo_loss import STAT_NAMES, GrpoOptions, grpo_loss

pytestmark = pytest.mark.usefixtures("on_the_gpu")


def slow_loss(logp, advantages, cu_seqlens, old_logp, ref_logp, options, total_tokens):
    N, S = len(logp), len(advantages)
    loss = logp.new_zeros(())
    for s in range(S):
        start, end = int(cu_seqlens[s]), int(cu_seqlens[s + 1])
        for t in range(start, end):
            r = torch.exp(logp[t] - (old_logp[t] if old_logp is not None else logp[t].detach()))
            clipped = min(max(r, 1 - options.epsilon_low), 1 + options.epsilon_high)
            token = -min(r * advantages[s], clipped * advantages[s])
            if ref_logp is not None:
                d = ref_logp[t] - logp[t]
                token = token + options.beta * {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[options.kl]
            weight = {
                "grpo": 1 / (S * (end - start)),
                "dr_grpo": 1 / (S * (options.max_completion_length or 1)),
                "dapo": 1 / (total_tokens or N),
            }[options.loss_type]
            loss = loss + token * weight
    return loss


def case(seed=0, lengths=(3, 1, 7, 0, 2)):
    torch.manual_seed(seed)
    N = sum(lengths)
    logp = -torch.rand(N, dtype=torch.float64) * 3
    old = logp + torch.randn(N, dtype=torch.float64) * 0.3
    ref = logp + torch.randn(N, dtype=torch.float64) * 0.5
    advantages = torch.randn(len(lengths), dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return logp, advantages, cu_seqlens, old, ref


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_equals_the_formulas(loss_type, kl, on_policy, beta):
    logp, advantages, cu_seqlens, old, ref = case()
    options = GrpoOptions(
        loss_type=loss_type, kl=kl, beta=beta, epsilon_low=0.1, epsilon_high=0.25, max_completion_length=9
    )
    given = {"old_logp": None if on_policy else old, "ref_logp": ref if beta else None}
    values, gradients = [], []
    for fn in (grpo_loss, slow_loss):
        leaf = logp.clone().requires_grad_()
        if fn is grpo_loss:
            loss = fn(leaf, advantages, cu_seqlens, options=options, total_tokens=29, **given).loss
        else:
            loss = fn(leaf, advantages, cu_seqlens, given["old_logp"], given["ref_logp"], options, 29)
        loss.backward()
        values.append(loss.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_clipped_tokens_have_no_gradient():
    logp = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # ratios e and 1/e
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    grpo_loss(logp, advantages, torch.arange(5).int(), old_logp=old).loss.backward()
    assert logp.grad is not None
    assert (logp.grad != 0).tolist() == [False, True, True, False]


def test_statistics():
    logp, advantages, cu_seqlens, old, ref = case(1)
    options = GrpoOptions(beta=0.1)
    entropy = torch.rand_like(logp)
    out = grpo_loss(logp, advantages, cu_seqlens, old_logp=old, ref_logp=ref, entropy=entropy, options=options)
    stats = dict(zip(STAT_NAMES, out.stats.tolist(), strict=True))
    ratio = (logp - old).exp()
    A = advantages.repeat_interleave(cu_seqlens.diff())
    d = ref - logp
    assert math.isclose(stats["kl"], float((d.exp() - d - 1).mean()), rel_tol=1e-6)
    assert math.isclose(stats["entropy"], float(entropy.mean()), rel_tol=1e-6)
    assert math.isclose(stats["clip_low"], float(((ratio < 0.8) & (A < 0)).double().mean()), rel_tol=1e-6)
    assert math.isclose(stats["clip_high"], float(((ratio > 1.2) & (A > 0)).double().mean()), rel_tol=1e-6)
    assert math.isclose(stats["ratio_min"], float(ratio.min()), rel_tol=1e-6)
    assert math.isclose(stats["ratio_max"], float(ratio.max()), rel_tol=1e-6)
    assert stats["tokens"] == len(logp)


def test_no_tokens_give_no_loss():
    logp = torch.zeros(0, requires_grad=True)
    out = grpo_loss(logp, torch.ones(2), torch.zeros(3, dtype=torch.int32))
    out.loss.backward()
    assert out.loss == 0 and torch.isfinite(out.stats).all()


def test_mistakes_are_named():
    logp, advantages, cu_seqlens, old, _ = case()
    with pytest.raises(ValueError, match=r"\(13,\).*\(4,\)"):
        grpo_loss(logp, advantages[:4], cu_seqlens)
    with pytest.raises(ValueError, match="old_logp"):
        grpo_loss(logp, advantages, cu_seqlens, old_logp=old[:5])
    with pytest.raises(ValueError, match="ref_logp"):
        grpo_loss(logp, advantages, cu_seqlens, options=GrpoOptions(beta=0.1))
    with pytest.raises(ValueError, match="max_completion_length"):
        GrpoOptions(loss_type="dr_grpo")
    with pytest.raises(ValueError, match="loss_type"):
        GrpoOptions(loss_type="ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epsilon_low"):
        GrpoOptions(epsilon_low=1.0)
