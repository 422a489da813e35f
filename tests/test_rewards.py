"""Rewards against slow, obvious references, and their weighted sum."""

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medground.answers import parse_answer
from medground.config import LossConfig, RewardConfig
from medground.records import Answer, Example, Group, Prompt, Rollout
from medground.rewards.assignment import best_total
from medground.rewards.custom import load_custom
from medground.rewards.format import format_reward
from medground.rewards.length import length_reward
from medground.rewards.spatial import answer_giou, answer_iou, spatial_reward
from medground.rewards.total import Scorer, group_means
from medground.taking_part import advantages_of, taking_part
from medground_kernels.group_advantage import group_advantage

BOX = (0.0, 0.0, 10.0, 10.0)
HALF = (0.0, 0.0, 10.0, 5.0)
FAR = (50.0, 50.0, 60.0, 60.0)


def answers(*box_sets):
    return [Answer(boxes) for boxes in box_sets]


def groups_of(truths, texts, tokens=5, finished=True):
    """A group per truth, with the texts of its completions."""
    none = torch.empty(0)
    made = []
    for b, (truth, group) in enumerate(zip(truths, texts, strict=True)):
        example = Example(f"r{b}", "a.png", 100, 80, "nodule", truth, "nodule", "p", "s", "t", "train")
        prompt = Prompt(example, none, none, none, none, (), 112, 84)
        rollouts = [Rollout(torch.zeros(tokens + g), torch.zeros(tokens + g), t, finished or g % 2 == 0)
                    for g, t in enumerate(group)]  # fmt: skip
        made.append(Group(prompt, tuple(rollouts)))
    return made


def iou_of(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def giou_of(a, b):
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = iou_of(a, b)
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    union = (area_a + area_b) / (1 + iou)
    return (1 + iou - (around - union) / around) / 2


def by_trial(pred, truth, score):
    """Every one-to-one matching, tried out."""
    if pred is None:
        return 0.0
    if not pred or not truth:
        return float(not pred and not truth)
    few, many = sorted((pred, truth), key=len)
    best = max(sum(score(a, b) for a, b in zip(few, p, strict=True)) for p in itertools.permutations(many, len(few)))
    return best / len(many)


def test_iou_of_answers():
    got = answer_iou(
        [
            answers((BOX,), (HALF,), (), None),
            answers((BOX,), (BOX, FAR), (FAR, BOX), ((10.0, 10.0, 0.0, 0.0),)),
            answers((), (BOX,), None, ()),
        ],
        [(BOX,), (BOX, FAR), ()],
    )
    want = [[1, 0.5, 0, 0], [0.5, 1, 1, 0], [1, 0, 0, 1]]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32))


BOXES = st.builds(
    lambda x, y, w, h: (float(x), float(y), float(x + w), float(y + h)),
    st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.integers(1, 30),
)  # fmt: skip
SETS = st.lists(BOXES, max_size=4, unique=True).map(tuple)


