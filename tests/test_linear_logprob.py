"""Log-probabilities straight from hidden states: chunked, values and gradients against float64."""

import pytest
import torch
from closeness import Products, assert_as_close_as_pytorch, value_and_grads

from medground_kernels.head import head_logits, row_chunks
from medground_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from medground_kernels.token_logprob import token_logprob

pytestmark = pytest.mark.usefixtures("path")


def head(N, H, V, dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    leaves = {"hidden": torch.randn(N, H).to(dtype), "weight": (torch.randn(V, H) * 2 / H**0.5).to(dtype)}
    if bias:
        leaves["bias"] = torch.randn(V).to(dtype)
    targets = torch.randint(V, (N,))
    targets[1::3] = -1
    return leaves, targets


def compare(leaves, targets, temperature=0.7, slack=2e-6, **more):
    def run(fn, cast=None, **options):
        given = {name: t.to(cast or t.dtype) for name, t in leaves.items()}
        return value_and_grads(
            lambda **given: fn(targets=targets, temperature=temperature, **given, **options)._asdict(), given
        )

    truth = run(linear_logprob_reference, torch.float64)
    assert_as_close_as_pytorch(run(linear_logprob, **more), run(linear_logprob_reference), truth, slack=slack)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 1), (7, 8, 1000), (0, 4, 9)])
def test_as_close_to_the_truth_as_pytorch(N, H, V, dtype, bias):
    leaves, targets = head(N, H, V, dtype, bias)
    compare(leaves, targets)
    if N > 5:  # chunks of one row, of a few
        for rows in (1, 3):
            compare(leaves, targets, memory_budget=rows * V * dtype.itemsize)


def test_chunks_of_whole_tiles():
    leaves, targets = head(130, 5, 30)
    compare(leaves, targets, memory_budget=129 * 30 * 4)


def test_chunks_are_even_and_within_the_budget():
    weight = torch.empty(100, 4)
    assert row_chunks(1000, weight, 400 * 300) == [slice(0, 256), slice(256, 512), slice(512, 768), slice(768, 1000)]
    assert row_chunks(1000, weight, 400 * 1000) == [slice(0, 1000)]
    assert row_chunks(5, weight, 400 * 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert row_chunks(0, weight, None) == []
    assert row_chunks(7, torch.empty(1, 1), None) == [slice(0, 7)]
    for N in (1, 127, 129, 1600, 8192, 9999):
        for budget in (400, 400 * 127, 400 * 128, 400 * 5000):
            chunks = row_chunks(N, weight, budget)
            assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])] and chunks[-1].stop == N
            assert max(c.stop - c.start for c in chunks) * 400 <= budget


def test_a_vocabulary_beyond_the_budget_takes_a_row_at_a_time():
    weight = torch.empty(1, 1).expand((1 << 30) + 1, 1)
    assert row_chunks(2, weight, None) == [slice(0, 1), slice(1, 2)]
    with pytest.raises(ValueError, match=r"memory_budget >= 4294967300 bytes.*got 1000"):
        row_chunks(2, weight, 1000)


def test_equals_the_logits_form():
    leaves, targets = head(20, 8, 60)
    ours = linear_logprob(leaves["hidden"], leaves["weight"], targets, temperature=1.3)
    torch.testing.assert_close(ours, token_logprob(leaves["hidden"] @ leaves["weight"].T, targets, temperature=1.3))


def test_a_frozen_weight_costs_nothing():
    leaves, targets = head(20, 8, 60)
    hidden, weight = leaves["hidden"].requires_grad_(), leaves["weight"]
    with Products() as products:
        linear_logprob(hidden, weight, targets).logp.sum().backward()
    assert products.names == ["mm", "mm", "mm"]  # logits, logits again, gradient of hidden
    assert weight.grad is None
    weight.requires_grad_()
    with Products() as products:
        linear_logprob(hidden.detach(), weight, targets).entropy.sum().backward()
    assert products.names == ["mm", "mm", "addmm_"] and weight.grad is not None


def test_hidden_states_may_be_a_view():
    leaves, targets = head(6, 4, 10)
    wide = torch.randn(6, 12)
    view = wide[:, 3:7]
    for hidden in (view, wide[:, ::3]):
        torch.testing.assert_close(
            linear_logprob(hidden, leaves["weight"], targets),
            linear_logprob(hidden.contiguous(), leaves["weight"], targets),
        )


def test_logits_go_into_the_buffer():
    buffer = torch.zeros(5, 3)
    logits = head_logits(torch.ones(2, 4), torch.ones(3, 4), torch.full((3,), 0.5), buffer)
    assert logits.data_ptr() == buffer.data_ptr() and (buffer[:2] == 4.5).all() and (buffer[2:] == 0).all()


def test_wrong_inputs_are_named():
    leaves, targets = head(6, 4, 10)
    hidden, weight = leaves["hidden"], leaves["weight"]
    with pytest.raises(ValueError, match=r"\(6, 4\), \(10, 3\), None"):
        linear_logprob(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"bias \[V\].*\(4,\)"):
        linear_logprob(hidden, weight, targets, bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"float32 or bfloat16.*float16"):
        linear_logprob(hidden.half(), weight.half(), targets)
    with pytest.raises(ValueError, match="bfloat16"):
        linear_logprob(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match=r"targets \[6\]"):
        linear_logprob(hidden, weight, targets[:5])
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="memory_budget >= 40 bytes"):
        linear_logprob(hidden, weight, targets, memory_budget=39)
