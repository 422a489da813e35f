"""Decoding over a shared prefix: against a loop over rows in float64, and what lies in a cache beyond its lengths."""

import pytest
import torch
from closeness import assert_as_close_as_pytorch
from torch.nn.functional import scaled_dot_product_attention

import medground_kernels.prefix_decode as module
from medground_kernels.prefix_decode import prefix_decode, prefix_decode_reference

pytestmark = pytest.mark.usefixtures("path")

CACHES = ("prefix_k", "prefix_v", "suffix_k", "suffix_v")
# heads Hq, Hkv, D; rows of each group; prefix lengths and P; suffix lengths and C
CASES = {
    "ragged": (6, 2, 16, [[4, 0, 7], [1, 2, 3, 5, 6], []], ([300, 131, 0], 300), ([0, 3, 69, 12, 33, 32, 1, 64], 70)),
    "one row, one key": (2, 2, 16, [[0]], ([1], 1), ([0], 1)),
    "whole blocks": (4, 4, 16, [[0, 1], [2]], ([256, 128], 256), ([64, 128, 0], 129)),
    "seven heads a key, two tiles": (14, 2, 32, [[2, 0, 1], [3]], ([150, 37], 200), ([5, 40, 5, 80], 81)),
    "alike": (4, 2, 64, [[0, 1], [2, 3]], ([129, 129], 140), ([33] * 4, 40)),
    "more members than a tile": (2, 1, 16, [[19, *range(18)], [18]], ([33, 20], 40), ([3] * 10 + [17] * 10, 20)),
}


def grid(groups):
    """members and places"""
    M = max(map(len, groups))
    members = torch.tensor([rows + [-1] * (M - len(rows)) for rows in groups])
    places = torch.zeros(sum(map(len, groups)), dtype=torch.int64)
    for place, row in enumerate(members.flatten().tolist()):
        if row >= 0:
            places[row] = place
    return {"members": members, "places": places}


def make(Hq, Hkv, D, groups, prefix, suffix, dtype=torch.float32):
    (prefix_lengths, P), (suffix_lengths, C) = prefix, suffix
    A, R = len(groups), len(suffix_lengths)
    torch.manual_seed(0)
    inputs = {"q": torch.randn(R, Hq, D) * 2, "k": torch.randn(R, Hkv, D), "v": torch.randn(R, Hkv, D)}
    for name, rows, length in ("prefix", A, P), ("suffix", R, C):
        # keys grow, so that the running maximum moves in the last block too
        inputs[f"{name}_k"] = torch.randn(rows, Hkv, length, D) * torch.linspace(0.3, 1.5, length)[:, None]
        inputs[f"{name}_v"] = torch.randn(rows, Hkv, length, D)
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    lengths = {"prefix_lengths": prefix_lengths, "suffix_lengths": suffix_lengths}
    return inputs | {name: torch.tensor(n, dtype=torch.int32) for name, n in lengths.items()} | grid(groups)


def run(op, inputs, dtype=None, **options):
    """Output and caches afterwards, on copies."""
    inputs = {name: t.clone() for name, t in inputs.items()}
    if dtype:
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return {"out": op(**inputs, **options)} | {name: inputs[name] for name in CACHES}


