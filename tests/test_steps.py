"""Whole steps as benchmarks run them, at small sizes. Nothing here looks at how fast anything was."""

import json
import shutil
import sys
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from bench import steps, timing
from bench.step_job import PHASES, Job, make_job
from bench.step_ours import OurSide
from bench.step_plain import PlainSide
from bench.step_rows import ExactLengths
from bench.step_table import RATES, Measured, render, summarise
from bench.step_trl import TrlSide, need_trl
from bench.step_workloads import WORKLOADS, AnswerLengths, find_workload
from bench.steps import Race, measure
from medground.plan.floors import refresh_bytes
from medground.sharding import join_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = steps.CLOSE["cuda"] if DEVICE == "cuda" else 1e-5
TEST = WORKLOADS["test"]._replace(device=DEVICE)


def test_lengths_are_those_of_the_step():
    answers = AnswerLengths(96, 0.4, 32, 224)
    assert answers.draw(2, 8, 3) == answers.draw(2, 8, 3) != answers.draw(2, 8, 4)
    many = [length for row in answers.draw(100, 100, 0) for length in row]
    assert min(many) == 32 and max(many) == 224 and abs(median(many) - 96) < 3


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), "test", TEST)


def test_the_plain_trainer_has_our_gradient(job, tmp_path, monkeypatch):
    with join_ranks() as ranks:
        ours, plain = OurSide(job, ranks), PlainSide(job)
        seconds = plain.step()
        theirs = plain.capture
        assert [[len(tokens) for tokens in row] for row in theirs.completions] == job.lengths(0)
        assert ours.compare(theirs) < CLOSE
        assert ours.compare(theirs._replace(advantages=theirs.advantages.flip(0))) > 0.3
        with pytest.raises(ValueError, match="want the same prompts on both sides"):
            ours.compare(theirs._replace(prompts=theirs.prompts.flip(0)))
        before = ours.asker.policy.vlm.lm_head.weight.full_tensor().detach().clone()
        mine = ours.step()
        assert list(seconds) == list(mine) == ["step", *PHASES]
        for found in (seconds, mine):
            assert found["step"] == pytest.approx(sum(found[phase] for phase in PHASES))
        assert not torch.equal(before, ours.asker.policy.vlm.lm_head.weight.full_tensor())
        assert ours.metrics["completion_tokens"] == sum(map(sum, job.lengths(0)))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert set(ours.save(tmp_path / "checkpoints").values()) == {None}


@pytest.mark.parametrize("peer", ["plain", "TRL", "TRL, whole logits"])
def test_adapters_have_our_gradient(peer, tmp_path):
    pytest.importorskip("peft")
    if peer != "plain":
        pytest.importorskip("trl")
        need_trl()
    job = make_job(tmp_path, "test", TEST._replace(lora_rank=4, checkpointing=True))
    with join_ranks() as ranks:
        ours, theirs = OurSide(job, ranks), steps.PEERS[peer](job, tmp_path / "peer")
        theirs.step()
        capture = theirs.capture
        assert ours.compare(capture) < CLOSE
        assert {name.rsplit(".lora_")[1][0] for name, grad in capture.grads.items() if grad.any()} == {"B"}
        missing = capture._replace(grads=dict(list(capture.grads.items())[1:]))
        with pytest.raises(ValueError, match=r"want the same weights trained on both sides; not so are \['model\."):
            ours.compare(missing)
        for side in (ours, theirs, ours):
            assert list(side.step()) == ["step", *PHASES]
        trained = sum(weight.numel() for weight in ours.asker.policy.parameters() if weight.requires_grad)
        adapted = ours.network.token_weights  # every matrix of the layers has an adapter
        item = ours.asker.whole.policy.vlm.dtype.itemsize
        assert refresh_bytes(ours.asker.policy, item) == 4 * trained + 2 * item * adapted
        theirs.close()
        ours.close()


def test_rows_end_where_they_are_to():
    marks = []
    exact = ExactLengths([1, 3], end=4, never=[2], on_first=lambda: marks.append("first"))
    scores = torch.zeros(2, 6)
    drawn = [exact(torch.zeros(2, 9), scores) for _ in range(3)]
    assert marks == ["first"] and not scores.any()
    for step, row, ends in ((0, 0, True), (0, 1, False), (1, 1, False), (2, 1, True)):
        allowed = drawn[step][row].isfinite().nonzero()[:, 0].tolist()
        assert allowed == ([4] if ends else [0, 1, 3, 5])


@pytest.mark.parametrize("run", ["take_turns", "one_after_another"])
def test_the_result_has_everything(job, tmp_path, monkeypatch, run):
    monkeypatch.setattr(Race, "take_turns", getattr(Race, run))
    monkeypatch.setattr(Race, "one_after_another", getattr(Race, run))
    monkeypatch.setattr(steps, "BARS", {"test": {"plain": 1e-9, "TRL": 1e9}})
    result = measure(job, tmp_path, 2, ["plain"])
    assert list(result["sides"]) == ["ours", "plain"]
    tokens = [sum(map(sum, job.lengths(step))) for step in range(4)]
    first = steps.WARM_UP[DEVICE]
    assert result["work"]["tokens"] == tokens[first : first + 2]
    for name, side in result["sides"].items():
        assert set(side["seconds"]) == {"step", *PHASES} and len(side["rounds"]) == 2
        assert side["peak_bytes"] > 1e4, name
        assert {"tokens_per_second", "of_products"} <= set(side["rates"]) <= set(RATES)
    assert result["floors"]["step"] == pytest.approx(sum(result["floors"][phase] for phase in PHASES))
    assert all(result["floors"][phase] > 0 for phase in ("prefill", "decode", "update", "optimizer"))
    assert [(bar["name"], bar["met"]) for bar in result["bars"]] == [("ours over plain", True)]
    assert result["checkpoint_seconds"] > result["checkpoint_stall_seconds"] > 0
    text = render(json.loads(json.dumps(result)))
    assert "| decode |" in text and "plain takes" in text and "EasyR1" in text


