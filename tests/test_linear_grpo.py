"""The loss straight from hidden states: values, gradients and statistics against float64 and against grpo_loss."""

import pytest
import torch
from closeness import Products, assert_as_close_as_pytorch, value_and_grads
from grpo_cases import cast, lengths_of, options, per_token
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medground_kernels.head as head_module
import medground_kernels.linear_grpo as linear_grpo_module
import medground_kernels.linear_grpo as module
from medground_kernels.grpo_loss import GrpoOptions, grpo_loss
from medground_kernels.linear_grpo import linear_grpo, linear_grpo_reference
from medground_kernels.linear_logprob import linear_logprob

pytestmark = pytest.mark.usefixtures("path")


def batch(lengths, H, V, *, masked=True, dtype=torch.float32, bias=False, scale=2.0, seed=0):
    """Leaves, and the rest of the arguments; old and reference log-probabilities lie near the policy's."""
    torch.manual_seed(seed)
    N = sum(lengths)
    leaves = {"hidden": torch.randn(N, H).to(dtype), "weight": (torch.randn(V, H) * scale / H**0.5).to(dtype)}
    if bias:
        leaves["bias"] = torch.randn(V).to(dtype)
    case = per_token(lengths, masked=masked)
    targets = case["targets"] if masked else torch.randint(V, (N,))
    targets = torch.where(targets < 0, targets, targets % V)
    logp = linear_logprob(targets=targets, **leaves).logp
    shift = {name: case[name] - case["logp"] for name in ("old_logp", "ref_logp")}
    rest = {name: case[name] for name in ("advantages", "cu_seqlens")} | {"targets": targets}
    return leaves, rest | {name: logp + delta for name, delta in shift.items()}


def outcome(fn, leaves, rest, **more):
    return value_and_grads(lambda **given: fn(**given, **rest, **more)._asdict(), leaves)


def compare(leaves, rest, slack=4e-6, memory_budget=None, **more):
    ours = outcome(linear_grpo, leaves, rest, memory_budget=memory_budget, **more)
    exact = cast(leaves, torch.float64), cast(rest, torch.float64)
    truth = outcome(linear_grpo_reference, *exact, **more)
    plain = outcome(linear_grpo_reference, leaves, rest, **more)
    assert_as_close_as_pytorch(ours, plain, truth, slack=slack)
    return ours


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=options(),
    S=st.integers(1, 5),
    longest=st.sampled_from([1, 6]),
    V=st.sampled_from([1, 2, 50, 777]),
    masked=st.booleans(),
    bias=st.booleans(),
    on_policy=st.booleans(),
    reference=st.booleans(),
    total_tokens=st.sampled_from([None, 40]),
    rows=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 1000),
)
def test_as_close_to_the_truth_as_pytorch(
    options, S, longest, V, masked, bias, on_policy, reference, total_tokens, rows, seed
):
    leaves, rest = batch(lengths_of(seed, S, longest), 4, V, masked=masked, bias=bias, seed=seed)
    if on_policy:
        rest["old_logp"] = None
    if not reference and options.beta == 0:
        rest["ref_logp"] = None
    compare(leaves, rest, options=options, total_tokens=total_tokens, memory_budget=rows * V * 4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [3, 1000])
def test_bfloat16(loss_type, ratio_level, rows):
    leaves, rest = batch([3, 0, 1, 4], 16, 900, dtype=torch.bfloat16, bias=True)
    more = {"options": GrpoOptions(loss_type=loss_type, ratio_level=ratio_level, beta=0.1, entropy_coef=0.1)}
    ours = compare(leaves, rest, memory_budget=rows * 900 * 2, **more)
    assert ours["dweight"].dtype == ours["dhidden"].dtype == ours["dbias"].dtype == torch.bfloat16


@pytest.mark.parametrize("vocab", [9001, 16_384, 16_385, 151_936, 152_064])  # 16384: a block
def test_rows_longer_than_a_block(vocab):
    leaves, rest = batch([2, 1], 3, vocab, masked=False)
    leaves["weight"][-5:] *= 3  # the largest logits lie in the last block
    rest["targets"][0] = vocab - 1
    compare(leaves, rest, options=GrpoOptions(beta=0.1, entropy_coef=0.05))


