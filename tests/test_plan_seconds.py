"""Seconds of a step: by hand where the sums are short, and what they must do as GPUs are added."""

from dataclasses import replace

import pytest
from plan_cases import C, G, made_config, made_job
from stream_cases import policy_of, small_model

from medground.config import ShardingConfig
from medground.costs import Sizes, network_of, step_operations
from medground.plan.efficiency import Efficiencies, Share
from medground.plan.floors import Rates, model_of
from medground.plan.gpus import GPUS
from medground.plan.rehearsal import Facts
from medground.plan.seconds import (
    NODE_LATENCY,
    RING_LATENCY,
    Setting,
    _across,
    _answers,
    answer_tokens,
    collective_seconds,
    recomputed,
    scorings,
    step_on,
)

HALF = Share(0.5, False, "half")
REACHED = Efficiencies(
    Rates(copy=1e9, product=1e10),
    "made up",
    dict.fromkeys(("prefill", "decode", "score", "update", "optimizer"), HALF),
    link=HALF,
    network=HALF,
)
GPU = GPUS["h100-80gb"]._replace(link=2e9, network=1e8)


@pytest.fixture
def setting(tmp_path) -> Setting:
    policy = policy_of(small_model())
    network = network_of(policy)
    facts = Facts(
        network, model_of(policy, 4), units=7, gathered=4_000_000, gathered_again=3_000_000, reduced=4_000_000
    )
    config = made_config(tmp_path, loss_beta=0.04)
    return Setting(made_job(config), config, 6.0, facts, GPU, REACHED)


def test_collectives_by_hand():
    seconds = [collective_seconds(GPU, REACHED, 8e9, 10, n) for n in (1, 2, 8, 16, 1024)]
    # half of the link, then half of eight network cards, which is less
    assert seconds[:3] == [0.0, 4 + 10 * NODE_LATENCY, 7 + 10 * NODE_LATENCY]
    assert seconds[3] == pytest.approx(7.5e9 / 4e8 + 10 * (NODE_LATENCY + RING_LATENCY))
    assert seconds[4] == pytest.approx(8e9 * 1023 / 1024 / 4e8 + 10 * (NODE_LATENCY + 127 * RING_LATENCY))
    fast = GPU._replace(network=1e12)
    assert collective_seconds(fast, REACHED, 8e9, 0, 16) == 7.5, "the link is the slower one"


def test_one_gpu_by_hand(setting):
    step = step_on(setting, 1, 8)
    groups = [group for rank in _answers(setting, 1, 8) for group in rank]
    operations = step_operations(setting.facts.network, groups, scorings=1)
    for phase in ("prefill", "score", "update"):
        assert step.phases[phase].seconds == pytest.approx(operations[phase] / 1e10 / 0.5)
    assert step.phases["optimizer"].seconds == pytest.approx(setting.facts.model.parameters * 32 / 1e9 / 0.5)
    assert step.communication == 0 and step.operations == sum(operations.values())
    assert step.tokens == sum(sum(group.completions) for group in groups)
    assert step.seconds == sum(phase.seconds for phase in step.phases.values())
    assert step.phases["decode"].bound == "memory" and step.phases["update"].bound == "products"


