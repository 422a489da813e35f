"""Advantages within groups: against float64, TRL's formula and special groups, in plain torch and as kernels."""

import math

import pytest
import torch
from closeness import assert_as_close_as_pytorch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import medground_kernels.group_advantage as module
from medground_kernels.group_advantage import group_advantage, group_advantage_reference

pytestmark = pytest.mark.usefixtures("path")
MODES = [("group", False), ("batch", False), ("none", False), ("group", True), ("batch", True)]
every_mode = pytest.mark.parametrize(("normalize", "per_reward"), MODES)


def against_the_truth(rewards, weights=None, **options):
    def double(t):
        return None if t is None else t.double()

    ours = group_advantage(rewards, weights=weights, **options)
    assert ours.dtype == torch.float32 and ours.is_contiguous() and not ours.requires_grad
    truth = group_advantage_reference(double(rewards), weights=double(weights), **options)
    plain = group_advantage_reference(rewards.float(), weights=weights, **options)
    assert_as_close_as_pytorch({"advantage": ours}, {"advantage": plain}, {"advantage": truth}, slack=3e-7)


def some(B, G, K):
    """Rewards whose groups, spreads and kinds differ; only the last group's spread is small beside eps."""
    rewards = torch.randn(B, G, K) * torch.linspace(0.5, 3, K) + torch.randn(B, 1, K)
    rewards[-1] = rewards[-1] * 1e-4 + 0.5
    return rewards


def trl(rewards_per_func, num_generations, weights, scale_rewards, aggregation):
    """TRL 1.16, `GRPOTrainer._generate_and_score_completions`, for rewards that are all there."""
    rewards = (rewards_per_func * weights.unsqueeze(0)).nansum(dim=1)
    if aggregation == "sum_then_normalize":
        mean = rewards.view(-1, num_generations).mean(dim=1).repeat_interleave(num_generations)
        std = rewards.view(-1, num_generations).std(dim=1).repeat_interleave(num_generations)
        if scale_rewards == "batch":
            std = rewards.std().expand_as(rewards)
        advantages = rewards - mean
        return advantages / (std + 1e-4) if scale_rewards != "none" else advantages
    grouped = rewards_per_func.view(-1, num_generations, len(weights))
    reward_k = (grouped - grouped.mean(dim=1, keepdim=True)) / (grouped.std(dim=1, keepdim=True) + 1e-4)
    rewards = (reward_k.view(-1, len(weights)) * weights.unsqueeze(0)).nansum(dim=1)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


