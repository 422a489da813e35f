"""The GRPO loss: the reference against a loop over tokens, both ways it runs against the reference."""

import math

import pytest
import torch
from closeness import assert_as_close_as_pytorch, value_and_grads
from grpo_cases import cast, lengths_of, options, per_token
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medground_kernels.grpo_loss import STAT_NAMES, GrpoOptions, grpo_loss, grpo_loss_reference
from medground_kernels.grpo_sums import BLOCK, sequence_sums
from medground_kernels.grpo_terms import Scored

pytestmark = pytest.mark.usefixtures("path")


def outcome(fn, case, **more):
    leaves = {"logp": case["logp"]}
    if case["entropy"] is not None:
        leaves["entropy"] = case["entropy"]
    rest = {name: value for name, value in case.items() if name not in leaves} | more
    return value_and_grads(lambda **given: fn(**(rest | given))._asdict(), leaves)


def compare(case, slack=2e-6, **more):
    exact = cast(case, torch.float64)
    pairs = ((grpo_loss, case), (grpo_loss_reference, case), (grpo_loss_reference, exact))
    results = [outcome(fn, given, **more) for fn, given in pairs]
    ours, plain, truth = results
    for result in results:  # autograd leaves out what the loss does not depend on
        result.setdefault("dentropy", torch.zeros(()) + 0 * truth["logp"].to(truth["loss"].dtype))
    assert_as_close_as_pytorch(ours, plain, truth, slack=slack)
    return ours


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=options(),
    S=st.integers(1, 6),
    longest=st.sampled_from([1, 5, 40]),
    masked=st.booleans(),
    on_policy=st.booleans(),
    reference=st.booleans(),
    total_tokens=st.sampled_from([None, 1, 77]),
    seed=st.integers(0, 1000),
)
def test_as_close_to_the_truth_as_pytorch(options, S, longest, masked, on_policy, reference, total_tokens, seed):
    torch.manual_seed(seed)
    case = per_token(lengths_of(seed, S, longest), masked=masked)
    if on_policy:
        case["old_logp"] = None
    if not reference and options.beta == 0:
        case["ref_logp"] = None
    compare(case, options=options, total_tokens=total_tokens)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_long_sequences(loss_type, ratio_level):
    torch.manual_seed(0)
    options = GrpoOptions(loss_type=loss_type, ratio_level=ratio_level, beta=0.1, max_completion_length=1500)
    compare(per_token([1300, 0, 513, 1, 512], masked=True), options=options, slack=1e-5)


@pytest.mark.parametrize(("loss_type", "ratio_level"), [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "token")])
def test_more_sequences_than_a_block(loss_type, ratio_level):
    torch.manual_seed(0)
    options = GrpoOptions(loss_type=loss_type, ratio_level=ratio_level, beta=0.1, max_completion_length=1500)
    compare(per_token([2] * (BLOCK + 8), masked=True), options=options, slack=1e-5)


def slow_loss(logp, advantages, cu_seqlens, old_logp, ref_logp, options, total_tokens):
    """One token at a time, as the formulas stand; plain clipping at token level."""
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


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_reference_equals_the_formulas(path, loss_type, kl, on_policy):
    if path == "triton":
        pytest.skip("the reference runs in plain torch")
    torch.manual_seed(0)
    case = cast(per_token([3, 1, 7, 0, 2], masked=False), torch.float64)
    options = GrpoOptions(
        loss_type=loss_type, kl=kl, beta=0.3, epsilon_low=0.1, epsilon_high=0.25, max_completion_length=9
    )
    old = None if on_policy else case["old_logp"]
    gradients = []
    for fn in (grpo_loss_reference, slow_loss):
        leaf = case["logp"].clone().requires_grad_()
        given = dict(old_logp=old, ref_logp=case["ref_logp"], options=options, total_tokens=29)
        loss = fn(leaf, case["advantages"], case["cu_seqlens"], **given)
        loss = loss.loss if fn is grpo_loss_reference else loss
        loss.backward()
        gradients.append(torch.cat([leaf.grad, loss.detach()[None]]))
    torch.testing.assert_close(*gradients)


def test_clipped_tokens_have_no_gradient():
    logp = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)
    old = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # ratios e and 1/e
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    bounds = torch.arange(5).int()
    out = grpo_loss(logp, advantages, bounds, old_logp=old)
    out.loss.backward()
    assert (logp.grad != 0).tolist() == [False, True, True, False]
    assert out.named()["clip_low"] == out.named()["clip_high"] == 0.25
    logp.grad = None
    grpo_loss(logp, advantages, bounds, old_logp=old, options=GrpoOptions(delta=2.5)).loss.backward()
    assert (logp.grad != 0).tolist() == [False, False, True, False]
    logp.grad = None
    out = grpo_loss(logp, advantages, bounds, old_logp=old, options=GrpoOptions(dual_clip=2.0, loss_type="bnpo"))
    out.loss.backward()
    assert (logp.grad != 0).tolist() == [False, False, True, False]
    assert math.isclose(out.loss, (-1.2 + 2.0 - math.exp(-1) + 0.8) / 4, rel_tol=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "cispo"])
