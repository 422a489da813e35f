"""A token's terms where its ratio lies below, on and above every bound, through `grpo_loss`, against float64."""

import pytest
import torch
from closeness import assert_as_close_as_pytorch, value_and_grads

from medground_kernels.grpo_loss import GrpoOptions, grpo_loss, grpo_loss_reference

pytestmark = pytest.mark.usefixtures("path")


def tokens_around_every_bound():
    """A sequence for every ratio and sign of the advantage: two tokens with that ratio, and a masked one."""
    torch.manual_seed(0)
    log_ratio = torch.tensor([0.5, 0.85, 1.0, 1.1, 1.4, 2.5]).log().repeat_interleave(3)
    S = len(log_ratio)
    logp = torch.rand(S, 3).sub(2).flatten()
    return {
        "logp": logp,
        "entropy": torch.rand(3 * S) * 2,
        "old_logp": logp - log_ratio.repeat_interleave(3),  # a ratio of exactly 1 where they are equal
        "ref_logp": logp + torch.randn(3 * S) * 0.5,
        "advantages": torch.tensor([-1.5, 0.0, 0.7]).repeat(S // 3),
        "cu_seqlens": torch.arange(0, 3 * S + 1, 3).int(),
        "targets": torch.tensor([4, -1, 2]).repeat(S),
    }


def outcome(fn, case, dtype, options):
    case = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.items()}
    leaves = {name: case.pop(name) for name in ("logp", "entropy")}
    return value_and_grads(lambda **given: fn(**given, **case, options=options)._asdict(), leaves)


def compare(case, **options):
    options = GrpoOptions(entropy_coef=0.1, max_completion_length=3, **options)
    f32, f64 = torch.float32, torch.float64
    runs = (grpo_loss, f32), (grpo_loss_reference, f32), (grpo_loss_reference, f64)
    assert_as_close_as_pytorch(*(outcome(fn, case, dtype, options) for fn, dtype in runs))


@pytest.mark.parametrize(
    "bounds",
    [
        {"epsilon_low": 0.3, "epsilon_high": 0.2},
        {"epsilon_low": 0.0, "epsilon_high": 0.2},
        {"epsilon_low": 0.2, "epsilon_high": 0.0},
        {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 1.0},
        {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 1.3},
        {"epsilon_low": 0.2, "epsilon_high": 1.0, "delta": 1.2},
        {"epsilon_low": 0.1, "epsilon_high": 0.2, "delta": 0.8},
        {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": 1.2},
        {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": 2.0},
        {"loss_type": "cispo", "epsilon_high": 1.0},
        {"loss_type": "cispo", "epsilon_high": 2.0},
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    ],
)
def test_both_sides_of_every_bound(bounds):
    compare(tokens_around_every_bound(), **bounds)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kl_ratio", [False, True])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_every_divergence(kl, kl_ratio, ratio_level):
    compare(tokens_around_every_bound(), beta=0.3, kl=kl, kl_ratio=kl_ratio, ratio_level=ratio_level)


def test_one_token_has_the_whole_entropy_bonus():
    case = tokens_around_every_bound()
    compare({name: t[:1] for name, t in case.items()} | {"cu_seqlens": torch.tensor([0, 1]).int()})


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
def test_without_an_advantage_an_infinite_ratio_counts_nothing(loss_type):
    logp = torch.zeros(2, requires_grad=True)
    out = grpo_loss(
        logp, torch.zeros(1), torch.tensor([0, 2]).int(), old_logp=torch.tensor([-200.0, 0.0]),
        options=GrpoOptions(loss_type=loss_type, epsilon_high=2.0)
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0 and (logp.grad == 0).all()


def test_an_infinite_loss_is_not_hidden():
    logp = torch.zeros(1, requires_grad=True)
    out = grpo_loss(logp, -torch.ones(1), torch.tensor([0, 1]).int(), old_logp=torch.tensor([-200.0]))
    out.loss.backward()
    assert out.loss == logp.grad[0] == torch.inf
