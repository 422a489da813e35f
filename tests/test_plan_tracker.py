"""Bytes that are followed, against bytes counted by hand."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from medground.plan.tracker import Tracker

MB = 1 << 20


def made(megabytes: float) -> torch.Tensor:
    return torch.empty(int(megabytes * MB), dtype=torch.uint8, device="meta")


def test_what_lives_and_what_lived_at_most():
    with Tracker() as tracker:
        tracker.begin("first")
        with tracker.label("a"):
            a = made(3)
        with tracker.label("b"):
            b = made(2)
        del a
        tracker.begin("second")
        view, c = b[: MB // 2], made(0.5)
        del b
        tracker.end()
        assert tracker.live == {"a": 0, "b": 2 * MB, "other": MB // 2}
        del view, c
        assert not any(tracker.live.values())
    assert tracker.peaks["first"] == (5 * MB, {"a": 3 * MB, "b": 2 * MB})
    assert tracker.peaks["second"] == (int(2.5 * MB), {"b": 2 * MB, "other": MB // 2})


def test_a_phase_that_comes_again_keeps_its_higher_peak():
    with Tracker() as tracker:
        for size in (2, 3, 1):
            tracker.begin("phase")
            del_me = made(size)
            del del_me
        tracker.end()
    assert tracker.peaks == {"phase": (3 * MB, {"other": 3 * MB})}


def test_a_grain_and_another_label():
    with Tracker(512) as tracker:
        t = torch.empty(100, device="meta")  # 400 bytes
        assert tracker.live == {"other": 512}
        tracker.relabel(t, "kept")
        assert tracker.live == {"other": 0, "kept": 512}
        with tracker.label("in place"):
            t.add_(1)
        assert tracker.live == {"other": 0, "kept": 512}


def test_resized_storages_are_followed():
    with Tracker() as tracker:
        t = made(4)
        t.untyped_storage().resize_(0)
        assert tracker.live["other"] == 0
        t.untyped_storage().resize_(MB)
        assert tracker.live["other"] == MB
    assert torch.UntypedStorage.resize_ is torch.UntypedStorage.__mro__[1].resize_


def test_the_host_is_not_followed():
    with Tracker() as tracker:
        host = torch.zeros(MB)
        assert not tracker.live
        device = host.to("meta")
        assert tracker.live["other"] == device.nbytes == 4 * MB


def test_what_is_nowhere_yet_does_not_count():
    with Tracker() as tracker:
        with torch.device("meta"):
            layer = nn.Linear(256, 1024, bias=False)
        layer.to(torch.bfloat16)
        twice = layer.weight.new_zeros(2)
        assert not tracker.live
        layer.to_empty(device="meta")
        assert tracker.live["other"] == 256 * 1024 * 2 and twice.is_meta


def test_results_of_alike_operations_are_as_torch_makes_them():
    """What is remembered by shape gives the same shapes and strides, and views stay views."""
    x = torch.empty(6, 8, device="meta")
    calls = {
        "transposed product": lambda: x.t() @ x,
        "another dtype": lambda: x.to(torch.bfloat16),
        "the same dtype": lambda: x.to(torch.float32),
        "two results": lambda: x.max(1),
        "one number or another": lambda: x.sum() + x.mean(),
        "of a list": lambda: torch.cat([x, x.t().contiguous().view(6, 8)]),
        "a view": lambda: torch.ops.aten._unsafe_view(x, [48]),
    }
    for name, call in calls.items():
        want = call()
        with Tracker():
            for got in (call(), call()):
                for a, b in zip(_flat(want), _flat(got), strict=True):
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
            if name == "a view":
                assert got.untyped_storage()._cdata == x.untyped_storage()._cdata


def _flat(value):
    return value if isinstance(value, tuple) else (value,)


def test_scalars_of_one_value_and_different_types_are_different_operations():
    x = torch.empty(4, dtype=torch.int64, device="meta")
    with Tracker():
        assert [(x * 2).dtype, (x * 2.0).dtype, (x * True).dtype] == [torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_live_until_their_gradient_is_there(recompute: bool):
    n = 512
    with Tracker() as tracker:
        weights = [torch.empty(n, n, device="meta", requires_grad=True) for _ in range(4)]

        def layer(x, w):
            return (x @ w).relu()

        x = torch.empty(n, n, device="meta")
        with tracker.label("activations"):
            for w in weights:
                x = checkpoint(layer, x, w, use_reentrant=False) if recompute else layer(x, w)
        square = n * n * 4
        # of each layer its result: what relu's gradient and the next product want is the same
        assert tracker.live["activations"] == 4 * square
        before = tracker.live["other"]
        with tracker.label("backward"):
            x.sum().backward()
        del x
        assert tracker.live["activations"] == 0 and tracker.live["other"] == before - square, "the input too"
        assert tracker.live["backward"] == 4 * square, "gradients"


def test_dtensors_count_what_this_rank_holds():
    from medground.plan.pretend import pretend

    tracker = Tracker()
    with pretend(4, cuda=False, tracker=tracker) as ranks:
        local = torch.empty(8, 16, device="meta")
        whole = DTensor.from_local(local, ranks.mesh)
        before = tracker.live["other"]
        zeros = torch.zeros_like(whole)
        assert zeros.shape == (8, 16) and tracker.live["other"] - before == 8 * 16 * 4
        with tracker.label("sum"):
            (whole + zeros).sum().full_tensor()
        assert tracker.live["sum"] <= 64
