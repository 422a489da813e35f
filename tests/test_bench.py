"""The benchmark's own parts: taking turns, judging, memory, tables. Nothing here looks at how fast anything was."""

import json
import math
import sys
import types

import pytest
import torch

from bench import race, timing
from bench.bars import bars, gradient_bytes, render_bars
from bench.peers import Padded, load, torch_grpo
from bench.race import Contender, Floor, UnavailableError, against
from bench.table import Row, compare, main, render, save
from bench.table import load as load_rows
from bench.workloads import Shape, linear_truth, make_batch, make_logits, sequence_lengths

NAN = float("nan")
TRUTH = {"logp": torch.arange(1.0, 9.0).double(), "dlogits": torch.ones(8).double()}
RIGHT = {"logp": torch.arange(1.0, 9.0), "dlogits": torch.ones(8)}


@pytest.fixture(autouse=True)
def wall_clock(monkeypatch):
    """On a GPU too: do_bench would repeat calls that do nothing ten thousand times."""
    monkeypatch.setattr(timing, "SHORT", 0.0)


def pedantic(target, setup=lambda: None, rounds=1, warmup_rounds=0, iterations=1):
    """pytest-benchmark's, as far as we use it."""
    for _ in range(rounds + warmup_rounds):
        setup()
        target()


def run(contenders, floor=None, dtype=torch.float32):
    return race.run(
        "op", "N 8", contenders, against(TRUTH), dtype=dtype, floor=floor, pedantic=pedantic, budget=0.0, most=4
    )


def gives(result):
    return Contender(lambda: lambda: dict(result))


def test_contenders_take_turns_and_the_first_round_is_thrown_away():
    order = []
    turns = {name: timing.Turn(lambda name=name: order.append(name)) for name in ("ours", "a", "b")}
    times = timing.alternate(turns, {"ours": 0.1, "a": 0.1, "b": 0.1}, pedantic, budget=0.4)
    assert len(order) == 15
    rounds = [order[i : i + 3] for i in range(0, 15, 3)]
    assert all(sorted(names) == ["a", "b", "ours"] and names[-1] == "ours" for names in rounds)
    assert rounds[0][0] != rounds[1][0]
    assert {name: t.samples for name, t in times.items()} == {"ours": 4, "a": 4, "b": 4}
    assert times["ours"].versus == 1 and times["ours"].p20 <= times["ours"].median <= times["ours"].p80


def test_a_slow_contender_sits_rounds_out_evenly():
    order = []
    turns = {name: timing.Turn(lambda name=name: order.append(name)) for name in ("ours", "slow")}
    timing.alternate(turns, {"ours": 0.1, "slow": 1.0}, pedantic, budget=1.25)
    assert order == [*["slow", "ours", "ours", "ours", "ours"] * 3, "slow", "ours"]


def test_a_contender_gets_its_inputs_back_before_each_call():
    state = []
    turn = timing.Turn(lambda: state.append("call"), prepare=lambda: state.append("prepare"))
    timing.alternate({"ours": turn}, {"ours": 1.0}, pedantic, budget=0.0)
    assert state == ["prepare", "call"] * 4


def test_short_calls_go_through_do_bench_in_turns(monkeypatch):
    order = []

    def do_bench(call, warmup, rep, return_mode):
        assert return_mode == "all"
        call()
        return [1.0 if order[-1] == "ours" else 2.0] * 3

    fake = types.ModuleType("triton.testing")
    fake.do_bench = do_bench
    monkeypatch.setitem(sys.modules, "triton.testing", fake)
    turns = {name: timing.Turn(lambda name=name: order.append(name)) for name in ("ours", "peer")}
    times = timing.alternate_short(turns, pedantic)
    assert order[: 2 * timing.PASSES] == ["ours", "peer"] * timing.PASSES
    assert times["peer"] == timing.Times(2e-3, 2e-3, 2e-3, 3 * (timing.PASSES - 1), "do_bench", 2.0)


