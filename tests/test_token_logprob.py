"""Log-probabilities and entropies from logits: values and gradients against float64, in plain torch and as kernels."""

import math

import pytest
import torch
from closeness import assert_as_close_as_pytorch, value_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medground_kernels.token_logprob as module
from medground_kernels.token_logprob import token_logprob, token_logprob_reference

pytestmark = pytest.mark.usefixtures("path")


def against_the_truth(logits, targets, temperature=0.7, slack=2e-6, **more):
    def run(fn, leaf, **options):
        return value_and_grads(lambda logits: fn(logits, targets, **options)._asdict(), {"logits": leaf})

    ours = run(token_logprob, logits, temperature=temperature, **more)
    assert ours["logp"].dtype == ours["entropy"].dtype == torch.float32
    assert_as_close_as_pytorch(
        ours,
        run(token_logprob_reference, logits, temperature=temperature),
        run(token_logprob_reference, logits.double(), temperature=temperature),
        slack=slack,
    )


def some(rows, vocab, dtype=torch.float32, scale=3.0):
    logits = torch.randn(rows, vocab).mul(scale).to(dtype)
    targets = torch.randint(vocab, (rows,))
    targets[1::3] = -1
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (7, 1000), (4, 9001), (0, 5), (2, 33_000)])
def test_as_close_to_the_truth_as_pytorch(rows, vocab, dtype):
    torch.manual_seed(0)
    logits, targets = some(rows, vocab, dtype)
    logits[:, -1] += 10  # the running maximum moves in the last block
    against_the_truth(logits, targets)
    against_the_truth(logits, targets, inplace_backward=True)


@pytest.mark.parametrize("vocab", [151_936, 152_064])
def test_tails_of_real_vocabularies(vocab):
    torch.manual_seed(0)
    logits, _ = some(2, vocab)
    logits[0, -7:] = 30.0
    against_the_truth(logits, torch.tensor([vocab - 1, 17]))


@pytest.mark.parametrize("top", [1e4, -1e4, 0.0])
def test_large_logits(top):
    torch.manual_seed(0)
    logits = torch.randn(5, 5000) * 2 + top
    logits[1] *= 1e4 / logits[1].abs().max()
    logits[2, :4500] = -1e4
    logits[3, 0], logits[3, 4999] = 1e4, 9.9995e3
    against_the_truth(logits, torch.tensor([0, 1, 4600, 4999, 4200]))


def test_impossible_tokens_add_nothing():
    logits = torch.randn(3, 9000)
    logits[:, :5000] = -math.inf  # the first block and more
    logits[1, 5001:] = -math.inf  # a single possible token
    leaf = logits.requires_grad_()
    out = token_logprob(leaf, torch.tensor([8000, 5000, 6000]))
    (out.logp.sum() + out.entropy.sum()).backward()
    possible = logits.detach()[:, 5000:].double()
    truth = token_logprob_reference(possible, torch.tensor([3000, 0, 1000]))
    torch.testing.assert_close(out.logp.detach().double(), truth.logp, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy.detach().double(), truth.entropy, atol=2e-6, rtol=1e-6)
    assert (leaf.grad[:, :5000] == 0).all() and leaf.grad.isfinite().all()
    never = token_logprob(logits.detach(), torch.tensor([0, 0, 0]))
    assert (never.logp == -math.inf).all()


def test_nan_is_not_hidden():
    logits = torch.zeros(2, 300)
    logits[1, 250] = math.nan
    out = token_logprob(logits, torch.tensor([3, 3]))
    assert out.logp.isnan().tolist() == [False, True]
    assert out.entropy.isnan().tolist() == [False, True]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 6),
    vocab=st.integers(1, 700),
    scale=st.sampled_from([0.1, 5.0, 1e3]),
    temperature=st.floats(0.05, 8),
    gap=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, vocab, scale, temperature, gap, dtype, seed):
    torch.manual_seed(seed)
    logits, targets = some(rows, vocab + gap, dtype, scale)
    against_the_truth(logits[:, :vocab], targets.clamp(max=vocab - 1), temperature)


def test_masked_tokens_count_for_nothing():
    logits = torch.randn(3, 5, requires_grad=True)
    out = token_logprob(logits, torch.tensor([-1, 2, -100]))
    (out.logp.sum() + out.entropy.sum()).backward()
    assert out.logp.tolist()[::2] == out.entropy.tolist()[::2] == [0.0, 0.0]
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [False, True, False]


