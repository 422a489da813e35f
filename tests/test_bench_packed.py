"""Packed groups as benchmarks run them, at small sizes. Nothing here looks at how fast anything was."""

import json

import pytest
import torch

from bench import packed, packed_sides, timing
from bench.packed import Race, cpu_bars, cuda_bars, measure, render, take_turns
from bench.packed_floors import operations_bound, weights_of
from bench.packed_sides import Case, check, make_case, our_loss, our_score, separate, their_loss, their_score
from bench.random_model import ARCHITECTURES, SIZES, Size, make_example, make_processor, make_prompts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case("tiny", CPU, prompts=3)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_prompts_have_the_length_that_they_say(name):
    size = SIZES[name]
    first, second = make_prompts(make_processor(ARCHITECTURES[name].V, size), size, 2)
    assert len(first.input_ids) == len(second.input_ids) == size.P
    assert len(first.pixel_values) == size.patches
    assert first.image_keys != second.image_keys and not torch.equal(first.input_ids, second.input_ids)


def test_a_prompt_too_short_for_its_image_is_refused():
    with pytest.raises(ValueError, match=r"want P of at least 30, 16 the image's; got 20"):
        make_example(Size(20, 8, 2, 6), 0)


def test_nobody_can_draw_the_token_that_ends(case):
    tokenizer, V = case.processor.tokenizer, case.shape.V
    assert tokenizer.eos_token_id == V == len(case.vlm.lm_head.weight)
    assert all(tokenizer.decode([token]) for token in range(V))


def test_token_bound():
    assert Size(600, 40, 8, 128).token_bound == pytest.approx(8 * 728 / (600 + 8 * 128))


def test_both_sides_agree(case):
    found = check(case)
    assert max(found.logp, found.rollout_logp_rms, found.loss, found.grad) < 1e-5
    assert all(weight.grad is None for weight in case.policy.parameters())


def test_a_side_that_computes_something_else_is_refused(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packed_sides, "our_score", lambda *_: their_score(case) + 2e-3)
        with pytest.raises(ValueError, match=r"want both sides to agree within 0\.0001; got Agreement\(logp=0\.00"):
            check(case)
    with monkeypatch.context() as patch:
        patch.setattr(packed_sides, "our_loss", lambda *_: their_loss(case) * 1.001)
        with pytest.raises(ValueError, match="want both sides to agree"):
            check(case)
    monkeypatch.setattr(packed_sides, "their_rollout", lambda _: torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"want completions of 6 tokens on both sides; got \[5, 6\]"):
        check(case)


@pytest.mark.parametrize("image_once", [True, False])
def test_without_sharing_it_is_the_same(case, image_once):
    groups = separate(case, image_once)
    assert len({key for group in groups for key in group.prompt.image_keys}) == (1 if image_once else case.size.G)
    torch.testing.assert_close(our_score(case, groups), their_score(case), atol=1e-5, rtol=0)
    torch.testing.assert_close(our_loss(case, groups), their_loss(case), atol=1e-5, rtol=0)


def test_operations_bound(case):
    G, weights, (P, _, _, C) = 2, weights_of(case), case.size
    packed_work = (P + G * C) * weights.layers + 64 * weights.vision + G * C * weights.head
    alone = G * (P + C) * weights.layers + G * 64 * weights.vision + G * C * weights.head
    assert operations_bound(case, image_once=False) == pytest.approx(alone / packed_work)
    assert operations_bound(case, image_once=True) == pytest.approx((alone - 64 * weights.vision) / packed_work)


def test_turns_go_to_and_fro_and_whoever_lacks_memory_drops_out():
    order = []

    def lacks_memory():
        raise torch.OutOfMemoryError("CUDA out of memory\nmore of it")

    turns = {name: timing.Turn(lambda name=name: order.append(name)) for name in ("ours", "rows")}
    race = take_turns(turns | {"large": timing.Turn(lacks_memory)}, 2)
    assert order == ["rows", "ours", "ours", "rows", "rows", "ours"]
    assert race.failed == {"large": "CUDA out of memory"}
    assert {name: len(seconds) for name, seconds in race.seconds.items()} == {"ours": 2, "rows": 2}
    with pytest.raises(torch.OutOfMemoryError):
        take_turns({"ours": timing.Turn(lacks_memory)}, 1)


def test_a_speed_up_is_of_the_same_round():
    race = Race({"ours": [1.0, 2.0, 1.0], "rows": [3.0, 8.0, 2.0]}, {})
    assert race.speedups() == {"rows": {"median": 3.0, "least": 2.0, "most": 4.0, "fastest": 2.0}}
    assert race.times()["rows"]["median"] == 3.0


def test_the_result_has_everything(case, tmp_path, capsys):
    result = measure(case, rounds=1)
    assert set(result["speedup"]) == {"update", "score", "rollout"} and all(result["speedup"].values())
    assert set(result["seconds"]["update"]) == {"ours", "unpacked", "unpacked, image once", "rows"}
    assert result["sizes"]["parameters"] == sum(weight.numel() for weight in case.vlm.parameters())
    assert {d["rows"] for d in result["floors"]["decoding"]} == {2, 6}
    assert all(held > 0 for held in result["peak_bytes"].values())
    assert result["environment"]["on"] == "cpu" and result["bars"] == []
    assert [bar.name for bar in cpu_bars(result)] == ["update", "score", "rollout"]
    assert len(cuda_bars(result)) == 7
    # what a GPU too small for rows leaves
    result["speedup"]["rollout"], result["failed"]["update"] = None, {"unpacked": "out of memory"}
    del result["speedups"]["update"]["unpacked"]
    assert len(cuda_bars(result)) == 5
    result["bars"] = [bar.plain() for bar in cuda_bars(result)]
    packed.write(result, render(result), tmp_path / "new" / "packed.json")
    out = capsys.readouterr().out
    assert "| - | - | - | unpacked: out of memory |" in out and "`generate`" in out and "a step of 6 rows" in out
    assert json.loads((tmp_path / "new" / "packed.json").read_text())["speedup"]["update"]
