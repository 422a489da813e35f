"""Cost curves: fits and growth on made-up times, predictions by hand, a small run. Nothing looks at how fast it was."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import curves, curves_points, curves_ranks
from bench.curves import bars, measure, per_token, render
from bench.curves_fit import TOLERANCE, compare_growth, fit_costs, judge, one_rate, slope, steady
from bench.curves_points import AXES, PHASES, Point, make_points, size_at, visit
from bench.curves_ranks import measure_ranks, summarize
from bench.random_model import SIZES, make_example
from medground.costs import network_of

CPU = torch.device("cpu")
G = (1, 2, 4, 8, 16, 32)
NEEDS_MATPLOTLIB = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


def made_up(values, costs, rounds=5, noise=0.03, seed=0):
    """Samples [points, rounds] around costs, each round with a mood of its own, which is taken out again."""
    random = np.random.default_rng(seed)
    mood = random.uniform(0.7, 1.5, rounds)
    return steady(np.array(costs)[:, None] * mood * np.exp(noise * random.standard_normal((len(values), rounds))))


@pytest.fixture(scope="module")
def found():
    return measure("tiny", CPU, {"G": (1, 2), "V": (320, 640)}, ranks=False, rounds=1)


def test_overhead_and_rate_are_found_again():
    calls, operations = np.array([1, 1, 1, 1]), np.array([1e9, 2e9, 8e9, 32e9])
    fit = fit_costs(0.05 * calls + operations / 4e10, calls, operations)
    assert fit == pytest.approx((0.05, 4e10))
    steps = np.array([15, 63, 255, 1023])
    fit = fit_costs(0.002 * steps + operations / 8e10, steps, operations)
    assert fit == pytest.approx((0.002, 8e10))
    assert fit.seconds(10, 8e9) == pytest.approx(0.02 + 0.1)


def test_neither_overhead_nor_rate_is_negative():
    calls, operations = np.ones(4), np.array([1e9, 2e9, 8e9, 32e9])
    fit = fit_costs(operations / 4e10 - 0.01, calls, operations)
    assert fit.overhead == 0 and fit.rate > 4e10
    flat = fit_costs(np.array([1.03, 1.02, 1.0, 0.98]), calls, operations)
    assert flat.rate == float("inf") and flat.overhead == pytest.approx(1.007, abs=1e-3)


def test_the_fit_is_of_relative_errors():
    calls, operations = np.zeros(2) + 1, np.array([1e9, 100e9])
    fit = fit_costs(np.array([0.9, 110.0]), calls, operations)
    assert fit.overhead == 0
    assert fit.rate == pytest.approx(one_rate([0.9, 110.0], operations))
    # least squares of seconds would follow the large one: 1 / 1.1
    assert 1e9 / fit.rate == pytest.approx((1 / 0.9 + 100 / 110) / ((1 / 0.9) ** 2 + (100 / 110) ** 2))


def test_overhead_is_not_told_from_operations_that_do_not_vary():
    fit = fit_costs(np.array([1.0, 1.2, 0.9]), np.ones(3), np.array([5e9, 5.1e9, 5e9]))
    assert fit.overhead == 0 and fit.rate == pytest.approx(5e9, rel=0.1)


def test_slope_is_of_the_upper_half():
    values = [1, 2, 4, 8, 16, 32]
    assert slope(values, [9, 9, 4**2, 8**2, 16**2, 32**2]) == pytest.approx(9 / 9 * slope([8, 16, 32], [64, 256, 1024]))
    assert slope(values, [1, 1, 1, 8**2, 16**2, 32**2]) == pytest.approx(2)
    assert slope([1, 4], [3, 12]) == pytest.approx(1)
    assert slope([1, 2, 4], [7, 2, 8]) == pytest.approx(2)


@pytest.mark.parametrize("seed", range(20))
def test_linear_growth_is_not_flagged_and_faster_growth_is(seed):
    operations = [3e10 + 3.6e9 * g for g in G]
    linear = [0.02 + o / 4e10 for o in operations]
    growth = compare_growth(G, made_up(G, linear, seed=seed), operations)
    assert not growth.is_faster
    assert growth.low <= growth.measured <= growth.high
    faster = [seconds * (g / G[0]) ** 0.3 for g, seconds in zip(G, linear, strict=True)]
    growth = compare_growth(G, made_up(G, faster, seed=seed), operations)
    assert growth.is_faster and growth.measured - growth.theory == pytest.approx(0.3, abs=0.1)


def test_slow_rounds_are_evened_out_and_a_slow_sample_stays():
    samples = np.outer([1.0, 10.0, 100.0], [1.0, 2.0, 1.0])
    samples[2, 0] = 500.0
    assert steady(samples).tolist() == [[1, 1, 1], [10, 10, 10], [500, 100, 100]]
    assert steady([[3.0], [4.0]]).tolist() == [[3], [4]]


def test_a_mood_of_the_machine_is_no_uncertainty():
    costs = [float(g) for g in G]
    growth = compare_growth(G, made_up(G, costs, noise=0.0), costs)
    assert growth == pytest.approx((1, 1, 1, 1))
    assert not compare_growth(G, made_up(G, [c ** (1 + TOLERANCE - 0.01) for c in costs], noise=0), costs).is_faster
    assert compare_growth(G, made_up(G, [c ** (1 + TOLERANCE + 0.01) for c in costs], noise=0), costs).is_faster
    # chance alone does not convict: one round of three is far off
    spread = np.array([costs, costs, [c**1.5 for c in costs]]).T
    assert not compare_growth(G, spread, costs).is_faster


def test_more_rounds_make_an_interval_narrower():
    few, many = (compare_growth(G, made_up(G, G, rounds), G) for rounds in (4, 64))
    assert many.high - many.low < (few.high - few.low) / 2


def points_of(operations, seconds, sizes=((600, 8, 128),) * 2):
    return [
        {
            "value": value,
            "size": dict(zip("PGC", size, strict=True)),
            "operations": {"update": o, "rows": 3 * o},
            "calls": {"update": 1},
            "seconds": {"update": s},
        }
        for value, o, s, size in zip((1, 2), operations, seconds, sizes, strict=True)
    ]


def test_a_phase_is_judged_by_its_medians():
    judged = judge(points_of([1e9, 3e9], [[1.0, 2.0, 1.0], [2.5, 5.0, 2.5]]), "update")
    assert judged["seconds"] == [1.0, 2.5] and judged["samples"] == [[1.0] * 3, [2.5] * 3]
    assert judged["overhead"] == pytest.approx(0.25) and judged["rate"] == pytest.approx(3e9 / 2.25)
    assert judged["fitted"] == pytest.approx([1.0, 2.5]) and judged["worst"]["ratio"] == pytest.approx(1)
    assert judged["growth"]["theory"] == pytest.approx(np.log2(3))
    assert judged["growth"]["measured"] == pytest.approx(np.log2(2.5))


def test_cost_of_a_completion_token_by_hand():
    points = points_of([2e9, 3e9], [[0.2, 0.2], [0.3, 0.3]], [(600, 1, 100), (600, 2, 100)])
    points[0]["seconds"]["rows"] = [0.5, 0.7]
    one, two = per_token(points)
    assert one["measured"] == one["predicted"] == pytest.approx(0.2 / 100)
    assert two["measured"] == two["predicted"] == pytest.approx(0.3 / 200)
    assert one["rows_measured"] == pytest.approx(0.6 / 100) and two["rows_measured"] is None
    assert one["rows_predicted"] == pytest.approx(3 * 0.2 / 100)
    points[1]["seconds"]["update"] = [0.36, 0.36]
    rate = (10.0**2 + (3 / 0.36) ** 2) / (10.0 + 3 / 0.36)  # G operations/s, by least squares of relative errors
    assert [at["ratio"] for at in per_token(points)] == pytest.approx([0.2 * rate / 2, 0.36 * rate / 3])


@pytest.mark.parametrize("ratio, low, met", [(1.09, 1.0, [True, True]), (0.89, 1.2, [False, False])])
def test_bars(ratio, low, met):
    growth = {"measured": 1.2, "low": low, "high": 1.3, "theory": 1.05, "is_faster": low > 1.15}
    found = {
        "axes": {"C": {"phases": {"score": {"growth": growth}}}},
        "per_token": [{"G": 1, "ratio": 1.0}, {"G": 32, "ratio": ratio}],
        "environment": {"on": "cpu"},
    }
    growths, tokens = bars(found)
    assert [growths.met, tokens.met] == met
    assert "score over C" in growths.measured and tokens.measured == f"{ratio - 1:+.1%} at G 32"
    assert len(bars(found | {"environment": {"on": "cuda"}})) == 1
    assert not bars(found | {"axes": {}, "per_token": None})


def test_sizes_along_an_axis():
    base = SIZES["small"]
    for axis in AXES:
        for value in AXES[axis]:
            size = size_at(base, axis, value)
            make_example(size, 0)
            changed = {name for name in size._fields if getattr(size, name) != getattr(base, name)}
            assert changed <= ({"P", "side"} if axis == "P" else {axis}) and (
                axis == "V" or value == getattr(size, axis)
            )
            assert 0.6 < size.image_tokens / size.P < 0.67
    assert size_at(base, "P", base.P) == base


def test_points_have_the_operations_of_what_they_run():
    small, wide = make_points("tiny", CPU, "V", (320, 640))
    assert len(small.case.vlm.lm_head.weight) == 320 and len(wide.case.vlm.lm_head.weight) == 640
    extra = 320 * 64  # weights of the head
    before, after = small.plain()["operations"], wide.plain()["operations"]
    (_, _, groups, C) = small.case.size
    assert after["prefill"] - before["prefill"] == 2 * extra
    assert after["decode"] - before["decode"] == 2 * extra * groups * (C - 1)
    assert after["score"] - before["score"] == 2 * extra * groups * C
    assert after["update"] - before["update"] == after["rows"] - before["rows"] == 6 * extra * groups * C
    assert small.plain()["calls"] == {"prefill": 1, "decode": C - 1, "score": 1, "update": 1, "rows": 1}
    one, two = make_points("tiny", CPU, "G", (1, 2))
    assert one.case.vlm is two.case.vlm and network_of(one.case.policy) == network_of(two.case.policy)
    assert one.plain()["operations"]["rows"] == pytest.approx(one.plain()["operations"]["update"])
    assert two.plain()["operations"]["rows"] == pytest.approx(2 * one.plain()["operations"]["update"])


def test_points_are_visited_to_and_fro(monkeypatch):
    order = []
    monkeypatch.setattr(curves_points, "_sample", lambda point: order.append(point.value) or {"update": len(order)})
    points = [Point(value, None, None, False) for value in "abc"]
    visit(points, 2)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert [point.seconds["update"] for point in points] == [[4, 9], [5, 8], [6, 7]]


def test_completions_that_end_early_are_refused(monkeypatch):
    (point,) = make_points("tiny", CPU, "G", (2,))
    monkeypatch.setattr(curves_points, "our_rollout", lambda *_: None)
    with pytest.raises(ValueError, match="want 2 completions of 6; got 0 tokens"):
        visit([point], 1)


def test_a_small_run(found):
    first, second = found["axes"]["G"]["points"]
    assert first["seconds"].keys() == {*PHASES, "rows"} and all(len(s) == 1 for s in first["seconds"].values())
    assert second["size"]["G"] == 2 and second["operations"]["update"] > first["operations"]["update"]
    assert "rows" not in found["axes"]["V"]["points"][0]["seconds"]
    assert [at["G"] for at in found["per_token"]] == [1, 2]
    assert found["agreement"]["logp"] < 1e-5 and [bar["name"] for bar in found["bars"]] == [
        "growth", "update, a completion token"
    ]  # fmt: skip
    text = render(json.loads(json.dumps(found)))
    assert text.count("| G 1 to 2 |") == text.count("| V 320 to 640 |") == 4
    assert "us a completion token" in text and "FSDP2" not in text


@NEEDS_MATPLOTLIB
def test_the_picture(found, tmp_path, monkeypatch):
    from PIL import Image

    from bench import curves_plot

    ranks = summarize([[2.0, 2.2], [1.2, 1.4]], [0.0, 1e8], 1e9)
    (tmp_path / "found.json").write_text(json.dumps(found | {"ranks": ranks}))
    monkeypatch.setattr(sys, "argv", ["curves_plot", str(tmp_path / "found.json"), str(tmp_path / "new/all.png")])
    curves_plot.main()
    curves_plot.draw(found | {"axes": {}, "per_token": None, "ranks": ranks}, tmp_path / "ranks.png")
    all_panels, one = Image.open(tmp_path / "new/all.png"), Image.open(tmp_path / "ranks.png")
    assert all_panels.width == one.width and all_panels.height > one.height
    assert (tmp_path / "new/all.png").stat().st_size < 200_000


def test_ranks_beside_theory():
    found = summarize([[2.0, 4.0, 2.0], [1.25, 2.0, 1.25]], [0.0, 5e7], 1e9)
    one, two = found["points"]
    assert one["seconds"] == one["predicted"] == 2.0 and one["efficiency"] == 1
    assert two["predicted"] == pytest.approx(1.05) and two["seconds"] == 1.25
    assert two["speedup"]["median"] == pytest.approx(1.6) and two["efficiency"] == pytest.approx(0.8)


@pytest.mark.slow
def test_two_ranks_take_turns_with_one():
    one, two = measure_ranks("tiny", 1)["points"]
    assert (one["ranks"], two["ranks"]) == (1, 2) and len(one["samples"]) == len(two["samples"]) == 1
    case = make_points("tiny", CPU, "G", (2,))[0].case
    model = case.vlm.model
    every = sum(w.numel() for w in case.policy.parameters())
    layers = sum(w.numel() for part in (model.visual.blocks, model.language_model.layers) for w in part.parameters())
    # two micro-batches of four groups: gathered forward and backward, gradients once; half comes from the other rank
    assert one["received"] == 0 and two["received"] == 4 * (2 * (every + layers) + every) / 2


def test_what_ranks_cannot_do(monkeypatch):
    monkeypatch.setattr(curves_ranks.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(ValueError, match="want a core for each of 2 ranks; got 1"):
        measure_ranks("tiny", 1)
    monkeypatch.setattr(curves_ranks.os, "sched_getaffinity", lambda _: {0, 1})
    failed = SimpleNamespace(returncode=1, stderr="no such model")
    monkeypatch.setattr(curves_ranks.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no such model"):
        measure_ranks("tiny", 1)


@pytest.mark.parametrize(
    "words, said", {"--device cuda --axes ranks": "want --device cpu", "--rounds 0": "want 1 or more; got 0"}.items()
)
def test_wrong_options_are_named(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["curves", *words.split()])
    with pytest.raises(SystemExit):
        curves.main()
    assert said in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(curves, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["curves", "--png", "new.png"])
    with pytest.raises(SystemExit):
        curves.main()
    assert "matplotlib is not installed" in capsys.readouterr().err
