"""Advantages within groups."""

import pytest
import torch

from medground_kernels.group_advantage import group_advantage

pytestmark = pytest.mark.usefixtures("on_the_gpu")


@pytest.mark.parametrize("normalize", ["group", "none"])
def test_equals_the_definition(normalize):
    rewards = torch.rand(5, 7)
    advantages = group_advantage(rewards, normalize=normalize)
    for row, got in zip(rewards.double(), advantages, strict=True):
        want = row - row.mean()
        if normalize == "group":
            want = want / ((want.square().sum() / 6).sqrt() + 1e-4)
        torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [0.1, 0.3, 1e7, 0.0])
@pytest.mark.parametrize("G", [2, 3, 7, 8])
def test_a_group_without_spread_gives_exactly_nothing(value, G):
    rewards = torch.full((2, G), value)
    assert (group_advantage(rewards) == 0).all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"G >= 2; got \(3, 1\)"):
        group_advantage(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="rank"):
        group_advantage(torch.zeros(3, 2), normalize="rank")  # type: ignore[arg-type]