@pytest.mark.parametrize("top", [1e4, -1e4])
def test_large_logits(top):
    leaves, rest = batch([4, 3], 4, 500, bias=True)
    leaves["bias"] += top
    rest["old_logp"] = rest["ref_logp"] = None
    compare(leaves, rest, options=GrpoOptions(entropy_coef=0.1), slack=1e-5)


def test_equals_the_loss_on_log_probabilities():
    leaves, rest = batch([5, 2, 6], 8, 300)
    options = GrpoOptions(loss_type="grpo", beta=0.2, entropy_coef=0.1, temperature=0.8)

    def in_two(hidden, weight, targets, **rest):
        logp, entropy = linear_logprob(hidden, weight, targets, temperature=options.temperature)
        return grpo_loss(logp, targets=targets, entropy=entropy, options=options, **rest)

    apart = outcome(in_two, leaves, rest)
    for rows in (1, 4, 100):
        ours = outcome(linear_grpo, leaves, rest, options=options, memory_budget=rows * 300 * 4)
        torch.testing.assert_close(ours, apart, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_three_products_in_all(ratio_level):
    """A sequence's ratio costs one more where rows come in several chunks; a frozen weight's gradient is not made."""
    leaves, rest = batch([5, 2, 6], 8, 300)
    options, in_two = GrpoOptions(ratio_level=ratio_level), 10 * 300 * 4
    hidden, weight = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_()
    extra = ["mm", "mm"] if ratio_level == "sequence" else []
    with Products() as products:
        linear_grpo(hidden, weight, **rest, options=options, memory_budget=in_two).loss.backward()
    assert products.names == extra + ["mm", "mm", "addmm_"] * 2
    with Products() as products:
        linear_grpo(hidden, weight, **rest, options=options).loss.backward()
    assert products.names == ["mm", "mm", "addmm_"]
    with Products() as products:
        linear_grpo(hidden, weight.detach(), **rest, options=options, memory_budget=in_two).loss.backward()
    assert products.names == extra + ["mm", "mm"] * 2
    with torch.no_grad(), Products() as products:
        out = linear_grpo(hidden, weight, **rest, options=options, memory_budget=in_two)
    assert products.names == extra + ["mm"] * 2 and not out.loss.requires_grad


def test_the_upstream_gradient_counts():
    leaves, rest = batch([5, 2], 8, 300, bias=True)
    grads = []
    for factor in (1.0, 0.25):
        given = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        (linear_grpo(**given, **rest).loss * factor).backward()
        grads.append({name: t.grad / factor for name, t in given.items()})
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def test_gradients_are_given_out_once():
    leaves, rest = batch([5, 2], 8, 300)
    loss = linear_grpo(leaves["hidden"].requires_grad_(), leaves["weight"], **rest).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have been given out"):
        loss.backward()


def test_a_frozen_input_gets_no_gradient():
    leaves, rest = batch([5, 2], 8, 300, bias=True)
    for name in leaves:
        given = {k: t.clone().requires_grad_(k == name) for k, t in leaves.items()}
        linear_grpo(**given, **rest).loss.backward()
        assert {k: t.grad is not None for k, t in given.items()} == {k: k == name for k in given}


@pytest.mark.parametrize(("budget", "share"), [(None, 1), (8_000, 1), (3_200, 1), (2_400, 2)])
def test_the_gradient_keeps_no_more_memory_than_it_must(budget, share):
    """Narrowed where a chunk of logits was or, where that is too small, in the memory of its own float32 sums."""
    leaves, rest = batch([7, 5], 4, 400, dtype=torch.bfloat16)
    grad = outcome(linear_grpo, leaves, rest, memory_budget=budget)["dweight"]
    assert grad.dtype == torch.bfloat16
    assert grad.untyped_storage().nbytes() == share * grad.nbytes


def test_a_target_beyond_the_vocabulary_spoils_the_loss(path):
    if path == "torch":
        pytest.skip("plain torch refuses it")
    leaves, rest = batch([2, 3], 4, 20, masked=False)
    rest["old_logp"] = rest["ref_logp"] = None
    rest["targets"][1] = 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_grpo_module, "check_targets", lambda targets, N, V: targets)
        found = outcome(linear_grpo, leaves, rest)
    assert found["loss"].isnan() and found["logp"].isnan().tolist() == [False, True, False, False, False]


def test_a_step_with_a_budget_in_floating_point():
    leaves, rest = batch([2, 3], 4, 20)
    assert linear_grpo(**leaves, **rest, memory_budget=2e2).loss.isfinite()