def test_a_ratio_beyond_all_bounds_spoils_nothing(loss_type):
    logp = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    old = torch.tensor([-200.0, -200.0, -0.1])  # a ratio of infinity
    bounds, options = torch.arange(4).int(), GrpoOptions(loss_type=loss_type)
    out = grpo_loss(logp, torch.tensor([1.0, 0.0, -1.0]), bounds, old_logp=old, options=options)
    out.loss.backward()
    assert out.loss.isfinite() and logp.grad.isfinite().all()
    assert logp.grad[1] == 0 and logp.grad[2] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "cispo", "grpo"])
@pytest.mark.parametrize("where", ["logp", "old_logp", "ref_logp"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_nan_is_not_hidden(loss_type, where, ratio_level):
    torch.manual_seed(0)
    for sign in (1.0, -1.0):
        case = per_token([2, 3], masked=False)
        case["advantages"] = torch.full((2,), sign)
        case[where][1] = math.nan
        found = outcome(grpo_loss, case, options=GrpoOptions(loss_type=loss_type, beta=0.1, ratio_level=ratio_level))
        assert found["loss"].isnan() and found["dlogp"][1].isnan() and found["dlogp"][2:].isfinite().all()


def test_wrong_bounds_write_nowhere_else(path):
    if path == "torch":
        pytest.skip("plain torch refuses them")
    scored, options = Scored(None, None, None), GrpoOptions()
    found = sequence_sums(scored, torch.tensor([-3, 2, 99]).int(), 4, options, None, None)
    assert found.of_token.tolist() == [0, 0, 1, 1] and found.tokens.item() == 4


def test_the_default_dtype_changes_nothing():
    case = per_token([4, 3], masked=True)
    wanted = outcome(grpo_loss, case, options=GrpoOptions(beta=0.1, ratio_level="sequence"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = grpo_loss(**case, options=GrpoOptions(beta=0.1, ratio_level="sequence"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.loss, wanted["loss"]) and torch.equal(found.stats, wanted["stats"])


def test_second_derivatives_are_refused():
    case = per_token([4, 3], masked=True)
    leaf = case.pop("logp").requires_grad_()
    (grad,) = torch.autograd.grad(grpo_loss(leaf, **case).loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_statistics():
    torch.manual_seed(1)
    case = per_token([3, 1, 7, 0, 2], masked=True)
    out = grpo_loss(**case, options=GrpoOptions(beta=0.1))
    assert out.stats.dtype == torch.float32 and not out.stats.requires_grad
    assert list(out.named()) == list(STAT_NAMES)
    stats = {name: value.item() for name, value in out.named().items()}
    keep = case["targets"] >= 0
    ratio = (case["logp"] - case["old_logp"]).exp()[keep]
    A = case["advantages"].repeat_interleave(case["cu_seqlens"].diff())[keep]
    d = (case["ref_logp"] - case["logp"])[keep]
    wanted = {
        "policy_loss": -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).mean(),
        "kl": (d.exp() - d - 1).mean(),
        "entropy": case["entropy"][keep].mean(),
        "clip_low": ((ratio < 0.8) & (A < 0)).float().mean(),
        "clip_high": ((ratio > 1.2) & (A > 0)).float().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "tokens": keep.sum(),
        "masked_tokens": (~keep).sum(),
    }
    assert stats == {name: pytest.approx(value.item(), rel=1e-5) for name, value in wanted.items()}


def test_the_divisor_may_lie_on_the_device():
    case = per_token([3, 4], masked=False)
    for total in (11, 11.0, torch.tensor(11)):
        assert torch.equal(grpo_loss(**case, total_tokens=total).loss, grpo_loss(**case, total_tokens=11).loss)


def test_masked_tokens_may_hold_anything():
    torch.manual_seed(0)
    case = per_token([4, 3, 5], masked=True)
    spoilt = {name: t.clone() if torch.is_tensor(t) else t for name, t in case.items()}
    for name in ("logp", "old_logp", "ref_logp", "entropy"):
        spoilt[name][case["targets"] < 0] = math.nan
    for level in ("token", "sequence"):
        options = GrpoOptions(beta=0.1, entropy_coef=0.1, ratio_level=level, loss_type="grpo")
        first, second = outcome(grpo_loss, case, options=options), outcome(grpo_loss, spoilt, options=options)
        for name in ("loss", "stats", "dlogp", "dentropy"):
            assert torch.equal(first[name], second[name]), name


def test_low_precision_log_probabilities_are_taken():
    case = per_token([4, 3], masked=False)
    case = {k: v.bfloat16() if k in ("old_logp", "ref_logp", "entropy", "logp") else v for k, v in case.items()}
    leaf = case.pop("logp").requires_grad_()
    grpo_loss(leaf, **case).loss.backward()
    assert leaf.grad.dtype == torch.bfloat16
    exact = grpo_loss(leaf.detach().float(), **case)
    assert torch.equal(exact.loss, grpo_loss(leaf, **case).loss.detach())


def test_no_tokens_give_no_loss():
    for S in (2, 0):
        logp = torch.zeros(0, requires_grad=True)
        out = grpo_loss(logp, torch.ones(S), torch.zeros(S + 1, dtype=torch.int32))
        out.loss.backward()
        assert out.loss == 0 and torch.isfinite(out.stats).all()
    masked = torch.full((3,), -1)
    out = grpo_loss(torch.zeros(3, requires_grad=True), torch.ones(1), torch.tensor([0, 3]).int(), targets=masked)
    out.loss.backward()
    assert out.loss == 0
    assert out.stats.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 3]


def test_views_are_taken():
    torch.manual_seed(0)
    case = per_token([4, 3], masked=True)
    strided = {k: torch.stack([v, v], 1)[:, 0] if torch.is_tensor(v) else v for k, v in case.items()}
    assert torch.equal(grpo_loss(**case).loss, grpo_loss(**strided).loss)


def test_mistakes_are_named():
    case = per_token([3, 1, 7], masked=False)
    logp, advantages, bounds, old = (case[k] for k in ("logp", "advantages", "cu_seqlens", "old_logp"))
    with pytest.raises(ValueError, match=r"per token \[11\]; got \(2,\), \(4,\)"):
        grpo_loss(logp, advantages[:2], bounds)
    with pytest.raises(ValueError, match=r"'old_logp': \(5,\)"):
        grpo_loss(logp, advantages, bounds, old_logp=old[:5])
    with pytest.raises(ValueError, match="int64"):
        grpo_loss(logp, advantages, bounds.long())
    with pytest.raises(ValueError, match="want ref_logp"):
        grpo_loss(logp, advantages, bounds, options=GrpoOptions(beta=0.1))
    with pytest.raises(ValueError, match="want entropy; got None"):
        grpo_loss(logp, advantages, bounds, options=GrpoOptions(entropy_coef=0.1))
    with pytest.raises(ValueError, match=r"entropy \[N\]; got \(11,\) torch.float32, \(3,\)"):
        grpo_loss(logp, advantages, bounds, entropy=old[:3])
    with pytest.raises(ValueError, match=r"targets int64; got torch\.bool"):  # a mask would mask nothing
        grpo_loss(logp, advantages, bounds, targets=old < 0)
    with pytest.raises(ValueError, match="floating logp"):
        grpo_loss(logp.long(), advantages, bounds)
    with pytest.raises(ValueError, match=r"one device; got .*'advantages': 'meta'"):
        grpo_loss(logp, advantages.to("meta"), bounds)
    if not bounds.is_cuda:
        for wrong in ([0, 3, 4, 10], [1, 3, 4, 11], [0, 5, 4, 11]):
            with pytest.raises(ValueError, match=f"from 0 up to 11; got {wrong}".replace("[", r"\[")):
                grpo_loss(logp, advantages, torch.tensor(wrong).int())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type: want one of grpo, bnpo, dr_grpo, dapo, cispo, sapo; got 'ppo'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length: want a length >= 1 for dr_grpo; got None"),
        ({"ratio_level": "word"}, "ratio_level"),
        ({"kl": "k4"}, "kl: want one of k1, k2, k3"),
        ({"epsilon_low": 1.0}, "epsilon_low < 1; got 1.0"),
        ({"epsilon_high": -0.1}, "epsilon_high >= 0"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"beta": math.nan}, "beta"),
        ({"entropy_coef": math.inf}, "finite entropy_coef"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"delta": 0.0}, "delta > 0"),
        ({"dual_clip": 1.0}, "dual_clip > 1"),
        ({"dual_clip": 3.0, "delta": 3.0}, "delta or dual_clip, not both"),
        ({"delta": 3.0, "loss_type": "sapo"}, "loss_type beside delta"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg > 0"),
    ],
)
def test_options_that_make_no_sense_are_named(path, wrong, message):
    with pytest.raises(ValueError, match=message):
        GrpoOptions(**wrong)