def test_a_peer_that_computes_something_else_is_refused(job, tmp_path, monkeypatch):
    loss = PlainSide._loss
    monkeypatch.setattr(PlainSide, "_loss", lambda *inputs: 2 * loss(*inputs))
    with pytest.raises(ValueError, match=r"plain: want gradients within 0\.\d+ of its own; got 5\.00e-01"):
        measure(job, tmp_path, 1, ["plain"])


def test_a_peer_that_cannot_run_says_why(job, tmp_path, monkeypatch):
    class Large:
        def __init__(self, *_):
            self.capture = None

        def step(self):
            raise torch.OutOfMemoryError("CUDA out of memory\nmore of it")

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(steps.PEERS, "plain", Large)
    monkeypatch.setattr(Race, "take_turns", Race.one_after_another)
    result = measure(job, tmp_path, 1, ["plain", "TRL"])
    assert result["sides"]["plain"] == {"failed": "CUDA out of memory"}
    text = render(result)
    assert "TRL: want datasets, accelerate, greenlet, trl; datasets is not installed: `make peers`" in text
    assert "plain: CUDA out of memory." in text


def test_rates_by_hand(job):
    B, (P, _, G, _) = len(job.examples), job.size
    seconds = [{"step": s, **dict.fromkeys(PHASES, s / 7)} for s in (2.0, 4.0)]
    ours = Measured(seconds, peak_bytes=1)
    theirs = Measured([{name: 3 * s for name, s in row.items()} for row in seconds], 0.0, 2, {"energy_joules": 8.0})
    work = {"tokens": [10, 20], "operations": [100.0, 200.0], "peak": 500.0, "product": 1000.0}
    mine, other = (summarise(job, name, side, ours, work) for name, side in (("ours", ours), ("plain", theirs)))
    assert mine["rates"] == {
        "tokens_per_second": 5.0,
        "processed_tokens_per_second": (B * P / 2 + 5 + B * P / 4 + 5) / 2,
        "unpacked_tokens_per_second": (G * B * P / 2 + 5 + G * B * P / 4 + 5) / 2,
        "samples_per_second": (B * G / 2 + B * G / 4) / 2,
        "of_products": 0.05,
        "mfu": 0.1,
    }
    assert other["rates"]["processed_tokens_per_second"] == pytest.approx(
        mine["rates"]["unpacked_tokens_per_second"] / 3
    )
    assert other["rates"]["mfu"] == pytest.approx(mine["rates"]["mfu"] / 3)
    assert other["rates"]["joules_per_1000_tokens"] == pytest.approx(1000 * 8 / 30)
    assert other["speedup"]["median"] == pytest.approx(3)


def test_what_the_gpu_did_is_in_the_table(job, tmp_path):
    result = measure(job, tmp_path, 1, [])
    assert "power" not in render(result)
    busy = {"power_watts": {"mean": 612.3}, "sm_clock_mhz": {"mean": None}, "energy_joules": 1.0}
    heat = {"reason": "thermal slowdown", "share": 0.25, "warning": True}
    result["sides"]["ours"]["gpu"] = busy | {"throttled": [heat], "marked": True}
    text = render(result)
    assert "| power, W | 612.3 |" in text and "SM clock" not in text
    assert "ours: throttled: thermal slowdown in 25 % of samples: times are not to be trusted" in text


def test_impossible_workloads(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"want a workload among test, .*; got '70b'"):
        find_workload("70b")
    with pytest.raises(ValueError, match="3b-h100: want cuda; a GPU is not visible"):
        find_workload("3b-h100")
    monkeypatch.setattr(sys, "argv", ["steps", "3b-h100"])
    with pytest.raises(SystemExit, match="a GPU is not visible"):
        steps.main()
    with pytest.raises(ValueError, match="test: want prompts a multiple of groups at once; got 3, 2"):
        make_job(tmp_path, "test", TEST._replace(prompts=3, groups_at_once=2))


@pytest.mark.parametrize("fused", [True, False])
def test_trl_has_our_gradient(job, tmp_path, fused):
    pytest.importorskip("trl")
    need_trl()
    with join_ranks() as ranks:
        ours, theirs = OurSide(job, ranks), TrlSide(job, tmp_path, fused)
        assert timing.peak_memory(timing.Turn(theirs.step)) > 1e5
        assert ours.compare(theirs.capture) < CLOSE
        assert [[len(tokens) for tokens in row] for row in theirs.capture.completions] == job.lengths(0)
        seconds = theirs.step()
        assert list(seconds) == ["step", *PHASES] and seconds["prefill"] > 0 < seconds["decode"]
        theirs.close()
        ours.close()


def test_an_error_of_trl_reaches_whoever_asked(job, tmp_path):
    pytest.importorskip("trl")
    need_trl()
    side = TrlSide(job, tmp_path)
    side._trainer.compute_loss = lambda *_, **__: timing.does_not_exist
    with pytest.raises(AttributeError, match="does_not_exist"):
        side.step()
    side.close()