def test_nothing_to_score():
    leaves, rest = batch([2, 1], 4, 20)
    for lengths in ([0, 0], []):
        empty, none = batch(lengths, 4, 20, masked=False) if lengths else (dict(leaves), dict(rest))
        if not lengths:
            none["targets"] = torch.full_like(none["targets"], -1)
        given = {name: t.clone().requires_grad_() for name, t in empty.items()}
        out = linear_grpo(**given, **none)
        out.loss.backward()
        assert out.loss == 0 and out.stats.isfinite().all() and (out.logp == 0).all()
        assert all((t.grad == 0).all() for t in given.values())


def test_the_sum_over_chunks_is_kept_in_float32():
    """In bfloat16 the later of 64 equal shares would be rounded away."""
    hidden, weight = torch.ones(64, 4).bfloat16(), torch.zeros(8, 4).bfloat16().requires_grad_()
    bounds, targets = torch.tensor([0, 64]).int(), torch.zeros(64, dtype=torch.int64)
    linear_grpo(hidden, weight, targets, torch.ones(1), bounds, memory_budget=16).loss.backward()
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -0.875).bfloat16())


@pytest.mark.parametrize("size", [5, (1 << 20) - 1, (1 << 20) + 3, 3 << 20])
def test_sums_are_narrowed_where_they_lie(path, size):
    if path == "triton":
        pytest.skip("the same on every device")
    torch.manual_seed(0)
    total = torch.randn(size, 1)
    wanted, memory = total.bfloat16(), total.data_ptr()
    narrow = head_module._narrow(total, torch.bfloat16)
    assert narrow.data_ptr() == memory and narrow.shape == (size, 1) and torch.equal(narrow, wanted)


@pytest.mark.parametrize("size", [1, 1000, (1 << 14) + 1])
def test_scaling_by_one_touches_nothing(size):
    values = torch.randn(size)
    before = values.clone()
    assert torch.equal(head_module.scale_(values, torch.tensor(1.0)), before)
    assert torch.equal(head_module.scale_(values, torch.tensor(-2.5)), before * -2.5)


def test_the_same_twice():
    leaves, rest = batch([4, 6, 3], 8, 300)
    first, second = (outcome(linear_grpo, leaves, rest, memory_budget=5 * 1200) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masked_tokens_may_hold_anything():
    leaves, rest = batch([3, 6, 4], 8, 300)
    spoilt = {name: t.clone() for name, t in rest.items()}
    for name in ("old_logp", "ref_logp"):
        spoilt[name][rest["targets"] < 0] = torch.nan
    first, second = (outcome(linear_grpo, leaves, r, options=GrpoOptions(beta=0.1)) for r in (rest, spoilt))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["dhidden"][rest["targets"] < 0] == 0).all()


def test_a_target_beyond_the_vocabulary_gives_nan_in_the_kernel(path, monkeypatch):
    if path == "torch":
        pytest.skip("a CPU refuses it")
    monkeypatch.setattr(module, "check_targets", lambda targets, *_: targets)
    leaves, rest = batch([2, 1], 4, 20, masked=False)
    rest["targets"] = torch.tensor([19, 20, 0])
    assert linear_grpo(**leaves, **rest).logp.isnan().tolist() == [False, True, False]


def test_wrong_inputs_are_named():
    leaves, rest = batch([3, 3], 4, 20)
    with pytest.raises(ValueError, match=r"hidden \[N, H\], weight \[V, H\]; got \(6, 3\)"):
        linear_grpo(leaves["hidden"][:, :3], leaves["weight"], **rest)
    with pytest.raises(ValueError, match=r"'old_logp': \(5,\)"):
        linear_grpo(**leaves, **(rest | {"old_logp": rest["old_logp"][:5]}))
    with pytest.raises(ValueError, match=r"targets \[6\] int64; got \(6,\) torch.int32"):
        linear_grpo(**leaves, **(rest | {"targets": rest["targets"].int()}))
    with pytest.raises(ValueError, match="want ref_logp"):
        linear_grpo(**leaves, **(rest | {"ref_logp": None}), options=GrpoOptions(beta=0.1))
    with pytest.raises(ValueError, match="memory_budget >= 80 bytes"):
        linear_grpo(**leaves, **rest, memory_budget=79)
