"""Attention of segments: values and gradients against float64, in every form that can run here."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from closeness import assert_as_close_as_pytorch, value_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen

import medground_kernels.varlen_attention as module
from medground_kernels.varlen_attention import (
    backend_name,
    varlen_attention,
    varlen_attention_reference,
    varlen_plan,
)

FORMS = ["sdpa", "flash-attn", "torch varlen attention"]
HALF = (torch.bfloat16, torch.float16)
CASES = {
    "windows alike": ([16] * 6, [16] * 6, False),
    "windows and smaller ones": ([16, 4, 16, 16, 8, 16, 1], [16, 4, 16, 16, 8, 16, 1], False),
    "across": ([3, 1, 8, 9], [5, 7, 2, 9], False),
    "one": ([37], [37], True),
    "alike": ([9] * 5, [9] * 5, True),
    "ragged": ([9, 1, 33, 12, 2], [9, 1, 33, 12, 2], True),
    "one offset": ([5, 12, 1, 9], [25, 32, 21, 29], True),
    "offsets": ([5, 12, 1, 9, 40], [25, 13, 1, 9, 70], True),
    "single queries": ([1] * 4, [9, 9, 9, 4], True),
}


@pytest.fixture
def use(monkeypatch):
    """use(form): run it, on its device; skips where it cannot run."""

    def choose(form):
        if form != "sdpa":
            if not torch.cuda.is_available():
                pytest.skip(f"{form} needs a CUDA device")
            if form != "flash-attn":
                monkeypatch.setattr(module, "find_spec", lambda name: None)
            module._backend.cache_clear()
            if not backend_name("cuda").startswith(form):
                pytest.skip(f"{form} is not installed, or not for this GPU")
        torch.set_default_device("cpu" if form == "sdpa" else "cuda")

    yield choose
    torch.set_default_device(None)
    module._backend.cache_clear()


def some(lengths_q, lengths_k, heads=(4, 2, 8), dtype=torch.float32, rows_k=None):
    torch.manual_seed(0)
    Hq, Hkv, D = heads
    shapes = {"q": (sum(lengths_q), Hq, D)} | dict.fromkeys("kv", (rows_k or sum(lengths_k), Hkv, D))
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def against_the_truth(lengths_q, lengths_k, causal, leaves, scale=None, keys=None):
    plan = varlen_plan(lengths_q, lengths_k, leaves["q"].device, causal, keys)

    def reference(q, k, v):
        k, v = (x if keys is None else x[keys.to(x.device)] for x in (k, v))
        scaled = q.shape[2] ** -0.5 if scale is None else scale
        return {"out": varlen_attention_reference(q, k, v, lengths_q, lengths_k, causal, scaled)}

    ours = value_and_grads(lambda q, k, v: {"out": varlen_attention(q, k, v, plan, scale=scale)}, leaves)
    assert ours["out"].dtype == leaves["q"].dtype and ours["out"].is_contiguous()
    truth = value_and_grads(reference, {name: leaf.double() for name, leaf in leaves.items()})
    assert_as_close_as_pytorch(ours, value_and_grads(reference, leaves), truth)


@pytest.mark.parametrize("call", [0, 200, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("lengths_q", "lengths_k", "causal"), CASES.values(), ids=CASES)
def test_padded_as_close_to_the_truth_as_pytorch(lengths_q, lengths_k, causal, dtype, call, monkeypatch):
    monkeypatch.setattr(module, "_CALL", call)
    against_the_truth(lengths_q, lengths_k, causal, some(lengths_q, lengths_k, dtype=dtype))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("heads", [(4, 2, 32), (16, 16, 80), (16, 2, 128)])
@pytest.mark.parametrize(("lengths_q", "lengths_k", "causal"), CASES.values(), ids=CASES)
def test_flash_as_close_to_the_truth_as_pytorch(lengths_q, lengths_k, causal, heads, dtype, form, use):
    use(form)
    against_the_truth(lengths_q, lengths_k, causal, some(lengths_q, lengths_k, heads, dtype))


@pytest.mark.parametrize("form", FORMS)
def test_the_last_query_sees_every_key(form, use):
    use(form)
    dtype = torch.float32 if form == "sdpa" else torch.bfloat16
    plan = varlen_plan([3, 1], [5, 2], "cpu" if form == "sdpa" else "cuda", causal=True)
    q, k = torch.zeros(4, 1, 8, dtype=dtype), torch.zeros(7, 1, 8, dtype=dtype)
    v = torch.eye(7, dtype=dtype)[:, None]
    v = torch.cat([v, v.new_zeros(7, 1, 1)], 2)
    seen = varlen_attention(q, k, v, plan)[:, 0, :7] > 0
    assert seen.int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


@settings(deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0, 0, 3, 17])), min_size=1, max_size=8),
    heads=st.sampled_from([(1, 1, 5), (2, 2, 8), (6, 2, 16), (4, 1, 3)]),
    causal=st.booleans(),
    call=st.sampled_from([0, 300, 10**9]),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_lengths(sizes, heads, causal, call, scale, dtype, monkeypatch):
    monkeypatch.setattr(module, "_CALL", call)
    lengths_q, lengths_k = [Q for Q, _ in sizes], [Q + more for Q, more in sizes]
    against_the_truth(lengths_q, lengths_k, causal, some(lengths_q, lengths_k, heads, dtype), scale)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_may_be_a_key_of_several_segments(form, use):
    use(form)
    lengths_q, lengths_k = [3, 6, 2], [4, 9, 5]
    keys = torch.tensor([0, 1, 2, 3, 7, 6, 5, 0, 1, 2, 3, 7, 8, 8, 0, 1, 2, 8], device="cpu")
    leaves = some(lengths_q, lengths_k, dtype=torch.float32 if form == "sdpa" else torch.bfloat16, rows_k=9)
    against_the_truth(lengths_q, lengths_k, True, leaves, keys=keys)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_a_shared_row_is_added_up_in_float32(form, dtype, use):
    use(form)
    n = 516  # bfloat16 counts to 256, one at a time
    keys = torch.zeros(n, dtype=torch.int64, device="cpu")
    q, k = torch.zeros(n, 1, 8, dtype=dtype), torch.zeros(1, 1, 8, dtype=dtype)
    v = torch.zeros(1, 1, 8, dtype=dtype, requires_grad=True)
    varlen_attention(q, k, v, varlen_plan([1] * n, [1] * n, q.device, True, keys)).sum().backward()
    assert (v.grad == n).all()


@pytest.mark.parametrize("keys", [False, True])
def test_the_same_bits_again_whatever_the_threads(keys):
    lengths_q = [9, 30, 2, 25] * 8
    source = torch.arange(sum(lengths_q)) % 200 if keys else None
    leaves = some(lengths_q, lengths_q, (4, 2, 32), rows_k=200 if keys else None)
    plan = varlen_plan(lengths_q, lengths_q, "cpu", True, source)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(value_and_grads(lambda q, k, v: {"out": varlen_attention(q, k, v, plan)}, leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a[name], b[name]) for a, b in pairwise(runs) for name in a)


def test_views_and_expanded_gradients():
    lengths, flat = [4, 9, 2], some([4, 9, 2], [4, 9, 2])
    plan = varlen_plan(lengths, lengths, "cpu", causal=True)

    def lie(x):  # [T, H, D] in the memory of [H, T, D + 3]
        wide = torch.zeros(x.shape[1], len(x), x.shape[2] + 3)
        wide[:, :, : x.shape[2]] = x.detach().transpose(0, 1)
        return wide[:, :, : x.shape[2]].transpose(0, 1).requires_grad_()

    views, plain = ([make(x) for x in flat.values()] for make in (lie, lambda x: x.requires_grad_()))
    assert not any(x.is_contiguous() for x in views)
    outs = [varlen_attention(*leaves, plan) for leaves in (views, plain)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    for out in outs:
        out.sum().backward()
    for a, b in zip(views, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@pytest.mark.parametrize("call", [0, 10**9])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_do_not_touch_each_other(causal, call, monkeypatch):
    monkeypatch.setattr(module, "_CALL", call)
    lengths_q, lengths_k = [4, 9, 2, 7], [8, 13, 6, 13]
    leaves = some(lengths_q, lengths_k)
    spoiled = {name: x.clone() for name, x in leaves.items()}
    spoiled["q"][4:13] = torch.nan
    spoiled["k"][8:21] = torch.nan
    spoiled["v"][8:21] = torch.inf
    plan = varlen_plan(lengths_q, lengths_k, "cpu", causal)
    sound, hurt = (
        value_and_grads(lambda q, k, v: {"out": varlen_attention(q, k, v, plan)}, x) for x in (leaves, spoiled)
    )
    kept_q, kept_k = [*range(4), *range(13, 22)], [*range(8), *range(21, 40)]
    for name, kept in {"out": kept_q, "dq": kept_q, "dk": kept_k, "dv": kept_k}.items():
        assert torch.equal(sound[name][kept], hurt[name][kept]), name
    assert hurt["out"][4:13].isnan().all()


def test_equal_segments_are_not_copied(monkeypatch):
    monkeypatch.setattr(module._Read, "apply", lambda *_: pytest.fail("copied"))
    for lengths, causal in (([16] * 6, False), ([9] * 5, True), ([37], True)):
        plan = varlen_plan(lengths, lengths, "cpu", causal)
        assert [b.mask for b in plan.padded.buckets] == [None] and plan.padded.buckets[0].is_causal == causal
        varlen_attention(*some(lengths, lengths).values(), plan)


def test_gradients_that_nobody_needs():
    leaves = some([4, 9, 2], [4, 9, 2])
    plan = varlen_plan([4, 9, 2], [4, 9, 2], "cpu", causal=True)
    leaves["v"].requires_grad_()
    varlen_attention(**leaves, plan=plan).sum().backward()
    assert leaves["q"].grad is None and leaves["k"].grad is None and leaves["v"].grad.abs().sum() > 0
    with torch.no_grad():
        assert not varlen_attention(**leaves, plan=plan).requires_grad


@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.sampled_from([0, 0, 40, 90])), min_size=1, max_size=40),
    call=st.sampled_from([0, 1000, 6000]),
    causal=st.booleans(),
)
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_bucket_is_cut_where_padding_would_cost_more_than_a_call(sizes, call, causal, monkeypatch):
    monkeypatch.setattr(module, "_CALL", call)
    lengths_q, lengths_k = [Q for Q, _ in sizes], [Q + more for Q, more in sizes]
    chosen = module._choose_buckets(lengths_q, lengths_k, causal)
    assert sorted(s for bucket in chosen for s in bucket) == list(range(len(sizes)))

    def waste(bucket):
        whole = len(bucket) * max(lengths_q[s] for s in bucket) * max(lengths_k[s] for s in bucket)
        return whole - sum(lengths_q[s] * lengths_k[s] for s in bucket)

    def square(bucket):
        return {causal and lengths_q[s] == lengths_k[s] for s in bucket}

    for bucket, after in zip(chosen, [*chosen[1:], None], strict=True):
        assert waste(bucket) <= call and len(square(bucket)) == 1
        if after and square(after) == square(bucket):
            assert waste([*bucket, after[0]]) > call


def test_masks_are_shared_where_offsets_are_equal(monkeypatch):
    monkeypatch.setattr(module, "_CALL", 10**9)
    shapes = {
        name: [
            None if b.mask is None else tuple(b.mask.shape) for b in varlen_plan(*case[:2], "cpu", case[2]).padded[0]
        ]
        for name, case in CASES.items()
    }
    assert shapes == {
        "windows alike": [None],
        "windows and smaller ones": [(7, 1, 1, 16)],
        "across": [(4, 1, 1, 9)],
        "one": [None],
        "alike": [None],
        "ragged": [None],
        "one offset": [(1, 1, 12, 32)],
        "offsets": [None, (3, 1, 40, 70)],
        "single queries": [(4, 1, 1, 9)],
    }


def test_a_plan_has_what_flash_attention_takes():
    plan = varlen_plan((3, 1, 4), (5, 2, 4), "cpu", causal=True)
    assert plan.cu_q.tolist() == [0, 3, 4, 8] and plan.cu_k.tolist() == [0, 5, 7, 11]
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32 and (plan.max_q, plan.max_k) == (4, 5)
    assert plan.cu_q.is_contiguous() and plan.cu_k.is_contiguous()


def test_a_plan_is_made_on_the_host_whatever_the_default_device():
    lengths, leaves = [4, 9, 2], some([4, 9, 2], [4, 9, 6])
    keys = torch.arange(19)
    with torch.device("meta"):  # any work there would fail, or have no result
        plan = varlen_plan(lengths, [4, 9, 6], "cpu", True, keys)
        assert plan.key_rows is None
        out = varlen_attention(**leaves, plan=plan)
    assert torch.equal(out, varlen_attention(**leaves, plan=varlen_plan(lengths, [4, 9, 6], "cpu", True)))


@pytest.fixture
def pretend(monkeypatch):
    """pretend(origin, package): as on an H100, where `flash_attn` is found in `origin`; runs on CPU tensors."""

    def choose(origin, package=None, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(module, "find_spec", lambda name: origin and SimpleNamespace(origin=origin.strip("-")))
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        module._backend.cache_clear()
        chosen = module._backend(torch.device("cuda"))
        monkeypatch.setattr(module, "_backend", lambda device: chosen)
        return backend_name("cuda")

    yield choose
    monkeypatch.undo()
    module._backend.cache_clear()


PLAN = varlen_plan([3, 1], [5, 2], "cpu", causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_the_package_flash_attn_is_called_as_it_wants_to_be(causal, pretend):
    def of_2_8_3(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None
    ):  # fmt: skip
        pass

    op = create_autospec(of_2_8_3, return_value="out")
    assert pretend("__init__.py", SimpleNamespace(__version__="2.8.3", flash_attn_varlen_func=op)) == "flash-attn 2.8.3"
    plan, leaves = varlen_plan([3, 1], [5, 2], "cpu", causal), some([3, 1], [5, 2], dtype=torch.bfloat16)
    assert varlen_attention(**leaves, plan=plan, scale=0.3) == "out"
    op.assert_called_once_with(
        *leaves.values(), plan.cu_q, plan.cu_k, 3, 5, softmax_scale=0.3, causal=causal, deterministic=False
    )
    assert varlen_attention(**some([3, 1], [5, 2]), plan=plan).dtype == torch.float32  # takes the plain way


@pytest.mark.parametrize("knows_gqa", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("origin", [None, "-"])  # no package, and a folder of flash-attn-4
def test_torchs_own_is_called_as_it_wants_to_be(origin, causal, knows_gqa, pretend, monkeypatch):
    def of_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        pass

    def of_2_13(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None
    ):  # fmt: skip
        pass

    op = create_autospec(of_2_13 if knows_gqa else of_2_11, return_value="out")
    monkeypatch.setattr(varlen, "varlen_attn", op)
    assert pretend(origin) == "torch varlen attention"
    plan, leaves = varlen_plan([3, 1], [5, 2], "cpu", causal), some([3, 1], [5, 2], dtype=torch.bfloat16)
    assert varlen_attention(**leaves, plan=plan) == "out"
    gqa = {"enable_gqa": True} if knows_gqa else {}
    window = (-1, 0) if causal else (-1, -1)
    op.assert_called_once_with(*leaves.values(), plan.cu_q, plan.cu_k, 3, 5, scale=8**-0.5, window_size=window, **gqa)


def test_the_installed_torch_takes_these_arguments(pretend, monkeypatch):
    op = create_autospec(varlen.varlen_attn, return_value="out")
    monkeypatch.setattr(varlen, "varlen_attn", op)
    pretend(None)
    assert varlen_attention(**some([3, 1], [5, 2], dtype=torch.bfloat16), plan=PLAN) == "out"


def test_keys_are_laid_out_for_flash_attention(pretend, monkeypatch):
    def check(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return varlen_attention_reference(q, k, v, cu_q.diff().tolist(), cu_k.diff().tolist(), True, scale)

    monkeypatch.setattr(varlen, "varlen_attn", check)
    pretend(None)
    keys = torch.tensor([0, 1, 2, 3, 4, 0, 1, 5])
    against_the_truth([3, 3], [5, 3], True, some([3, 3], [5, 3], dtype=torch.bfloat16, rows_k=6), keys=keys)


def test_old_gpus_and_cpus_take_the_padded_form(pretend):
    assert backend_name("cpu") == "torch SDPA"
    assert pretend("__init__.py", None, capability=(7, 5)) == "torch SDPA"
    assert varlen_attention(**some([3, 1], [5, 2], dtype=torch.float16), plan=PLAN).shape == (4, 4, 8)


def test_ampere_is_new_enough(pretend):
    assert pretend(None, capability=(8, 0)) == "torch varlen attention"


def test_a_broken_package_is_not_replaced(pretend):
    with pytest.raises(ImportError):
        pretend("__init__.py", None)


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "causal", "message"),
    [
        ([], [], True, "for each segment; got 0, 0"),
        ([1, 2], [1], True, "for each segment; got 2, 1"),
        ([1, 2, 0], [1, 2, 3], False, "queries and keys >= 1 in each segment; got 0 queries, 3 keys in segment 2"),
        ([1, 2], [0, 2], False, "got 1 queries, 0 keys in segment 0"),
        ([1, 3], [1, 2], True, "keys >= queries >= 1 in each segment; got 3 queries, 2 keys in segment 1"),
    ],
)
def test_wrong_lengths_are_named(lengths_q, lengths_k, causal, message):
    with pytest.raises(ValueError, match=message):
        varlen_plan(lengths_q, lengths_k, "cpu", causal)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.zeros(6, dtype=torch.int64), r"keys \[7\], int64, on the CPU; got \(6,\)"),
        (torch.zeros(7), "torch.float32"),
        (torch.zeros(7, dtype=torch.int64, device="meta"), "meta"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        varlen_plan([3, 1], [5, 2], "cpu", True, keys)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((4, 4, 8), (7, 2, 8), (7, 1, 8), r"got \(4, 4, 8\), \(7, 2, 8\), \(7, 1, 8\)"),
        ((4, 4, 8), (7, 3, 8), (7, 3, 8), "multiple of Hkv"),
        ((4, 4, 8), (7, 2, 4), (7, 2, 4), "Hq a multiple"),
        ((4, 8), (7, 2, 8), (7, 2, 8), r"\[Tq, Hq, D\]"),
        ((4, 4, 8), (7, 8), (7, 8), r"\[Tk, Hkv, D\]"),
        ((5, 4, 8), (7, 2, 8), (7, 2, 8), r"the plan's 4 queries and 7 keys; got \(5, 4, 8\)"),
        ((4, 4, 8), (8, 2, 8), (8, 2, 8), r"7 keys; got \(4, 4, 8\), \(8, 2, 8\)"),
    ],
)
def test_wrong_shapes_are_named(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), PLAN)


def test_wrong_tensors_are_named(pretend):
    leaves = some([3, 1], [5, 2])
    for wrong, message in {
        "k": "float32, torch.bfloat16, torch.float32",
        "v": "float32, torch.float32, torch.bfloat16",
    }.items():
        with pytest.raises(ValueError, match=message):
            varlen_attention(**leaves | {wrong: leaves[wrong].bfloat16()}, plan=PLAN)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        varlen_attention(**{name: x.double() for name, x in leaves.items()}, plan=PLAN)
    for name in leaves:
        with pytest.raises(ValueError, match=r"unit stride in D; got .*, 2\)"):
            varlen_attention(**leaves | {name: torch.stack([leaves[name]] * 2, -1)[..., 0]}, plan=PLAN)
        with pytest.raises(ValueError, match="one device"):
            varlen_attention(**leaves | {name: leaves[name].to("meta")}, plan=PLAN)
    pretend(None)
    for D in (12, 264):
        with pytest.raises(ValueError, match=f"a multiple of 8 and at most 256 in torch.bfloat16 on CUDA; got {D}"):
            varlen_attention(**some([3, 1], [5, 2], (4, 2, D), torch.bfloat16), plan=PLAN)