def assert_right(inputs, rows=slice(None), **options):
    ours = run(prefix_decode, inputs, **options)
    plain = run(prefix_decode_reference, inputs, **options)
    truth = run(prefix_decode_reference, inputs, torch.float64, **options)
    assert ours["out"].dtype == inputs["q"].dtype and not ours["out"].requires_grad
    for name in CACHES:
        assert torch.equal(ours[name], plain[name]), name
    outputs = [{"out": each["out"][rows]} for each in (ours, plain, truth)]
    assert outputs[2]["out"].isfinite().all()
    assert_as_close_as_pytorch(*outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_as_close_to_the_truth_as_pytorch(case, dtype, path):
    if path == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter multiplies bfloat16 matrices wrongly")
    assert_right(make(*CASES[case], dtype=dtype))


@pytest.mark.parametrize("constants", [{"PROGRAMS": 1}, {"LEAST_KEYS": 1}, {"KEY_BYTES": 1, "LEAST_KEYS": 17}])
def test_any_number_of_splits(constants, monkeypatch):
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    assert_right(make(4, 2, 16, [[1, 0], [2]], ([100, 65], 131), ([3, 20, 16], 24)))


def test_no_more_splits_than_needed(path, monkeypatch):
    if path == "torch":
        pytest.skip("it has no splits")
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **options: shapes.append(shape) or empty(shape, **options))
    inputs = make(4, 2, 16, [[1, 0], [2]], ([100, 65], 300), ([3, 20, 16], 24))
    prefix_decode(**inputs)
    monkeypatch.setattr(module, "PROGRAMS", 8)
    prefix_decode(**inputs)
    assert [shape[2] for shape in shapes if len(shape) == 5] == [3, 2]


def test_large_scores():
    inputs = make(4, 2, 16, [[1, 0]], ([70], 70), ([80, 7], 90))
    inputs["q"] *= 300
    assert_right(inputs)
    assert_right(inputs | {"q": -inputs["q"]})
    # all but the new token's are hopeless, then all but it
    for sign in 1, -1:
        assert_right(inputs | {"k": sign * inputs["q"][:, ::2]})


def test_the_scale_is_that_of_attention_unless_told():
    inputs = make(4, 2, 16, [[0, 1]], ([20], 20), ([5, 0], 8))
    assert torch.equal(prefix_decode(**inputs), prefix_decode(**inputs, scale=0.25))
    assert_right(inputs, scale=0.9)


def test_a_group_may_have_no_prefix():
    assert_right(make(4, 2, 16, [[0], [1]], ([0, 9], 9), ([5, 2], 8)))
    assert_right(make(4, 2, 16, [[0], [1]], ([0, 0], 9), ([5, 0], 8)))


def test_no_rows():
    inputs = make(4, 2, 16, [[0]], ([5], 5), ([3], 8))
    rows = {name: inputs[name][:0] for name in ("q", "k", "v", "suffix_k", "suffix_v", "suffix_lengths", "places")}
    assert prefix_decode(**inputs | rows).shape == (0, 4, 16)


def test_views_of_larger_caches():
    inputs = make(6, 2, 16, [[2, 0], [1]], ([40, 33], 40), ([5, 0, 19], 20))
    Hkv, D = 2, 16
    whole = {
        "prefix_k": torch.full((3, 4, Hkv, 50, D), torch.nan),
        "prefix_v": torch.full((50, 3, 4, Hkv, D), torch.nan),
        "suffix_k": torch.full((3, 5, Hkv, 30, D), torch.nan),
        "suffix_v": torch.full((30, 3, 5, Hkv, 2 * D), torch.nan),
    }
    views = {
        "prefix_k": whole["prefix_k"][1, 1:3, :, 3:43],
        "prefix_v": whole["prefix_v"][3:43, 1, 1:3].permute(1, 2, 0, 3),
        "suffix_k": whole["suffix_k"][1, 2:, :, 4:24],
        "suffix_v": whole["suffix_v"][4:24, 1, 2:, :, D:].permute(1, 2, 0, 3),
    }
    for name, view in views.items():
        view.copy_(inputs[name])
    projected = torch.cat([inputs["q"], inputs["k"], inputs["v"]], 1)  # [R, Hq + 2 Hkv, D]
    views |= dict(zip("qkv", projected.split([6, 2, 2], 1), strict=True))
    views["q"] = views["q"].transpose(0, 1).contiguous().transpose(0, 1)
    expected = run(prefix_decode, inputs)
    assert torch.equal(prefix_decode(**inputs | views), expected["out"])
    for name in CACHES:
        assert torch.equal(views[name], expected[name]), name
        assert whole[name].isfinite().sum() == inputs[name].numel()


