"""When the threshold of the curriculum is raised, and what a checkpoint keeps of it."""

import json

from medground.config import RewardConfig
from medground.rewards.curriculum import Curriculum

CONFIG = RewardConfig(spatial="curriculum", curriculum_window=4)


def thresholds(groups, config=CONFIG, a_step=1):
    curriculum, seen = Curriculum(config), []
    for start in range(0, len(groups), a_step):
        curriculum.observe(groups[start : start + a_step])
        seen.append(curriculum.threshold)
    return seen


def test_it_rises_once_the_window_is_full_and_again_after_half_a_window():
    # 0.3, then + 0.15, + 0.10 and + 0.05 each time, to 0.8
    want = [0.3] * 3 + [0.45] * 2 + [0.55] * 2 + [0.6] * 2 + [0.65] * 2 + [0.7] * 2 + [0.75] * 2 + [0.8] * 5
    assert thresholds([(1.0, 1.0)] * 20) == want


def test_it_waits_for_reward_spread_and_margin():
    assert thresholds([(0.59, 1.0)] * 8)[-1] == 0.3 < thresholds([(0.6, 1.0)] * 8)[-1]
    assert thresholds([(1.0, 0.39)] * 8)[-1] == 0.3 < thresholds([(1.0, 0.4)] * 8)[-1]
    mixed = [(1.0, 1.0), (0.2, 1.0)] * 2
    assert thresholds(mixed)[-1] == 0.45
    spread = RewardConfig(spatial="curriculum", curriculum_window=4, curriculum_spread=0.39)
    assert thresholds(mixed, spread)[-1] == 0.3


def test_old_groups_are_forgotten():
    assert thresholds([(0.0, 0.0)] * 50 + [(1.0, 1.0)] * 3)[-1] == 0.3
    assert thresholds([(0.0, 0.0)] * 50 + [(1.0, 1.0)] * 4)[-1] == 0.45


def test_a_step_raises_it_once_and_never_past_the_end():
    assert thresholds([(1.0, 1.0)] * 400, a_step=100) == [0.45, 0.55, 0.6, 0.65]
    short = RewardConfig(spatial="curriculum", curriculum_window=4, curriculum_end=0.5)
    assert thresholds([(1.0, 1.0)] * 40, short)[-1] == 0.5


def test_a_resumed_run_goes_on_where_it_was():
    groups = [(0.5 + 0.04 * i, 0.4 + 0.04 * i) for i in range(14)]
    whole = thresholds(groups)
    assert len(set(whole)) > 2
    for cut in range(len(groups)):
        first = Curriculum(CONFIG)
        for group in groups[:cut]:
            first.observe([group])
        again = Curriculum(CONFIG)
        again.load(json.loads(json.dumps(first.state())))
        rest = []
        for group in groups[cut:]:
            again.observe([group])
            rest.append(again.threshold)
        assert rest == whole[cut:]
