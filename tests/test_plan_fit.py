"""The largest micro-batch really is the largest, and what would help is named with what it brings."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from plan_cases import GROUP, made_config, made_job

from medground.plan.dry_run import DryRun, dry_run
from medground.plan.fit import GRAIN, Room, Search, levers, room_of, scaled
from medground.plan.gpus import GPUS, find_gpu
from medground.plan.tracker import Peak

WHOLE = 8 * 40_000  # tokens of all of a rank's groups


def search_over(
    memory: Callable[[int], float], room: float, given: int, tmp_path, slack: float = 0.0, context: float = 0.0
) -> tuple[Search, dict[int, Peak]]:
    """Search where so many tokens take that memory; groups are of 40,000 tokens, 8 a rank."""
    config = made_config(
        tmp_path, rollout_max_new_tokens=9991, loss_micro_batch_tokens=given, rollout_prompts_per_step=8
    )
    search = Search(config, made_job(config), 1, Room(room, slack, context))
    assert (search._least, search.whole) == (40_000, WHOLE)
    found = DryRun(
        {"load": Peak(0, {}), **dict.fromkeys(("score", "update", "optimizer"), _peak(memory(min(given, WHOLE))))},
        *[None] * 3,
    )
    tried: dict[int, Peak] = {}
    while budget := search(found, tried):
        assert budget not in tried and 40_000 <= budget <= WHOLE
        tried[budget] = _peak(memory(budget))
    return search, tried


def _peak(size: float) -> Peak:
    return Peak(int(size), {})


def linear(tokens: int) -> float:
    return 1e9 + 1000 * tokens + (5e8 if tokens < WHOLE else 0)


def stepped(tokens: int) -> float:
    return linear(tokens) + 3e6 * (tokens // 7000)


@pytest.mark.parametrize("memory", [linear, stepped, lambda t: linear(t) + 0.002 * t * t])
@pytest.mark.parametrize("room", [1.545e9, 1.6e9, 1.7123e9])
@pytest.mark.parametrize("given", [40_000, 100_001, 500_000])
def test_one_step_more_does_not_fit(memory, room, given, tmp_path):
    search, tried = search_over(memory, room, given, tmp_path)
    if memory(WHOLE) <= room:
        assert search.best == WHOLE and len(tried) <= 1
    elif memory(40_000) > room:
        assert search.best is None
    else:
        assert memory(search.best) <= room < memory(search.best + GRAIN)
        assert room < search.peaks[min(t for t in search.peaks if t > search.best)].total, "it was seen not to fit"
    assert len(tried) <= 9


def test_slack_and_context_are_part_of_the_line(tmp_path):
    def memory(tokens: int) -> float:
        return 1e9 + 1000 * tokens

    search, tried = search_over(memory, 1.5e9, 100_001, tmp_path, slack=0.2, context=1e8)
    assert search.best and 1.2 * memory(search.best) + 1e8 <= 1.5e9 < 1.2 * memory(search.best + GRAIN) + 1e8
    assert len(tried) <= 4


def test_everything_at_once_needs_no_second_try(tmp_path):
    search, tried = search_over(linear, 9e9, WHOLE, tmp_path)
    assert search.best == WHOLE and not tried
    search, tried = search_over(linear, 1e6, 100_000, tmp_path)
    assert search.best is None and set(tried) == {WHOLE, 40_000}


def test_a_real_search_finds_what_really_fits(tmp_path):
    config = made_config(tmp_path, loss_micro_batch_tokens=12 * GROUP, rollout_prompts_per_step=32)
    job, searches = made_job(config), []

    def tries(found, tried):
        if not searches:
            searches.append(Search(config, job, 2, Room(0.85 * found.highest.total, 0.0, 0.0)))
        return searches[0](found, tried)

    found, tried = dry_run(job, config, 2, cuda=False, tries=tries)
    search, room = searches[0], searches[0]._room
    assert search.best and tried.items() <= search.peaks.items()
    assert room.fits(search.peaks[search.best]) and not room.fits(search.peaks[search.best + GRAIN])
    # an update that is tried after others takes what it takes alone
    alone, _ = dry_run(job, replace(config, loss=replace(config.loss, micro_batch_tokens=search.best)), 2, cuda=False)
    assert alone.peaks["update"] == search.peaks[search.best]
    told: list[str] = []
    rows = levers(job, config, 2, room, found, search, told.append)
    by_option = {row.option: row for row in rows}
    assert by_option[f"--loss.micro-batch-tokens {search.best}"].fits
    assert (
        by_option["--model.activation-checkpointing full"].dry_run and "--model.activation-checkpointing full" in told
    )
    assert by_option["--sharding.reduce each"].dry_run and not by_option["--optimizer.kind adamw-8bit"].dry_run
    assert any(" --rollout.cache-gb " in option and option.startswith("--loss") for option in by_option)
    assert [row.needed for row in rows] == sorted(row.needed for row in rows)
    assert all(row.fits == (row.needed <= room.memory) for row in rows)


def test_what_ranks_share_shrinks_with_them():
    peaks = {
        "update": Peak(0, {"weights": 800, "optimizer": 1600, "activations": 100}),
        "load": Peak(0, {"weights": 400}),
    }
    assert [scaled(peaks, 8, n) for n in (1, 8, 1024)] == [19_300, 2500, 400]


def test_room_of_a_gpu():
    gpu = find_gpu("h100-80gb")
    room = room_of(gpu)
    assert room.needed(100) == 104 + room.context and room.fits(int(70e9)) and not room.fits(int(81e9))
    assert room_of(GPUS["cpu"]).needed(Peak(7, {})) == 7
    with pytest.raises(ValueError, match=r"--gpu: want one of h100-80gb, .*cpu; got 'abacus'"):
        find_gpu("abacus")