def test_memory_is_the_peak_of_what_torch_holds():
    def call():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(3 << 20, dtype=torch.uint8)
        del a
        return b, torch.empty(1 << 19, dtype=torch.uint8)

    inputs = torch.empty(1 << 22)
    if not torch.cuda.is_available():
        assert timing.peak_memory(timing.Turn(call)) == 4 << 20
        assert timing.peak_memory(timing.Turn(lambda: inputs.add_(1))) < 1 << 12


def test_a_right_contender_has_a_speed_and_a_wrong_one_has_none():
    off = {"logp": RIGHT["logp"] * 1.2, "dlogits": RIGHT["dlogits"]}
    floor = Floor("copy", "GB/s", lambda: None, done=2e9, needed=1e9)
    rows = {row.contender: row for row in run({"ours": gives(RIGHT), "torch": gives(RIGHT), "Peer": gives(off)}, floor)}
    assert rows["ours"].status == "ok" and rows["ours"].median > 0 and rows["ours"].versus == 1
    assert rows["ours"].of_floor == rows["ours"].floor_seconds / rows["ours"].median
    assert rows["Peer"].status.startswith("wrong") and math.isnan(rows["Peer"].median)
    assert rows["Peer"].value_error == pytest.approx(0.2)
    assert "wrong" in render(rows.values())


@pytest.mark.parametrize("name, values", {"logp": [1.0001, 1.001, NAN], "dlogits": [1.0001, NAN]}.items())
def test_ours_has_to_be_as_exact_as_pytorch(name, values):
    for value in values:
        wrong = RIGHT | {name: RIGHT[name] * value}
        ours, plain = run({"ours": gives(wrong), "torch": gives(RIGHT)})
        assert ours.status.startswith("wrong") and math.isnan(ours.median)
        assert plain.status == "ok" and math.isnan(plain.median)  # no race without us
        assert NAN not in (ours.value_error, ours.grad_error)


def test_ours_may_be_twice_as_far_off_as_pytorch():
    plain, ours = RIGHT | {"logp": RIGHT["logp"] * 1.01}, RIGHT | {"logp": RIGHT["logp"] * 1.019}
    assert run({"ours": gives(ours), "torch": gives(plain)})[0].status == "ok"
    worse = RIGHT | {"logp": RIGHT["logp"] * 1.021}
    assert run({"ours": gives(worse), "torch": gives(plain)})[0].status.startswith("wrong")


def test_an_absent_contender_is_skipped_and_a_broken_one_shown():
    def absent():
        raise UnavailableError("not installed")

    def broken():
        raise RuntimeError("no kernel\nimage")

    rows = run({"ours": gives(RIGHT), "absent": Contender(absent), "broken": Contender(lambda: broken)})
    assert [row.status for row in rows] == ["ok", "skipped: not installed", "failed: RuntimeError: no kernel"]
    with pytest.raises(RuntimeError, match="no kernel"):
        run({"ours": Contender(lambda: broken)})
    with pytest.raises(UnavailableError, match="no_such_peer"):
        load("no_such_peer")


def test_results_of_another_shape_or_name_do_not_pass():
    short = RIGHT | {"logp": RIGHT["logp"][:1]}
    assert run({"ours": gives(short)})[0].status.startswith("wrong")
    with pytest.raises(ValueError, match="logits"):
        run({"ours": gives({"logits": torch.ones(8)})})
    assert run({"ours": gives({})})[0].status.startswith("wrong")  # nothing was compared


