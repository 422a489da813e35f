"""Our update beside DeepSpeed's, at small size. Nothing here looks at how fast anything was."""

import json
import subprocess
import sys
import types

import pytest
import torch
from torch.nn import functional

from bench import zero, zero_worker
from bench.race import UnavailableError
from bench.zero import LaunchError, launch, measure, race, render
from bench.zero_deepspeed import DeepSpeed, need_deepspeed
from bench.zero_sides import Ours, OursUnpacked, Update, make_work, master_weights
from bench.zero_worker import OURS, UNPACKED, ZERO, Agreement, Found, Job, compare, run
from medground.sharding import join_ranks

CLOSE = 0.1 if torch.cuda.is_available() else 1e-5
JOB = Job("tiny", prompts=2, groups_at_once=1, checkpointing=False, rounds=2, sides=[OURS, UNPACKED])


def alone(job: Job, ranks: int = 1, device: str = "cpu") -> dict[str, Found]:
    """A job in this process."""
    with join_ranks() as joined:
        return run(job, joined)


def test_packed_and_padded_rows_update_the_same():
    found = alone(JOB)
    ours, rows = found[OURS], found[UNPACKED]
    gap = compare({name: side.updates for name, side in found.items()}, CLOSE)
    assert max(gap) <= CLOSE
    assert abs(ours.updates[0].loss - ours.updates[1].loss) > 1e-2, "the second update does not tell of the first"
    with join_ranks() as ranks:
        parameters = master_weights(make_work("tiny", ranks, 1, 1, False), ranks).num_parameters()
    for side in (ours, rows):
        assert 12 * parameters <= side.held < 20 * parameters, "weights and two moments, float32"
        assert len(side.seconds) == JOB.rounds and side.peak > 4 * parameters and side.failed is None
    assert rows.peak > ours.peak


def test_checkpointing_and_micro_batches_change_nothing():
    plain = alone(JOB._replace(groups_at_once=2, rounds=0))
    recomputed = alone(JOB._replace(checkpointing=True, rounds=0))
    for name, side in plain.items():
        assert max(compare({"plain": side.updates, "recomputed": recomputed[name].updates}, CLOSE)) <= CLOSE


class Forgetful(OursUnpacked):
    """Never moves its weights."""

    def __init__(self, work, ranks):
        super().__init__(work, ranks)
        self.optimizer.param_groups[0]["lr"] = 0.0


class Opposite(OursUnpacked):
    """Wants the opposite."""

    def __init__(self, work, ranks):
        super().__init__(work._replace(rows=[b._replace(advantages=-b.advantages) for b in work.rows]), ranks)


@pytest.mark.parametrize("side, update", [(Forgetful, 2), (Opposite, 1)])
def test_a_side_that_computes_something_else_is_refused(monkeypatch, side, update):
    monkeypatch.setitem(zero_worker.MAKERS, UNPACKED, side)
    monkeypatch.setitem(zero_worker.CLOSE, "cuda", 1e-3)
    with pytest.raises(
        ValueError, match=rf"want all sides to agree within .*; update {update}: .* of ours, {UNPACKED} "
    ):
        alone(JOB)


def test_compare():
    ours = [Update(0.5, 2.0), Update(0.4, 1.0)]
    near = [Update(0.5, 2.0), Update(0.42, 1.25)]
    assert compare({"ours": ours}, 0.0) == Agreement(0.0, 0.0)
    assert compare({"ours": ours, "theirs": near, "same": ours}, 0.3) == pytest.approx((0.02, 0.2))
    for wrong in (Update(0.4, 1.5), Update(0.9, 1.0), Update(float("nan"), 1.0), Update(0.4, float("nan"))):
        with pytest.raises(ValueError, match="update 2"):
            compare({"ours": ours, "theirs": [ours[0], wrong]}, 0.3)


def test_groups_that_do_not_fill_micro_batches_are_refused():
    with join_ranks() as ranks, pytest.raises(ValueError, match="want prompts a multiple of groups at once; got 3, 2"):
        make_work("tiny", ranks, 3, 2, False)


def test_turns_go_to_and_fro(monkeypatch):
    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def update(self):
            order.append(self.name)
            return Update(0.5, 1.0)

    monkeypatch.setattr(zero_worker, "make_work", lambda *_: None)
    for name in JOB.sides:
        monkeypatch.setitem(zero_worker.MAKERS, name, lambda _, __, name=name: Recorder(name))
    found = alone(JOB._replace(rounds=3))
    compared, memory = [OURS, OURS, UNPACKED, UNPACKED], [OURS, UNPACKED]
    assert order == [*compared, OURS, UNPACKED, UNPACKED, OURS, OURS, UNPACKED, *memory]
    assert [len(side.seconds) for side in found.values()] == [3, 3]


