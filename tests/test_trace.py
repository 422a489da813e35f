"""Traces of made-up events: kernels by phase and kind, the time line, idle time and its causes, memory."""

import random
import re
from pathlib import Path

import pytest

from medground_kernels import token_logprob
from profiles.groups import GROUPS, group_of
from profiles.trace import Event, Phase, counts, cut_into_phases, idle, kernels, memory_curve, timeline


@pytest.mark.parametrize(
    "name, group",
    {
        "aten::addmm": "GEMM",
        "nvjet_tst_64x8_64x16": "GEMM",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "GEMM",
        "void flash_fwd_kernel<cutlass>": "attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "ncclDevKernel_AllGather_RING_LL": "communication",
        "Memcpy HtoD (Pinned -> Device)": "copy",
        "aten::copy_": "copy",
        "aten::_local_scalar_dense": "synchronisation",
        "cudaStreamSynchronize": "synchronisation",
        "aten::_fused_adamw_": "optimizer",
        "aten::_fused_rms_norm": "norm and elementwise",
        "triton_poi_fused_mul_silu_0": "norm and elementwise",
        "aten::mul": "norm and elementwise",
        "aten::silu_backward": "norm and elementwise",
        "MmBackward0": "host",
        "autograd::engine::evaluate_function: MmBackward0": "host",
        "Optimizer.step#AdamW.step": "host",
    }.items(),
)
def test_groups(name, group):
    assert group_of(name) == group and group in GROUPS


def test_every_kernel_of_ours_has_a_group_and_a_name_of_its_own():
    names = [
        name
        for path in Path(token_logprob.__file__).parent.glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    ]
    assert len(names) == len(set(names)) > 15
    assert {group_of(name) for name in names} == {"attention", "loss", "sampling"}


def test_operators_count_without_those_that_they_call():
    events = [
        Event("aten::linear", 0, 100),
        Event("aten::mm", 10, 70, flops=8),
        Event("aten::add", 70, 90),
        Event("aten::mm", 120, 150, flops=2),
        Event("aten::mm", 20, 60, thread=1, flops=1),
        Event("aten::mul", 500, 600),
    ]
    found = {(k.name, k.phase): k for k in kernels(events, [Phase("a", 0, 110), Phase("b", 110, 200)])}
    assert {key: (k.calls, round(k.seconds * 1e9), k.flops) for key, k in found.items()} == {
        ("aten::linear", "a"): (1, 20, 0),
        ("aten::mm", "a"): (2, 100, 9),
        ("aten::add", "a"): (1, 20, 0),
        ("aten::mm", "b"): (1, 30, 2),
    }


def test_phases_that_interrupt_others():
    ends = [("data", 10), ("decode", 50), ("update", 60)]
    assert cut_into_phases(0, ends, [Phase("prefill", 12, 20), Phase("prefill", 30, 50)]) == [
        Phase("data", 0, 10), Phase("decode", 10, 12), Phase("prefill", 12, 20), Phase("decode", 20, 30),
        Phase("prefill", 30, 50), Phase("decode", 50, 50), Phase("update", 50, 60),
    ]  # fmt: skip


def test_on_a_gpu_only_its_kernels_count():
    events = [Event("aten::mm", 0, 50), Event("gemm", 30, 80, on_device=True), Event("gemm", 90, 95, on_device=True)]
    (only,) = kernels(events, [Phase("a", 0, 100)])
    assert (only.name, only.calls, round(only.seconds * 1e9)) == ("gemm", 2, 55)


def test_why_a_gpu_was_idle():
    us = 1000
    events = [
        Event("k", 0, 100 * us, on_device=True),
        Event("cudaStreamSynchronize", 20 * us, 101 * us),
        Event("cudaLaunchKernel", 125 * us, 130 * us),
        Event("k", 140 * us, 200 * us, on_device=True),  # 40 after a wait
        Event("cudaLaunchKernel", 150 * us, 155 * us),
        Event("k", 203 * us, 300 * us, on_device=True),  # 3 though launched long before
        Event("k2", 290 * us, 350 * us, on_device=True),
        Event("cudaLaunchKernel", 380 * us, 390 * us),
        Event("k", 400 * us, 410 * us, on_device=True),  # 50 for the host's sake
    ]
    found = {name: round(seconds * 1e6) for name, seconds in idle(events, 0, 420 * us).items()}
    assert found == {"busy": 317, "synchronisation": 40, "host late": 50, "launch gap": 13}
    assert counts([*events, Event("Memcpy DtoH (Device -> Pageable)", 0, 1, on_device=True)]) == {
        "launches": 3, "synchronisations": 1, "copies between host and device": 1
    }  # fmt: skip


def test_memory_over_time():
    changes = [(5, 1000), (12, 10), (14, 20), (18, -20), (35, 7), (99, 5)]
    assert memory_curve(changes, 10, 50, points=4) == [[1e-8, 30], [2e-8, 10], [3e-8, 17], [4e-8, 17]]


def test_the_time_line_of_a_cpu_has_own_times():
    events = [
        Event("aten::linear", 0, 100),
        Event("aten::mul", 10, 70),
        Event("aten::copy_", 70, 90),
        Event("aten::mul", 20, 60, thread=1),
        Event("aten::mul", 95, 130),  # beyond the operator that it began in, and beyond the step
        Event("autograd::none", -10, 0),
    ]
    found = timeline(events, [Phase("a", 0, 60), Phase("b", 60, 60), Phase("a", 60, 100)], 0, 100, bins=4)
    assert found["phases"] == [["a", 0.0, 6e-8], ["a", 6e-8, 1e-7]]
    in_ns = {group: [round(seconds * 1e9) for seconds in bins] for group, bins in found["work"].items()}
    assert in_ns == {
        "GEMM": [10, 0, 0, 5],
        "copy": [0, 0, 5, 15],
        "norm and elementwise": [15 + 5, 25 + 25, 20 + 10, 5],
    }  # fmt: skip


def test_the_time_line_of_a_gpu_has_its_kernels():
    events = [
        Event("aten::mm", 0, 50),
        Event("gemm", 30, 80, on_device=True, thread=7),
        Event("nccl", 60, 90, on_device=True, thread=8),
    ]
    found = timeline(events, [Phase("a", 0, 100)], 0, 100, bins=2)
    in_ns = {group: [round(seconds * 1e9) for seconds in bins] for group, bins in found["work"].items()}
    assert in_ns == {"communication": [0, 30], "GEMM": [20, 30]}


def test_a_time_line_shares_out_every_nanosecond():
    draw = random.Random(0)
    for _ in range(200):
        span, bins = draw.randint(1, 300), draw.randint(1, 40)
        at = sorted(draw.randint(-20, span + 20) for _ in range(2))
        wanted = [0] * bins
        for nanosecond in range(max(at[0], 0), min(at[1], span)):
            wanted[nanosecond * bins // span] += 1
        work = timeline([Event("aten::mm", *at)], [], 0, span, bins)["work"]
        assert [round(seconds * 1e9) for seconds in work.get("GEMM", [0.0] * bins)] == wanted


def test_kernels_and_time_line_add_up_to_the_same():
    draw = random.Random(1)
    events = []
    for thread in range(3):
        for _ in range(40):
            start = draw.randint(0, 900)
            events.append(Event(f"aten::op{draw.randint(0, 5)}", start, start + draw.randint(1, 100), thread=thread))
    whole = [Phase("a", 0, 1000)]
    busy = sum(map(sum, timeline(events, whole, 0, 1000, bins=7)["work"].values()))
    assert busy == pytest.approx(sum(kernel.seconds for kernel in kernels(events, whole)))