def test_rows_survive_the_file_and_are_compared(tmp_path, capsys, monkeypatch):
    rows = [Row("op", "N 8", "ours", median=1.0, p20=0.9, p80=1.1), Row("op", "N 8", "TRL", "skipped: absent")]
    save(tmp_path / "new/a.json", rows, [])
    document = json.loads((tmp_path / "new/a.json").read_text())
    assert document.keys() == {"environment", "bars", "rows"}
    assert {"device", "driver", "packages", "commit", "dirty", "date"} <= document["environment"].keys()
    assert document["rows"][1]["median"] is None
    assert str(load_rows(tmp_path / "new/a.json")) == str(rows)

    slow = [Row("op", "N 8", "ours", median=1.3, p20=1.2, p80=1.4), rows[1]]
    save(tmp_path / "b.json", slow, [])
    assert compare(rows, slow, 0.1)[1] == slow[:1]
    assert not compare(rows, slow, 0.4)[1] and not compare(slow, rows, 0.1)[1]
    noisy = [Row("op", "N 8", "ours", median=1.3, p20=1.0, p80=1.4)]
    assert not compare(rows, noisy, 0.1)[1]
    lost = [Row("op", "N 8", "ours", "wrong: allowed 1e-5")]
    assert compare(rows, lost, 0.1)[1] == lost

    monkeypatch.setattr(
        sys, "argv", ["table", *(str(tmp_path / name) for name in ("new/a.json", "b.json")), "--fail=.1"]
    )
    with pytest.raises(SystemExit, match="True"):
        main()
    assert "1.300  op, N 8, ours   <- slower" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "b.json")])
    main()
    assert "| ours" in capsys.readouterr().out


def test_bars_are_read_off_the_rows():
    workload = "N 8192 H 3584 V 152064 bfloat16"
    gradients = gradient_bytes(workload)
    assert gradients == 152_064 * 3584 * 4 + 8192 * 3584 * 2
    ours = Row("linear_grpo", workload, "ours", median=0.04, floor_seconds=0.036, memory=gradients + 1.4e9)
    trl = Row("linear_grpo", workload, "TRL", median=0.06, versus=1.5)
    liger = Row("linear_grpo", workload, "Liger", "failed: OutOfMemoryError: ")
    found = bars([ours, trl, liger], cuda=True)
    assert [bar.met for bar in found] == [True, True, False]
    assert "MISSED" in render_bars(found) and "1.40 GB in 40.00 ms" in render_bars(found)

    workload = "N 1024 H 512 V 32000 float32"
    ours = Row("linear_grpo", workload, "ours", median=1.0, memory=30.0)
    plain = Row("linear_grpo", workload, "torch", median=1.0, versus=0.9, memory=100.0)
    assert [bar.met for bar in bars([ours, plain], cuda=False)] == [False, True]
    rewards = Row("rewards", "B 64", "ours", median=20e-6, launches=2)
    assert [bar.met for bar in bars([rewards], cuda=True)] == [True]


@pytest.mark.parametrize("N", [160, 1024, 1600, 8192])
def test_sequences_add_up(N):
    lengths = sequence_lengths(N)
    assert sum(lengths) == N and len(lengths) % 8 == 0 and min(lengths) >= 20 and max(lengths) <= 200
    with pytest.raises(ValueError, match="got 100"):
        sequence_lengths(100)


def test_the_workloads_are_peaked_and_the_truth_is_that_of_a_plain_trainer():
    logits, targets = make_logits(64, 5000, torch.float32)
    assert 3 < logits.std() < 4.5
    assert logits.detach().log_softmax(-1).gather(-1, targets[:, None]).mean() > -7  # flat: -8.5, less for the spread

    batch = make_batch(Shape(1200, 16, 100, torch.float32))  # more than one block
    truth, plain = linear_truth(batch), torch_grpo(batch).build()()
    assert truth.keys() == {"loss", "logp", "dhidden", "dweight"}
    for name, got in plain.items():
        torch.testing.assert_close(got.double(), truth[name], rtol=1e-4, atol=1e-6)
    assert "dweight" not in linear_truth(batch.frozen())

    padded = Padded(batch)
    assert torch.equal(padded.pad(batch.hidden)[padded.mask], batch.hidden)
    torch.testing.assert_close(padded.loss(padded.pad(truth["logp"].float())).double(), truth["loss"])