@pytest.mark.parametrize("lengths", [[3, 3, 3], [0, 7, 4], [7, 8, 2], [9, 8, 2**30], [0, 0, 0]])
def test_writes_the_new_token_and_nothing_else(lengths):
    inputs = make(4, 2, 16, [[1, 0], [2]], ([20, 13], 20), (lengths, 8))
    before = {name: t.clone() for name, t in inputs.items()}
    prefix_decode(**inputs)
    for row, length in enumerate(lengths):
        if length < 8:
            before["suffix_k"][row, :, length] = before["k"][row]
            before["suffix_v"][row, :, length] = before["v"][row]
    for name, t in inputs.items():
        assert torch.equal(t, before[name]), name


def test_steps_are_attention_over_the_whole_sequence():
    groups, P, steps = [[0, 3], [2, 1]], 21, 5
    inputs = make(6, 2, 16, groups, ([P, P], P), ([0] * 4, steps))
    tokens = {name: torch.randn(steps, *inputs[name].shape) for name in "qkv"}
    outputs = []
    for step in range(steps):
        outputs.append(prefix_decode(**inputs | {name: t[step] for name, t in tokens.items()}))
        inputs["suffix_lengths"] += 1
    for row, group in enumerate([0, 1, 1, 0]):
        own = {name: t[:, row].transpose(0, 1) for name, t in tokens.items()}  # [H, steps, D]
        keys = torch.cat([inputs["prefix_k"][group], own["k"]], 1).double()
        values = torch.cat([inputs["prefix_v"][group], own["v"]], 1).double()
        mask = torch.ones(steps, P + steps, dtype=torch.bool).tril(P)
        whole = scaled_dot_product_attention(own["q"].double(), keys, values, attn_mask=mask, enable_gqa=True)
        got = torch.stack([out[row] for out in outputs], 1)
        assert (got - whole).abs().max() < 2e-6


@pytest.mark.parametrize("first", [[2, 0], [0, 2]])
@pytest.mark.parametrize("lengths", [[4, 20, 4, 0], [20, 25, 20, 19], [7, 21, 7, 7]])
def test_idle_rows_do_not_disturb_others(lengths, first):
    inputs = make(4, 2, 16, [first, [3, 1]], ([40, 33], 40), (lengths, 20))
    idle = inputs["suffix_lengths"] >= 20
    for name in ("q", "k", "v", "suffix_k", "suffix_v"):
        inputs[name][idle] = torch.nan
    # an idle row may belong to a group or to none, and then shares its place with a row before or behind it
    inputs["members"][1, 1] = -1
    inputs["places"][1] = 0
    ours, truth = run(prefix_decode, inputs), run(prefix_decode_reference, inputs, torch.float64)
    assert (ours["out"] - truth["out"])[~idle].abs().max() < 2e-6
    for name in ("suffix_k", "suffix_v"):
        assert ours[name][idle].isnan().all() and ours[name][~idle].isfinite().all()


@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("lengths", [[0, 3, 19, 12], [16, 16, 16, 16]])
def test_what_lies_behind_a_length_is_never_used(filling, lengths):
    inputs = make(4, 2, 16, [[2, 0], [3, 1], []], ([40, 33, 0], 60), (lengths, 20))
    for name in CACHES:
        count = inputs[f"{name[:-2]}_lengths"]
        behind = torch.arange(inputs[name].shape[2]) >= count[:, None]
        inputs[name].masked_fill_(behind[:, None, :, None], 0.0)
    expected = prefix_decode(**{name: t.clone() for name, t in inputs.items()})
    for name in CACHES:
        count = inputs[f"{name[:-2]}_lengths"]
        behind = torch.arange(inputs[name].shape[2]) >= count[:, None]
        inputs[name].masked_fill_(behind[:, None, :, None], filling)
    assert torch.equal(prefix_decode(**inputs), expected)


