"""Profiles of whole steps and their comparison: synthetic traces, and changes planted into a real step."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench.step_ours
import medground.rollout.cache
from medground_kernels import token_logprob
from medground_kernels.prefix_decode import prefix_decode_reference
from profiles import compare as module
from profiles.compare import Comparison, compare, load, render
from profiles.groups import GROUPS, group_of
from profiles.page import render_page
from profiles.record import PHASES, OtherLoad, record
from profiles.tables import phase_table
from profiles.trace import Event, Phase, counts, cut_into_phases, idle, kernels, memory_curve

MS = 1_000_000


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


def made_up(scale: float = 1.0, noise: int = 0) -> dict:
    generator = torch.Generator().manual_seed(noise)
    seconds = {phase: (1 + 0.05 * torch.rand(5, generator=generator)).tolist() for phase in PHASES}
    seconds["update"] = [scale * s for s in seconds["update"]]
    mm = {"name": "aten::mm", "group": "GEMM", "phase": "update", "calls": 10, "seconds": 0.5, "flops": 100}
    return {
        "format": 1,
        "workload": {"name": "made up"},
        "others_cores": 0.0,
        "environment": {"device": "a CPU", "on": "cpu", "date": "today", "commit": "a"},
        "phases": seconds,
        "step": [sum(step) for step in zip(*seconds.values(), strict=True)],
        "rates": {"tokens_per_second": 5.0},
        "traced": {
            "kernels": [mm, mm | {"phase": "decode"}],
            "counts": {"launches": 3},
            "idle": None,
            "memory": [[0.1, 5], [0.2, 9]],
        },
    }


def changed(found: Comparison) -> list[str]:
    return [change.name for change in found.times if change.real]


def test_noise_is_no_change_and_a_slower_phase_is_one():
    for noise in range(10):
        found = compare(made_up(), made_up(noise=noise))
        assert not found.is_change and "No change." in render(found)
    assert changed(compare(made_up(), made_up(1.4))) == ["update"]
    assert changed(compare(made_up(1.4), made_up())) == ["update"]
    assert changed(compare(made_up(), made_up(1.2))) == []
    assert changed(compare(made_up(), made_up(1.2), threshold=0.1)) == ["update"]
    overlapping = made_up(1.4)
    overlapping["phases"]["update"][0] = 1.0
    assert changed(compare(made_up(), overlapping)) == []


def test_other_work_is_a_change_however_small():
    after = made_up()
    rows = after["traced"]["kernels"]
    rows[0] = rows[0] | {"calls": 11}
    rows[1] = rows[1] | {"name": "aten::bmm"}
    after["traced"]["counts"] = {"launches": 4}
    found = compare(made_up(), after)
    assert [(w.phase, w.group, w.calls) for w in found.work] == [("update", "GEMM", (10, 11))]
    assert {(w.phase, w.kernel, w.calls) for w in found.kernels} == {
        ("update", "aten::mm", (10, 11)), ("decode", "aten::mm", (10, 0)), ("decode", "aten::bmm", (0, 10))
    }  # fmt: skip
    assert found.counts == {"launches": (3, 4)} and found.is_change
    text = render(found)
    assert "| update | GEMM | **all** | 10 -> 11 |" in text and "0 -> 10 (new)" in text and "10 -> 0 (gone)" in text


def test_other_workloads_and_devices_are_refused():
    after = made_up()
    after["environment"] |= {"device": "another CPU", "commit": "b", "date": "tomorrow"}
    with pytest.raises(ValueError, match=r"two profiles of one device .*got a CPU and another CPU"):
        compare(made_up(), after)
    found = compare(made_up(), after, anyway=True)
    assert found.environment == {"device": ("a CPU", "another CPU"), "commit": ("a", "b")}
    assert "Environment: commit a -> b" in render(found)
    with pytest.raises(ValueError, match="two profiles of one workload"):
        compare(made_up(), made_up() | {"workload": {"name": "other"}})


def test_the_page_needs_nothing_else_and_escapes():
    result = made_up()
    result["traced"]["seconds"] = dict.fromkeys(PHASES, 1.0)
    result["traced"]["kernels"][0]["name"] = "void f<script>alert(1)</script>"
    page = render_page(result | {"others_cores": 2.0})
    assert "<script" not in page and "http" not in page and "f&lt;script&gt;" in page
    assert page.count('class="row"') == len(PHASES) and "2 cores" in page
    assert len(page) < 2e6


def test_a_busy_machine_is_told():
    found = compare(made_up(), made_up() | {"others_cores": 1.5})
    assert found.warnings == ["After: Other processes used 1.5 cores meanwhile: times are not to be trusted."]
    assert found.warnings[0] in render(found)
    assert "1.5 cores" in phase_table(made_up() | {"others_cores": 1.5})
    assert "cores" not in phase_table(made_up()) + phase_table(made_up() | {"others_cores": None})


def test_other_load_is_seen():
    load = OtherLoad()
    burn = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        end = time.perf_counter() + 3
        while time.perf_counter() < end:
            sum(range(1000))
    finally:
        burn.kill()
        burn.wait()
    cores = load.cores()
    assert cores is None or cores > 0.3


def test_the_command_fails_where_it_is_told_to(tmp_path, monkeypatch, capsys):
    for name, scale in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "profile.json").write_text(json.dumps(made_up(scale)))

    def status(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["profiles.compare", *map(str, words)])
        try:
            module.main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
        return 0

    a, b = tmp_path / "a", tmp_path / "b" / "profile.json"
    assert status(a, b) == 0
    assert "| update |" in capsys.readouterr().out
    assert status(a, b, "--fail-over", "5%") == 1
    assert status(b, a, "--fail-over", "5%") == 0
    assert status(a, b, "--fail-over", "0.6") == 0
    assert status(a, b, "--fail-over", "much") == 2
    assert status(a, tmp_path / "none") == 2
    assert "want a profile written by profiles.record" in capsys.readouterr().err
    (tmp_path / "a" / "profile.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match="want a profile of format 1; got 7"):
        load(a)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the workload is a CPU's")


@pytest.fixture(scope="module")
def plain_profile(tmp_path_factory) -> dict:
    return record("test", tmp_path_factory.mktemp("profile") / "new", steps=3)


@no_gpu
def test_a_recorded_step(plain_profile):
    assert list(plain_profile["phases"]) == list(PHASES)
    assert all(len(seconds) == 3 for seconds in plain_profile["phases"].values())
    rows = plain_profile["traced"]["kernels"]
    for phase, group in (("prefill", "attention"), ("decode", "GEMM"), ("update", "GEMM"), ("update", "optimizer")):
        assert any((row["phase"], row["group"]) == (phase, group) for row in rows), (phase, group)
    traced = plain_profile["traced"]
    own = sum(row["seconds"] for row in rows)
    assert 0.1 * sum(traced["seconds"].values()) < own
    assert max(held for _, held in traced["memory"]) > 1e5
    assert "| update |" in phase_table(plain_profile)


@no_gpu
def test_the_same_tree_does_the_same_work(plain_profile, tmp_path):
    found = compare(plain_profile, record("test", tmp_path, steps=3), threshold=1e9)
    assert not found.is_change, render(found)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"page.html", "profile.json", "trace.json.gz"}
    assert load(tmp_path)["workload"] == plain_profile["workload"]


def synchronise_in_the_inner_loop(monkeypatch):
    step = medground.rollout.cache.Cache._step

    def slower(self, rows, berths, sampling):
        step(self, rows, berths, sampling)
        self._token[0].item()

    monkeypatch.setattr(medground.rollout.cache.Cache, "_step", slower)


def double_the_head(monkeypatch):
    loss = bench.step_ours.train.Policy.loss

    def slower(self, packed, *args, **kwargs):
        hidden = self._scored(packed).detach()
        hidden @ self.vlm.lm_head.weight.detach().T
        return loss(self, packed, *args, **kwargs)

    monkeypatch.setattr(bench.step_ours.train.Policy, "loss", slower)


def a_reference_for_a_kernel(monkeypatch):
    monkeypatch.setattr(medground.rollout.cache, "prefix_decode", prefix_decode_reference)


@no_gpu
@pytest.mark.parametrize(
    "plant, phase, group",
    [
        (synchronise_in_the_inner_loop, "decode", "synchronisation"),
        (double_the_head, "update", "GEMM"),
        (a_reference_for_a_kernel, "decode", "GEMM"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_slowdown_is_found_in_its_place(plain_profile, tmp_path, monkeypatch, plant, phase, group):
    plant(monkeypatch)
    found = compare(plain_profile, record("test", tmp_path, steps=3), threshold=1e9)
    assert {work.phase for work in found.work} == {phase}, render(found)
    (work,) = [work for work in found.work if work.group == group]
    assert work.calls[1] > work.calls[0]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="want an empty folder or an older profile"):
        record("test" if not torch.cuda.is_available() else "3b-h100", tmp_path)


@no_gpu
def test_a_workload_of_a_gpu_needs_one(tmp_path):
    with pytest.raises(ValueError, match="3b-h100: want cuda; a GPU is not visible"):
        record("3b-h100", tmp_path)