def test_rows_may_lie_apart():
    torch.manual_seed(0)
    wide = torch.randn(4, 60)
    targets = torch.tensor([1, 2, 3, 4])
    for view in (wide[:, 5:55], wide[::2, :50], wide[:1, :50].expand(4, 50)):
        apart = token_logprob(view, targets[: len(view)])
        torch.testing.assert_close(apart, token_logprob(view.contiguous(), targets[: len(view)]), rtol=0, atol=0)
    leaf = wide.clone().requires_grad_()
    (token_logprob(leaf[:, 5:55], targets, inplace_backward=True).logp.sum() * 2).backward()
    other = wide.clone().requires_grad_()
    (token_logprob(other[:, 5:55], targets).logp.sum() * 2).backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=0)


def test_gradient_takes_the_place_of_the_logits():
    torch.manual_seed(0)
    before = torch.randn(3, 200, requires_grad=True)
    logits = before * 1.0
    memory = logits.data_ptr()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    out = token_logprob(logits, torch.tensor([5, 6, -1]), inplace_backward=True)
    out.logp.sum().backward()
    assert seen == [memory]
    plain = before.detach().clone().requires_grad_()
    token_logprob(plain, torch.tensor([5, 6, -1])).logp.sum().backward()
    torch.testing.assert_close(before.grad, plain.grad, rtol=0, atol=0)


def test_autograd_notices_whoever_still_needs_overwritten_logits():
    before = torch.randn(3, 20, requires_grad=True)
    logits = before * 1.0
    loss = token_logprob(logits, torch.tensor([1, 2, 3]), inplace_backward=True).logp.sum()
    square = (logits**2).sum()  # keeps the logits too
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_same_twice():
    logits, targets = some(5, 3000)
    first, second = token_logprob(logits, targets), token_logprob(logits, targets)
    assert torch.equal(first.logp, second.logp) and torch.equal(first.entropy, second.entropy)


def test_a_row_does_not_depend_on_its_neighbours_where_the_cut_is_the_same(monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    logits = torch.randn(6, 2000)
    targets = torch.arange(6)
    alone = [token_logprob(logits[i : i + 1], targets[i : i + 1]).logp for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), token_logprob(logits, targets).logp, rtol=0, atol=0)


def test_wrong_inputs_are_named():
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(2, 8\), \(3,\)"):
        token_logprob(torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="int32"):
        token_logprob(torch.zeros(2, 8), targets.int())
    with pytest.raises(ValueError, match="float64"):
        token_logprob(torch.zeros(2, 8).double(), targets)
    with pytest.raises(ValueError, match="temperature > 0; got 0"):
        token_logprob(torch.zeros(2, 8), targets, temperature=0)
    with pytest.raises(ValueError, match="unit stride"):
        token_logprob(torch.zeros(8, 2).T, targets)
    with pytest.raises(ValueError, match="do not overlap"):
        token_logprob(torch.zeros(1, 8).expand(2, 8), targets, inplace_backward=True)


def test_a_target_beyond_the_vocabulary_does_not_pass():
    logits, targets = torch.zeros(2, 8), torch.tensor([1, 8])
    if logits.is_cuda:
        assert token_logprob(logits, targets).logp.isnan().tolist() == [False, True]
    else:
        with pytest.raises(ValueError, match="below V = 8; got 8"):
            token_logprob(logits, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_of_several_blocks(dtype, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", 1)  # one program reads a row: its running maximum moves between blocks
    torch.manual_seed(0)
    logits, _ = some(4, 9001, dtype)
    logits[0, -1] += 10
    logits[1, 5000] += 10
    logits[2, 3] += 10
    logits[3, :4096] -= 10
    against_the_truth(logits, torch.tensor([9000, 4999, 3, 7000]))


def test_splits_that_are_no_power_of_two():
    torch.manual_seed(0)
    logits = torch.randn(3, 9001) - 1e4  # 3 splits: what lies behind them must not become the maximum
    against_the_truth(logits, torch.tensor([0, 5000, 9000]))


def test_a_target_beyond_the_vocabulary_gives_nan_in_the_kernel(path):
    if path == "triton":
        logp, _ = module.forward_rows(torch.zeros(2, 8), torch.tensor([8, 1]), 1.0)
        assert logp.isnan().tolist() == [True, False]