@pytest.fixture
def guarded(monkeypatch):
    """Memory that an op takes for its results starts as NaN and is followed by more of them, which must stay."""
    empty, taken = torch.empty, []

    def guarded_empty(*shape, **options):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        taken.append((empty(shape.numel() + 2000, **options).fill_(math.nan), shape.numel()))
        return taken[-1][0][: shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    yield
    assert all(memory[size:].isnan().all() for memory, size in taken)


@pytest.mark.parametrize("normalize", ["group", "batch", "none"])
def test_equals_the_definition(normalize):
    torch.manual_seed(0)
    rewards = torch.rand(5, 7)
    advantages = group_advantage(rewards, normalize=normalize)
    middle = rewards.double().mean()
    for row, got in zip(rewards.double(), advantages, strict=True):
        want = row - row.mean()
        if normalize == "group":
            want = want / ((want.square().sum() / 6).sqrt() + 1e-4)
        if normalize == "batch":
            want = want / (((rewards.double() - middle).square().sum() / 34).sqrt() + 1e-4)
        torch.testing.assert_close(got.double(), want, atol=2e-7, rtol=2e-7)


@every_mode
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 3, 3), (7, 7, 2), (16, 8, 3), (2, 1000, 2)])
def test_as_close_to_the_truth_as_pytorch(shape, normalize, per_reward, guarded):
    torch.manual_seed(0)
    rewards = some(*shape)
    options = {"normalize": normalize, "per_reward": per_reward}
    against_the_truth(rewards, torch.linspace(-0.5, 2, shape[2]), **options)
    against_the_truth(rewards, **options)
    against_the_truth(rewards[..., 0], **options)
    against_the_truth(rewards, eps=0.5, **options)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 9),
    G=st.integers(2, 20),
    K=st.integers(1, 4),
    mode=st.sampled_from(MODES),
    weighted=st.booleans(),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    eps=st.sampled_from([1e-4, 1e-2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(B, G, K, mode, weighted, offset, eps, dtype, seed):
    torch.manual_seed(seed)
    rewards = (some(B, G, K) + offset).to(dtype)
    weights = torch.rand(K) * 2 if weighted else None
    ours = group_advantage(rewards, weights=weights, normalize=mode[0], per_reward=mode[1], eps=eps)
    assert torch.equal(
        ours, group_advantage(rewards.float(), weights=weights, normalize=mode[0], per_reward=mode[1], eps=eps)
    )
    against_the_truth(rewards, weights, normalize=mode[0], per_reward=mode[1], eps=eps)


@pytest.mark.parametrize("block", [8, 64])
def test_a_batch_of_many_blocks(block, monkeypatch, guarded):
    monkeypatch.setattr(module, "BLOCK", block)
    torch.manual_seed(0)
    against_the_truth(some(21, 3, 1), normalize="batch")
    against_the_truth(some(16, 4, 2), normalize="batch", per_reward=True)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equals_trl(scale_rewards):
    torch.manual_seed(0)
    rewards, weights = torch.rand(6, 8, 3), torch.tensor([1.0, 0.5, 2.0])
    want = trl(rewards.double().flatten(0, 1), 8, weights.double(), scale_rewards, "sum_then_normalize")
    got = group_advantage(rewards, weights=weights, normalize=scale_rewards)
    torch.testing.assert_close(got.flatten().double(), want, atol=1e-6, rtol=1e-6)


def test_equals_trl_a_reward_at_a_time():
    torch.manual_seed(0)
    rewards, weights = torch.rand(6, 8, 3), torch.tensor([1.0, 0.5, 2.0])
    want = trl(rewards.double().flatten(0, 1), 8, weights.double(), "group", "normalize_then_sum")
    got = group_advantage(rewards, weights=weights, normalize="batch", per_reward=True)
    torch.testing.assert_close(got.flatten().double(), want, atol=1e-6, rtol=1e-6)


def test_a_reward_at_a_time_counts_small_kinds_as_much_as_large_ones():
    kinds = torch.tensor([[[0.0, 100.0], [1.0, 0.0], [0.0, 100.0], [1.0, 0.0]]])
    assert group_advantage(kinds, per_reward=True).abs().max() < 1e-3
    assert group_advantage(kinds).abs().min() > 0.8
    one = kinds[..., :1]
    torch.testing.assert_close(group_advantage(one, per_reward=True), group_advantage(one))


@every_mode
@pytest.mark.parametrize("value", [0.1, 1e7, -3e38, 1e-40])
@pytest.mark.parametrize("G", [3, 8])
def test_a_group_without_spread_gives_exactly_nothing(value, G, normalize, per_reward):
    rewards = torch.full((2, G, 3), value)
    rewards[1] = torch.rand(G, 3)
    options = {"normalize": normalize, "per_reward": per_reward}
    for weights in (torch.tensor([0.1, 0.7, 1 / 3]), torch.tensor([1.0, 0.0, -0.2])):
        got = group_advantage(rewards, weights=weights, **options)
        assert (got[0] == 0).all() and got[1].abs().min() > 0
        assert (group_advantage(rewards[:1], weights=weights, **options) == 0).all()
    assert (group_advantage(rewards[..., 0], **options)[0] == 0).all()


def test_rewards_whose_sums_agree_give_exactly_nothing():
    rewards = torch.tensor([[[0.1, 0.2], [0.3, 0.0], [0.0, 0.3]]])  # in float64 the sums differ in the ninth digit
    for normalize in ("group", "batch", "none"):
        assert (group_advantage(rewards, normalize=normalize) == 0).all()


def test_a_small_spread_about_a_large_mean():
    rewards = torch.tensor([[1e6, 1e6 + 1, 1e6 + 2], [0.0, 1e-6, 0.0]])
    got = group_advantage(rewards)
    torch.testing.assert_close(got[0], torch.tensor([-1.0, 0, 1]) / 1.0001, atol=1e-7, rtol=0)
    torch.testing.assert_close(got[1], torch.tensor([-1.0, 2, -1]) / 3e6 / (1e-4 + 1e-6 / 3**0.5), atol=1e-9, rtol=0)


@every_mode
def test_a_mean_common_to_all_groups_costs_no_digits(normalize, per_reward):
    torch.manual_seed(0)
    small = torch.randint(0, 9, (7, 3)).float()
    options = {"normalize": normalize, "per_reward": per_reward}
    near, far = group_advantage(small, **options), group_advantage(small + 10_000_001, **options)
    torch.testing.assert_close(far, near, atol=2e-7, rtol=2e-7)


@every_mode
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 3])
def test_a_bad_reward_spoils_its_group_and_no_other(bad, where, normalize, per_reward):
    torch.manual_seed(0)
    rewards, options = torch.rand(4, 5, 2), {"normalize": normalize, "per_reward": per_reward}
    others = [i for i in range(4) if i != where]
    want = group_advantage(rewards[others], **options)
    rewards[where, 2, 1] = bad
    got = group_advantage(rewards, **options)
    assert got[where].isnan().all()
    torch.testing.assert_close(got[others], want, atol=1e-7, rtol=1e-6)
    assert group_advantage(rewards[[where]], **options).isnan().all()