@given(st.lists(st.tuples(SETS, st.tuples(st.none() | SETS, st.none() | SETS)), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_any_sets_of_boxes(cases):
    truths, predicted = [truth for truth, _ in cases], [answers(*sets) for _, sets in cases]
    for reward, score in ((answer_iou, iou_of), (answer_giou, giou_of)):
        want = [
            [by_trial(a.boxes, truth, score) for a in group] for truth, group in zip(truths, predicted, strict=True)
        ]
        torch.testing.assert_close(reward(predicted, truths), torch.tensor(want), atol=1e-5, rtol=0)


def test_best_total_of_larger_sets():
    torch.manual_seed(0)
    for n, m in itertools.product((1, 2, 5), (1, 3, 6)):
        scores = torch.rand(n, m).double()
        few, many = (scores, m) if n <= m else (scores.T, n)
        want = max(sum(few[range(len(few)), p]) for p in map(list, itertools.permutations(range(many), len(few))))
        assert best_total(scores.tolist()) == pytest.approx(float(want))
    assert best_total([]) == best_total([[], []]) == 0
    assert best_total([[float(i == j) for j in range(50)] for i in range(40)]) == 40


def test_boxes_that_are_none_and_boxes_too_many_cost():
    inverted = ((10.0, 10.0, 0.0, 0.0),)
    assert answer_giou([answers(inverted, ())], [(BOX,)]).tolist() == [[0, 0]]
    assert answer_giou([answers(inverted, ())], [()]).tolist() == [[0, 1]]
    many = tuple((float(i), 0.0, i + 1.0, 1.0) for i in range(50))
    for reward in (answer_iou, answer_giou):
        assert reward([answers((BOX, *many))], [(BOX,)])[0, 0] == pytest.approx(1 / 51)
    near, far = answer_giou([answers((FAR,), ((90.0, 90.0, 99.0, 99.0),))], [(BOX,)])[0].tolist()
    assert 0 < far < near < 0.5


def test_kinds_of_the_spatial_reward():
    iou = torch.tensor([[0.5, 0.51, 0.0, 1.0]])

    def reward(kind, **more):
        return spatial_reward(iou, RewardConfig(spatial=kind, **more), 0.7).tolist()[0]

    assert reward("hard", threshold=0.5) == [0, 1, 0, 1]
    assert reward("curriculum") == [0, 0, 0, 1]
    assert reward("stepped", thresholds=(0.2, 0.5)) == [0.5, 1, 0, 1]
    assert spatial_reward(iou, RewardConfig(), 0.7) is iou


def test_format_by_template():
    box = '{"bbox_2d": [1, 2, 3, 4]}'
    texts = [
        f"<think>{t}</think><answer>{box}</answer>" for t in ("the heart", f"the heart {box}", "heart [1, 2, 3, 4]")
    ]
    said = [[parse_answer(text) for text in (*texts, box)]]
    assert format_reward(said).tolist() == format_reward(said, "plain").tolist() == [[1, 1, 1, 0]]
    for template in ("chain-of-box", "brief-chain"):
        assert format_reward(said, template).tolist() == [[0, 1, 0, 0]]


def test_length_falls_over_the_buffer():
    got = length_reward([[1, 60, 70, 80, 100, 120]], 100, 40)
    torch.testing.assert_close(got, torch.tensor([[0, 0, -0.25, -0.5, -1, -1]]))


GOOD = '<think>a</think><answer>{"bbox_2d": [0, 0, 11.2, 10.5]}</answer>'  # of BOX, in processed pixels
TEXTS = [[GOOD, "nonsense"], ["<answer>[]</answer>", "<think></think><answer>[]</answer>"]]


def scored(config, **more):
    groups = groups_of([(BOX,), ()], TEXTS, **more)
    said = [answers((BOX,), None), answers((), ())]
    said[0][1] = parse_answer("nonsense")
    said[1][0] = parse_answer(TEXTS[1][0])
    return groups, said, Scorer(config, "plain", 10)


def test_total_is_the_weighted_sum():
    config = RewardConfig(
        format_weight=0.25, spatial_weight=2.0, length_weight=0.5, length_buffer=10, custom="reward_of_mine:longest",
        custom_weight=3.0,
    )  # fmt: skip
    sys.modules["reward_of_mine"] = type(sys)("reward_of_mine")
    seen = []

    def longest(batch):
        seen.append(batch)
        return [[len(text) for text in group] for group in batch.texts]

    sys.modules["reward_of_mine"].longest = longest
    groups, said, scorer = scored(config)
    rewards = scorer(groups, said)
    assert rewards.parts["format"].tolist() == [[1, 0], [0, 1]]
    assert rewards.parts["spatial"].tolist() == rewards.iou.tolist() == [[1, 0], [1, 1]]
    assert rewards.parts["length"].tolist() == pytest.approx(torch.tensor([[-0.5, -0.6], [-0.5, -0.6]]))
    lengths = torch.tensor([[len(text) for text in group] for group in TEXTS])
    p = rewards.parts
    torch.testing.assert_close(rewards.total, 0.25 * p["format"] + 2 * p["spatial"] + 0.5 * p["length"] + 3.0 * lengths)
    parts, weights = rewards.stacked()
    torch.testing.assert_close((parts * weights).sum(-1), rewards.total)
    assert torch.equal(advantages_of(rewards, LossConfig()), group_advantage(rewards.total, normalize="group"))
    (batch,) = seen
    assert batch.truths == [(BOX,), ()] and batch.original_sizes[0] == (100, 80) and batch.shape == (2, 2)
    assert batch.processed_sizes[0] == (112, 84) and batch.examples[1].id == "r1" and batch.answers is said
    assert batch.lengths == [[5, 6], [5, 6]] and batch.finished == [[True, True]] * 2


def test_parts_that_weigh_nothing_are_told_and_not_summed():
    groups, said, scorer = scored(RewardConfig(format_weight=0.0))
    rewards = scorer(groups, said)
    assert rewards.parts["format"].tolist() == [[1, 0], [0, 1]] and torch.equal(rewards.total, rewards.parts["spatial"])
    assert rewards.stacked()[0].shape == (2, 2, 1) and set(rewards.parts) == {"format", "spatial"}


@pytest.mark.parametrize(
    ("result", "named"),
    [
        (lambda batch: 1 / 0, "reward.custom: mine:score failed: ZeroDivisionError"),
        (lambda batch: [[1.0]], r"want \[B, G\] = \[2, 2\] numbers; got \[1, 1\]"),
        (lambda batch: "high", "mine:score failed"),
        (lambda batch: [[0.0, 0.0], [0.0, float("nan")]], "got nan for completion 1 of record r1"),
    ],
)
def test_what_is_wrong_with_a_reward_of_ones_own(result, named, monkeypatch):
    module = type(sys)("mine")
    module.score = result
    monkeypatch.setitem(sys.modules, "mine", module)
    groups, said, scorer = scored(RewardConfig(custom="mine:score"))
    with pytest.raises(ValueError, match=named):
        scorer(groups, said)


def test_a_reward_of_ones_own_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("import no_such_thing")
    (tmp_path / "a_reward.py").write_text("def score(batch): return 1")
    assert load_custom("a_reward:score")(None) == 1
    for name, wanted in [
        ("no_such_module:f", "no_such_module cannot be imported"), ("broken_reward:f", "ModuleNotFoundError"),
        ("a_reward:other", "want a function other in module a_reward"), ("a_reward", "want module:function"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"reward.custom: .*{wanted}"):
            load_custom(name)


def test_rewards_by_themselves_count_alike():
    groups, said, scorer = scored(RewardConfig(format_weight=0.5, length_weight=0.01, length_buffer=10))
    rewards = scorer(groups, said)
    got = advantages_of(rewards, LossConfig(per_reward=True))
    want = torch.zeros(2, 2)
    for name, weight in (("format", 0.5), ("spatial", 1.0), ("length", 0.01)):
        part = rewards.parts[name]
        want += weight * (part - part.mean(1, keepdim=True)) / (part.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_who_takes_part():
    groups, said, scorer = scored(RewardConfig(format_weight=0.0), finished=False)
    rewards = scorer(groups, said)
    assert rewards.total.tolist() == [[1, 0], [1, 1]]
    assert taking_part(groups, rewards, LossConfig()).tolist() == [[True, True], [True, True]]
    assert taking_part(groups, rewards, LossConfig(drop_zero_spread=True)).tolist() == [[True, True], [False, False]]
    assert taking_part(groups, rewards, LossConfig(mask_truncated=True)).tolist() == [[True, False], [True, False]]


def test_the_curriculum_sees_groups_and_goes_into_checkpoints():
    config = RewardConfig(spatial="curriculum", curriculum_window=2)
    groups, said, scorer = scored(config)
    assert scorer.threshold == 0.3
    rewards = scorer(groups, said)
    assert group_means(rewards) == [(0.5, 0.5), (1.0, 1.0)]
    scorer.observe(group_means(rewards))
    assert scorer.threshold == 0.45
    other = Scorer(config, "plain", 10)
    other.load({"skipped": 0} | scorer.state())
    assert other.state() == scorer.state() and other.threshold == 0.45
    plain = Scorer(RewardConfig(), "plain", 10)
    plain.load(scorer.state())
    plain.observe([(1.0, 1.0)] * 50)
    assert plain.state() == {} and plain.threshold is None