def test_the_refresh_is_never_hidden_and_the_rest_is_where_it_can_be(setting):
    one, two = step_on(setting, 1, 8), step_on(setting, 2, 16)
    gather = collective_seconds(GPU, REACHED, 4_000_000, 7, 2)
    again, reduce = (collective_seconds(GPU, REACHED, size, n, 2) for size, n in ((3_000_000, 6), (4_000_000, 7)))
    assert two.phases["decode"].communication == gather
    assert two.phases["prefill"].communication == two.phases["optimizer"].communication == 0
    # two of a rank's eight groups go into a micro-batch
    computing, micro = one.phases["update"].seconds, 4
    shown = max(micro * (gather + again) + reduce - computing, micro * gather / 7)
    assert two.phases["update"].communication == pytest.approx(shown, rel=1e-3)
    assert two.phases["optimizer"].seconds == pytest.approx(one.phases["optimizer"].seconds / 2)
    idle = replace(setting, reached=REACHED._replace(rates=Rates(1e9, 1e6)))
    assert step_on(idle, 2, 16).phases["score"].communication == pytest.approx(micro * gather / 7), (
        "one unit of each pass"
    )
    slow = replace(setting, gpu=GPU._replace(link=2e6))
    assert step_on(slow, 2, 16).phases["update"].bound == "network"
    fast = replace(setting, gpu=GPU._replace(link=1e15), reached=REACHED._replace(rates=Rates(1e9, 1e6)))
    assert step_on(fast, 2, 16).phases["update"].communication < 1e-3 * step_on(fast, 2, 16).phases["update"].seconds


def test_more_gpus_take_longer_for_as_much_each_and_less_for_as_much_in_all(setting):
    weak = [step_on(setting, n, 8 * n) for n in (1, 2, 8, 16, 128)]
    assert weak[1].seconds < weak[2].seconds < weak[4].seconds
    # a node holds one copy of the weights: only sums of gradients go further
    whole = replace(setting, config=replace(setting.config, sharding=ShardingConfig(replicas=1)))
    assert step_on(whole, 16, 128).communication > weak[3].communication, "the network is slower than the link"
    assert _across(setting, 1, 8) == 0 < _across(setting, 2, 8) < _across(setting, 16, 8)
    assert _across(setting, 2, 8) > 2 * setting.facts.reduced / 8 / 2 / (GPU.network * 0.5)
    strong = [step_on(setting, n, 8).phases["update"].seconds for n in (1, 2)]
    assert strong[0] > strong[1] - step_on(setting, 2, 8).phases["update"].communication


def test_activation_checkpointing_adds_a_forward_pass_without_the_head(setting):
    groups = [Sizes(36, [[1, 8, 8]], [5] * G)]
    assert recomputed(setting, groups) == 0
    again = replace(
        setting, config=replace(setting.config, model=replace(setting.config.model, activation_checkpointing="full"))
    )
    forward = step_operations(setting.facts.network, groups, scorings=1)["score"]
    assert recomputed(again, groups) == forward - 2 * setting.facts.network.head_weights * 5 * G
    assert step_on(again, 1, 8).phases["update"].seconds > step_on(setting, 1, 8).phases["update"].seconds


def test_answers_have_their_mean_and_their_limit(setting):
    wide = replace(
        setting,
        config=replace(setting.config, rollout=replace(setting.config.rollout, max_new_tokens=500)),
        answer=100.0,
    )
    ranks = _answers(wide, 4, 50)
    every = [length for rank in ranks for group in rank for length in group.completions]
    assert (len(ranks), len(ranks[0]), len(every)) == (4, 50, 4 * 50 * G)
    assert sum(every) / len(every) == pytest.approx(100, rel=0.01)
    assert _answers(wide, 4, 50) == ranks, "the same whenever they are asked for"
    assert max(length for rank in _answers(setting, 1, 50) for group in rank for length in group.completions) == C


def test_mean_answers_are_possible_ones(setting):
    assert answer_tokens(setting.config, None) == C / 2 and answer_tokens(setting.config, 3) == 3
    for wrong in (0.5, C + 1):
        with pytest.raises(ValueError, match=f"--answer-tokens: want 1 to rollout.max_new_tokens, {C}; got {wrong}"):
            answer_tokens(setting.config, wrong)


def test_scorings_are_those_of_the_training_loop(setting):
    from medground.train import _scorings

    for beta in (0.0, 0.1):
        for old in ("sampled", "rescored"):
            for epochs in (1, 2):
                config = replace(
                    setting.config,
                    rollout=replace(setting.config.rollout, old_logp=old),
                    loss=replace(setting.config.loss, beta=beta, inner_epochs=epochs),
                )
                assert scorings(config) == _scorings(config)