@every_mode
def test_rewards_may_lie_apart(normalize, per_reward):
    torch.manual_seed(0)
    wide, weights = torch.rand(3, 12, 8), torch.rand(6)[::2]
    options = {"normalize": normalize, "per_reward": per_reward}
    for view in (
        wide.permute(1, 2, 0),
        wide.permute(2, 1, 0)[::2, 1::3],
        wide[:2, :5, 1::3],
        wide[:, :1, :3].expand(3, 4, 3),
    ):
        near = group_advantage(view.contiguous(), weights=weights.contiguous(), **options)
        assert torch.equal(group_advantage(view, weights=weights, **options), near)
    assert torch.equal(group_advantage(wide[0].T, **options), group_advantage(wide[0].T.contiguous(), **options))


@every_mode
def test_no_groups(normalize, per_reward):
    options = {"normalize": normalize, "per_reward": per_reward}
    assert group_advantage(torch.zeros(0, 4), **options).shape == (0, 4)
    assert group_advantage(torch.zeros(0, 4, 2), weights=torch.ones(2), **options).dtype == torch.float32


@every_mode
def test_the_same_twice_and_nothing_to_learn_from(normalize, per_reward):
    rewards = torch.rand(9, 6, 2, requires_grad=True)
    weights = torch.rand(2, requires_grad=True)
    first, second = (
        group_advantage(rewards, weights=weights, normalize=normalize, per_reward=per_reward) for _ in range(2)
    )
    assert torch.equal(first, second) and not first.requires_grad


def test_mistakes_are_named():
    rewards = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match=r"G >= 2, K >= 1; got \(3, 1\)"):
        group_advantage(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        group_advantage(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \(3, 2, 4, 1\)"):
        group_advantage(rewards[..., None])
    with pytest.raises(ValueError, match=r"got \(3, 2, 0\)"):
        group_advantage(rewards[..., :0])
    with pytest.raises(ValueError, match="float64"):
        group_advantage(rewards.double())
    with pytest.raises(ValueError, match=r"got \(3,\), \(3, 2, 4\)"):
        group_advantage(rewards, weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"got \(\), \(3, 2\)"):
        group_advantage(rewards[..., 0], weights=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"float32 weights; got torch\.int64"):
        group_advantage(rewards, weights=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="rank"):
        group_advantage(rewards, normalize="rank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'none', per_reward=True"):
        group_advantage(rewards, normalize="none", per_reward=True)
    for eps in (0, -1e-4, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"eps > 0; got {eps}"):
            group_advantage(rewards, eps=eps)