def test_a_nan_in_use_shows_in_its_rows_alone():
    inputs = make(4, 2, 16, [[2, 0], [3, 1]], ([40, 33], 40), ([0, 3, 19, 12], 20))
    inputs["prefix_v"][1, 0, 5] = torch.nan
    inputs["suffix_k"][2, 1, 18] = torch.nan
    found = prefix_decode(**inputs).isnan()
    expected = torch.zeros(4, 4, 16, dtype=torch.bool)
    expected[[3, 1], :2] = True
    expected[2, 2:] = True
    assert torch.equal(found, expected)


def test_it_has_no_gradient():
    inputs = make(4, 2, 16, [[0, 1]], ([20], 20), ([5, 0], 8))
    inputs["q"].requires_grad_()
    inputs["k"].requires_grad_()
    assert not prefix_decode(**inputs).requires_grad and not inputs["suffix_k"].requires_grad


def test_head_sizes(path):
    for D in (8, 24, 80, 128, 256):
        assert_right(make(4, 2, D, [[1, 0], [2]], ([70, 65], 80), ([3, 20, 16], 24)))
    inputs = make(2, 1, 264, [[0]], ([5], 7), ([2], 4))
    if path == "torch":
        assert_right(inputs)
    else:
        with pytest.raises(ValueError, match="want D up to 256; got 264"):
            prefix_decode(**inputs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, r"a multiple of Hkv.*got \[\(2, 3, 16\), \(2, 2, 16\)"),
        ({"q": torch.zeros(2, 64)}, r"got \[\(2, 64\)"),
        ({"k": torch.zeros(3, 2, 16)}, r"got \[\(2, 4, 16\), \(3, 2, 16\)"),
        ({"v": torch.zeros(2, 2, 32)}, r"\(2, 2, 32\)"),
        ({"prefix_v": torch.zeros(1, 2, 9, 16)}, r"\(1, 2, 9, 16\)"),
        ({"prefix_lengths": torch.zeros(2, dtype=torch.int32)}, r"prefix_lengths \[A\]"),
        ({"suffix_k": torch.zeros(3, 2, 8, 16)}, r"\(3, 2, 8, 16\)"),
        ({"suffix_lengths": torch.zeros(1, dtype=torch.int32)}, r"suffix_lengths \[R\]"),
        ({"members": torch.zeros(2, 2, dtype=torch.int64)}, r"members \[A, M\]"),
        ({"members": torch.zeros(1, 0, dtype=torch.int64)}, "nothing but R 0"),
        ({"places": torch.zeros(1, dtype=torch.int64)}, r"places \[R\]"),
        ({"v": torch.zeros(2, 2, 16, dtype=torch.float16)}, "all alike; got .*float16"),
        ({"suffix_v": torch.zeros(2, 2, 8, 16, dtype=torch.float64)}, "all alike; got .*float64"),
        ({"prefix_lengths": torch.zeros(1, dtype=torch.int64)}, "want lengths int32.*got .*int64"),
        ({"places": torch.zeros(2, dtype=torch.int32)}, "members, places int64; got .*int32"),
        ({"q": torch.zeros(2, 16, 4).mT}, r"unit stride in D; got \[\(64, 1, 4\)"),
        ({"places": torch.zeros(4, dtype=torch.int64)[::2]}, "want contiguous"),
        ({"k": torch.zeros(2, 2, 16, device="meta")}, "want all tensors on one device"),
        ({"members": torch.zeros(1, 2, dtype=torch.int64, device="meta")}, "want all tensors on one device"),
    ],
)
def test_mistakes_are_named(wrong, message):
    inputs = make(4, 2, 16, [[0, 1]], ([20], 20), ([5, 0], 8))
    wrong = {name: t if t.is_meta else t.to(inputs["q"].device) for name, t in wrong.items()}
    with pytest.raises(ValueError, match=message):
        prefix_decode(**inputs | wrong)


def test_a_cpu_sees_prefixes_that_are_too_long(path):
    if path == "triton":
        pytest.skip("a GPU would have to be waited for")
    with pytest.raises(ValueError, match="up to P = 20; got 21"):
        prefix_decode(**make(4, 2, 16, [[0, 1]], ([21], 20), ([5, 0], 8)))
