"""Attention of packed groups: values and gradients against float64, in plain torch and with the fold as a kernel."""

import math
from itertools import pairwise

import pytest
import torch
from closeness import BF16_ULP, assert_as_close_as_pytorch, value_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medground_kernels.prefix_attention as module
from medground_kernels.prefix_attention import prefix_attention, prefix_attention_reference, prefix_layout
from medground_kernels.varlen_attention import varlen_attention_reference

pytestmark = pytest.mark.usefixtures("path")

GROUPS = [(5, [3, 1, 4]), (1, []), (7, [2]), (20, [9, 12]), (2, [1] * 17)]
"""Groups of several sizes, one without completions."""


def some(groups, heads=(4, 2, 8), dtype=torch.float32):
    torch.manual_seed(0)
    T, (Hq, Hkv, D) = sum(P + sum(lengths) for P, lengths in groups), heads
    return {name: torch.randn(T, H, D).to(dtype) for name, H in {"q": Hq, "k": Hkv, "v": Hkv}.items()}


def ours(groups, leaves, scale=None):
    layout = prefix_layout(groups, leaves["q"].device)
    return value_and_grads(lambda q, k, v: {"out": prefix_attention(q, k, v, layout, scale=scale)}, leaves)


def reference(groups, leaves, scale):
    return value_and_grads(lambda q, k, v: {"out": prefix_attention_reference(q, k, v, groups, scale)}, leaves)


def against_the_truth(groups, leaves, scale=None):
    got, scale = ours(groups, leaves, scale), leaves["q"].shape[2] ** -0.5 if scale is None else scale
    assert got["out"].dtype == leaves["q"].dtype and got["out"].is_contiguous()
    truth = reference(groups, {name: leaf.double() for name, leaf in leaves.items()}, scale)
    assert_as_close_as_pytorch(got, reference(groups, leaves, scale), truth)


def places(groups):
    """Rows of each prompt, and of its completions: [(prompt, [c1, ...]), ...]."""
    found, start = [], 0
    for P, lengths in groups:
        cuts = torch.tensor([start + P, *lengths]).cumsum(0).tolist()
        found.append((range(start, start + P), [range(*ends) for ends in pairwise(cuts)]))
        start = cuts[-1]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_close_to_the_truth_as_pytorch(dtype):
    against_the_truth(GROUPS, some(GROUPS, dtype=dtype))
    against_the_truth(GROUPS, some(GROUPS, (2, 2, 40), dtype=dtype), scale=0.5)


