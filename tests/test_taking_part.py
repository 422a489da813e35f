"""An update of some of the completions against an update of a step that has no others."""

from dataclasses import replace

import pytest
import torch
import uneven_update
from uneven_update import LARGEST, all_groups, assert_same_gradient

from medground.config import LossConfig
from medground.records import Group
from medground.sharding import join_ranks
from medground.step_metrics import Totals

LOSS = LossConfig(beta=0.1, entropy_coef=0.01)


def update(items, monkeypatch, kept=None, loss=LOSS, budget=2 * LARGEST):
    """As `uneven_update.update`; `kept` [B, G] takes part."""
    with join_ranks() as ranks:
        groups = [group for group, _ in items]
        everyone = torch.ones(len(items), 4, dtype=torch.bool)
        totals = Totals(0, 0, {}).of(groups, everyone if kept is None else kept, ranks)
        micro, step = uneven_update._micro_batches, uneven_update._update
        monkeypatch.setattr(uneven_update, "_micro_batches", lambda *args: micro(*args, kept))
        monkeypatch.setattr(uneven_update, "_update", lambda p, o, m, _, *rest: step(p, o, m, totals, *rest))
        got = uneven_update.update(items, ranks, budget, loss)
        monkeypatch.undo()
    return got[:2]


def test_groups_left_out_are_as_if_never_sampled(monkeypatch):
    items = all_groups()
    kept = torch.ones(6, 4, dtype=torch.bool)
    kept[[1, 4]] = False
    ours, ours_stats = update(items, monkeypatch, kept)
    theirs, their_stats = update([items[i] for i in (0, 2, 3, 5)], monkeypatch)
    assert_same_gradient(ours, theirs)
    for name in ("loss", "kl", "entropy", "logp_gap", "ratio_mean"):
        assert ours_stats[name] == pytest.approx(their_stats[name], rel=1e-4), name


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_completions_left_out_give_no_gradient(loss_type, monkeypatch):
    """Against groups that are short of them: three completions of each."""
    loss = replace(LOSS, loss_type=loss_type, entropy_coef=0.0 if loss_type == "grpo" else 0.01)
    items = all_groups()[:3]
    kept = torch.ones(3, 4, dtype=torch.bool)
    kept[:, 1] = False
    ours, ours_stats = update(items, monkeypatch, kept, loss)
    fewer = [(Group(g.prompt, (g.rollouts[0], *g.rollouts[2:])), a[[0, 2, 3]]) for g, a in items]
    three = torch.ones(3, 3, dtype=torch.bool)
    theirs, their_stats = update(fewer, monkeypatch, three, loss)
    assert_same_gradient(ours, theirs)
    for name in ("loss", "kl", "entropy", "logp_gap", "ratio_mean"):
        assert ours_stats[name] == pytest.approx(their_stats[name], rel=1e-4), name


def test_a_step_with_nothing_left_moves_nothing(monkeypatch):
    items = all_groups()[3:]
    weights, stats = update(items, monkeypatch, torch.zeros(3, 4, dtype=torch.bool))
    assert stats["loss"] == stats["grad_norm"] == stats["logp_gap"] == 0
    assert all(value == value for value in stats.values())
    assert max(weight.abs().max() for weight in weights.values()) < 100  # a step of 1e9 times a gradient