def test_a_missing_peer_is_told_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(zero, "launch", alone)
    result = measure(JOB._replace(sides=[OURS, *ZERO.values()]), [1], "cpu")
    assert set(result["seconds"]["1"]) == {OURS} and not result["bars"]
    json.dumps(result)
    for name in ZERO.values():
        assert f"| 1 | {name}: deepspeed is not installed: `make peers`, then PYTHONPATH=peers | - |" in render(result)


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    def fail():
        raise RuntimeError("Error building extension 'op': [1/3] c++ -MMD\n/bin/sh: 1: c++: not found")

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(__file__="/peers/deepspeed/__init__.py"))
    monkeypatch.setitem(sys.modules, "deepspeed.comm", types.ModuleType("deepspeed.comm"))
    monkeypatch.setitem(sys.modules, "deepspeed.comm.torch", types.SimpleNamespace(build_shm_op=fail))
    monkeypatch.setenv("PATH", "/bin")
    with pytest.raises(UnavailableError, match=r"wants a C\+\+ compiler and ninja: Error building extension 'op'$"):
        need_deepspeed()


class Engine:
    """What we take DeepSpeed's engine for, on one rank: gradients are means over micro-batches."""

    def __init__(self, model, optimizer, config):
        self.model, self.optimizer, self.steps, self.linear = model, optimizer, 0, functional.linear
        self.batches, self.limit = config["gradient_accumulation_steps"], config["gradient_clipping"]

    def __call__(self, batch):
        assert functional.linear is self.linear
        return self.model(batch)

    def backward(self, loss):
        (loss / self.batches).backward()

    def step(self):
        self.steps += 1
        if self.steps % self.batches == 0:
            self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return self.norm


def test_an_engine_computes_the_same_and_leaves_torch_as_it_was(monkeypatch):
    plain = functional.linear

    def initialize(model, optimizer, config):
        functional.linear = lambda *args: plain(*args)  # as ZeRO-3 does
        return Engine(model, optimizer, config), None

    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(functional, "linear", plain)
    with join_ranks() as ranks:
        work = make_work("tiny", ranks, 2, 1, False)
        sides = {"ours": Ours(work, ranks), "theirs": DeepSpeed(work, ranks, 3)}
        assert functional.linear is plain
        # no half precision in this engine: on a GPU the two differ
        compare({name: [side.update(), side.update()] for name, side in sides.items()}, CLOSE)
        assert functional.linear is plain


def fake(*seconds: float) -> Found:
    return Found(None, [Update(0.5, 1.0)] * 2, 10, 20, list(seconds))


def test_the_table_and_its_bars(monkeypatch):
    found = {OURS: fake(1, 2, 1), UNPACKED: fake(2, 2, 2), ZERO[2]: fake(0.5, 1, 4), ZERO[3]: fake(3, 8, 2)}
    monkeypatch.setattr(zero, "launch", lambda job, ranks, device: found)
    result = measure(JOB._replace(model="small", sides=list(found)), [1, 2], "cpu")
    assert result["speedups"]["2"][ZERO[3]] == {"median": 3.0, "least": 2.0, "most": 4.0, "fastest": 2.0}
    assert result["unpacked"]["2"][ZERO[2]]["median"] == 0.5
    assert [(bar["name"], bar["measured"], bar["met"]) for bar in result["bars"]] == [
        ("update, 1 rank", "3.00x", True), ("update, 2 ranks", "3.00x", True),
    ]  # fmt: skip
    text = render(result)
    assert "| 2 | DeepSpeed ZeRO-3 | 3 | 3.00 | 2.00 to 4.00 | 1.50 | 1e-05 | 2e-05 |" in text
    json.dumps(result)


def test_apart_a_peer_may_fail_and_ours_may_not(monkeypatch):
    def only(name):
        def launch(job, ranks, device):
            if job.sides != [name]:
                raise LaunchError("out of memory")
            return {name: fake(1.0)}

        return launch

    monkeypatch.setattr(zero, "launch", only(OURS))
    found = race(JOB._replace(sides=[OURS, ZERO[3]]), 1, "cuda")
    assert found[OURS].failed is None and found[ZERO[3]].failed == "out of memory"
    monkeypatch.setattr(zero, "launch", only(ZERO[3]))
    with pytest.raises(LaunchError):
        race(JOB._replace(sides=[OURS, ZERO[3]]), 1, "cuda")


def test_what_a_rank_said_last_is_told(monkeypatch):
    stderr = "W1 torch\n[rank1]: Traceback\n[rank1]: ValueError: want this; got that\nChildFailedError: worker\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", stderr))
    with pytest.raises(LaunchError, match=r"^\[rank1\]: ValueError: want this; got that$"):
        launch(JOB, 2, "cpu")


@pytest.mark.slow
def test_two_ranks_compute_what_one_does():
    job = JOB._replace(sides=[OURS], rounds=1)
    here = launch if torch.cuda.is_available() else alone  # which would take the GPU
    one, two = here(job, 1, "cpu")[OURS], launch(job._replace(prompts=1), 2, "cpu")[OURS]
    assert max(compare({"one": one.updates, "two": two.updates}, 1e-5)) < 1e-5
    assert two.held == pytest.approx(one.held / 2, rel=0.02)
    assert len(two.seconds) == 1


@pytest.mark.slow
def test_deepspeed_has_our_losses_and_norms():
    try:
        need_deepspeed()
    except UnavailableError as error:
        pytest.skip(str(error))
    found = launch(JOB._replace(sides=[OURS, UNPACKED, *ZERO.values()], rounds=1), 2, "cpu")
    assert not any(side.failed for side in found.values())
    assert max(compare({name: side.updates for name, side in found.items()}, 1e-5)) < 1e-5