@settings(deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.sampled_from([0, 1, 2, 8, 17]).flatmap(
                lambda G: st.lists(st.sampled_from([1, 1, 2, 5, 11]), min_size=G, max_size=G)
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(1, 1, 8), (4, 2, 16), (6, 2, 8)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_groups(groups, heads, dtype):
    against_the_truth(groups, some(groups, heads, dtype))


def test_the_same_as_a_row_for_each_completion():
    leaves, scale = some(GROUPS), 8**-0.5
    got, upstream = ours(GROUPS, leaves), torch.linspace(-1, 2, leaves["q"].numel()).view_as(leaves["q"])
    wanted = {f"d{name}": torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    for prompt, completions in places(GROUPS):
        for number, completion in enumerate(completions or [range(0)]):
            row = [*prompt, *completion]
            x = {name: leaf[row].double().requires_grad_() for name, leaf in leaves.items()}
            out = varlen_attention_reference(*x.values(), [len(row)], [len(row)], True, scale)
            torch.testing.assert_close(got["out"][row].double(), out, atol=2e-6, rtol=0)
            weight = upstream[row].double()
            weight[: len(prompt)] *= number == 0  # a prompt's own output counts once
            (out * weight).sum().backward()
            for name, leaf in x.items():
                wanted[f"d{name}"][row] += leaf.grad
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name].double(), gradient, atol=2e-5, rtol=2e-6)


def test_a_completion_is_seen_by_itself_alone():
    leaves, layout = some(GROUPS), prefix_layout(GROUPS, torch.get_default_device())
    before = prefix_attention(**leaves, layout=layout)
    for _, completions in places(GROUPS):
        for completion in completions:
            changed = {name: leaf.clone() for name, leaf in leaves.items()}
            for leaf in changed.values():
                leaf[list(completion)] *= 3.0
            after = prefix_attention(**changed, layout=layout)
            differs = (before != after).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert differs == list(completion)


def test_a_prompt_is_seen_by_all_of_its_group():
    leaves, layout = some(GROUPS), prefix_layout(GROUPS, torch.get_default_device())
    before = prefix_attention(**leaves, layout=layout)
    for prompt, completions in places(GROUPS):
        changed = leaves | {"v": leaves["v"].clone()}
        changed["v"][prompt[-1]] += 5.0
        differs = (before != prefix_attention(**changed, layout=layout)).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert differs == [prompt[-1], *(row for completion in completions for row in completion)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_added_up_in_float32(dtype):
    """bfloat16 counts to 256, one at a time; here a prompt of one token has 516 readers of weight 1 / 2."""
    groups = [(1, [1] * 515), (1, [])]
    leaves = some(groups, (1, 1, 8), dtype)
    layout = prefix_layout(groups, leaves["q"].device)
    v = leaves["v"].requires_grad_()
    prefix_attention(leaves["q"] * 0, leaves["k"], v, layout).sum().backward()
    assert (v.grad[1:-1] == 0.5).all() and (v.grad[-1] == 1).all()
    assert ((v.grad[0].float() - 258.5).abs() <= 258.5 * BF16_ULP).all()


def test_the_same_bits_again():
    leaves = some(GROUPS)
    first, second = ours(GROUPS, leaves), ours(GROUPS, leaves)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def guarded(monkeypatch):
    """Memory for results starts as NaN and is followed by more of it, which must stay."""
    empty, taken = torch.empty, []

    def guarded_empty(shape, **options):
        memory = empty(math.prod(shape) + 500, **options).fill_(math.nan)
        taken.append(memory[math.prod(shape) :])
        return memory[: math.prod(shape)].view(shape)

    monkeypatch.setattr(module.torch, "empty", guarded_empty)
    yield taken
    assert all(rest.isnan().all() for rest in taken)


@pytest.mark.parametrize("width", [(1, 1), (1, 16), (3, 7), (2, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_adds_up_each_row(dtype, width, path, guarded, monkeypatch):
    if path != "triton":
        pytest.skip("the torch form is tests/test_varlen_attention.py's")
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "COLS", 16)
    layout = prefix_layout(GROUPS, torch.get_default_device())
    rows = layout.plan.key_rows
    # small whole numbers have exact sums
    grad = torch.randint(-3, 4, (layout.K, *width)).to(dtype)
    grad_padded = torch.full((layout.K + 40, *width), math.nan, dtype=dtype)
    grad_padded[: layout.K] = grad
    total = module._fold(grad_padded[: layout.K], rows)
    wanted = torch.zeros(layout.T, *width, dtype=torch.float64).index_add_(0, rows.source, grad.double())
    assert total.dtype == dtype and torch.equal(total.double(), wanted) and len(guarded) == 1
    # a gradient may come in any order of its memory
    turned = grad.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(module._fold(turned, rows), total)


def test_keys_are_laid_out_for_each_segment():
    layout = prefix_layout([(2, [1, 2]), (1, []), (1, [1])], "cpu")
    keys = [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 6, 7]
    assert (layout.T, layout.K) == (8, 13)
    assert layout.plan.cu_q.tolist() == [0, 2, 3, 5, 6, 7, 8]
    assert layout.plan.cu_k.tolist() == layout.spread_plan.cu_k.tolist() == [0, 2, 5, 9, 10, 11, 13]
    assert layout.plan.keys.tolist() == layout.plan.key_rows.source.tolist() == keys
    assert layout.plan.key_rows.starts.tolist() == [0, 3, 6, 7, 8, 9, 10, 12, 13]
    assert layout.plan.key_rows.readers.tolist() == [0, 2, 5, 1, 3, 6, 4, 7, 8, 9, 10, 11, 12]


def test_prompts_alone_are_not_copied(monkeypatch):
    monkeypatch.setattr(module._Spread, "apply", lambda *_: pytest.fail("copied"))
    groups = [(5, []), (2, ()), (5, [])]
    assert prefix_layout(groups, "cpu").plan.keys is None
    against_the_truth(groups, some(groups))


def test_views_and_expanded_gradients():
    leaves = some(GROUPS)
    layout = prefix_layout(GROUPS, leaves["q"].device)

    def lie(x):  # [T, H, D] in the memory of [H, T, D + 3]
        wide = x.new_zeros(x.shape[1], len(x), x.shape[2] + 3)
        wide[:, :, : x.shape[2]] = x.transpose(0, 1)
        return wide[:, :, : x.shape[2]].transpose(0, 1).requires_grad_()

    views, plain = ([make(x) for x in leaves.values()] for make in (lie, lambda x: x.clone().requires_grad_()))
    assert not any(x.is_contiguous() for x in views)
    outs = [prefix_attention(*x, layout) for x in (views, plain)]
    assert torch.equal(*outs)
    for out in outs:
        out.sum().backward()
    for a, b in zip(views, plain, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_gradients_that_nobody_needs():
    leaves = some(GROUPS)
    layout = prefix_layout(GROUPS, leaves["q"].device)
    leaves["k"].requires_grad_()
    prefix_attention(**leaves, layout=layout).square().sum().backward()
    assert leaves["q"].grad is None and leaves["v"].grad is None and leaves["k"].grad.abs().sum() > 0
    with torch.no_grad():
        assert not prefix_attention(**leaves, layout=layout).requires_grad


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one group"),
        ([(3, [1]), (0, [1])], r"P >= 1 and every C >= 1; got P = 0, C = \[1\] in group 1"),
        ([(3, [1, 0, 2])], r"got P = 3, C = \[1, 0, 2\] in group 0"),
    ],
)
def test_wrong_lengths_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        prefix_layout(groups, "cpu")


def test_wrong_tensors_are_named():
    groups = [(3, [1, 2])]
    leaves, layout = some(groups), prefix_layout(groups, torch.get_default_device())
    for name in leaves:
        with pytest.raises(ValueError, match=r"layout's 6 tokens; got \d, \d, \d"):
            prefix_attention(**leaves | {name: leaves[name][1:]}, layout=layout)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        prefix_attention(leaves["q"][:, :3], leaves["k"], leaves["v"], layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_segments_on_a_gpu(dtype, path):
    if path != "triton" or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    groups = [(300, [128, 1, 90]), (37, []), (64, [65] * 8)]
    against_the_truth(groups, some(groups, (16, 2, 128), dtype))
