"""An update of a small model on groups of very different sizes."""

from collections.abc import Sequence

import torch
from stream_cases import made_group, made_prompt, policy_of, small_model
from torch import Tensor

from medground.config import Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig, RolloutConfig
from medground.records import Group
from medground.sharding import Ranks, shard
from medground.step_metrics import Clock, Totals
from medground.train import _micro_batches, _score, _update

LARGEST = 150


def all_groups() -> list[tuple[Group, Tensor]]:
    """Six groups, most of the work in the first three, only three with an image; and their advantages [4]."""
    torch.manual_seed(5)
    prompts = [
        made_prompt("a", [30, 4], [(5, 5)]),
        made_prompt("b", [3, 2, 9], [(2, 2), (4, 4)], seed=1),
        made_prompt("c", [60], seed=2),
        made_prompt("d", [3], seed=3),
        made_prompt("e", [2, 2], [(2, 1)], seed=4),
        made_prompt("f", [4], seed=5),
    ]
    lengths = [[30, 20, 17, 9], [25, 1, 40, 3], [20, 21, 22, 23], [1, 2, 1, 1], [3, 2, 2, 5], [1, 1, 1, 1]]
    return [(made_group(p, c, seed=i), torch.randn(4)) for i, (p, c) in enumerate(zip(prompts, lengths, strict=True))]


def update(
    items: Sequence[tuple[Group, Tensor]], ranks: Ranks, budget: int, loss: LossConfig
) -> tuple[dict[str, Tensor], dict[str, float], int]:
    """A huge step of plain gradient descent, which leaves little but the gradient.

    Returns:
        Whole weights, statistics, and how many groups came from other ranks.
    """
    config = Config(
        out="unused",
        steps=2,
        model=ModelConfig(path="unused"),
        data=DataConfig(path=("unused",)),
        rollout=RolloutConfig(group_size=4, max_new_tokens=40),
        loss=LossConfig(**vars(loss) | {"micro_batch_tokens": budget}),
        optimizer=OptimizerConfig(lr=1e9, warmup_steps=0, max_grad_norm=1e9),
    )
    policy = shard(policy_of(small_model()), ranks, "float32").train()
    reference = shard(policy_of(small_model(seed=9)), ranks, "float32") if loss.beta else None
    optimizer = torch.optim.SGD(policy.parameters())
    everything = all_groups()
    totals = Totals(sum(len(r.tokens) for g, _ in everything for r in g.rollouts), 4 * len(everything), {})
    groups, advantages = [group for group, _ in items], torch.stack([advantage for _, advantage in items])
    micro = _micro_batches(policy, groups, advantages, config, ranks)
    names = {group.prompt.input_ids.sum().item() for group in groups}
    trained = [b.packed.input_ids[: int(b.packed.ends[0]) + 1].sum().item() for b in micro]
    _score(policy, reference, micro, config)
    statistics = _update(policy, optimizer, micro, totals, config, ranks, 0, Clock())
    weights = {name: p.full_tensor().detach().clone() for name, p in policy.named_parameters()}
    return weights, statistics, len(set(trained) - names)


def assert_same_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Weights after a step so large that they are hardly more than their gradient."""
    total = torch.cat([weight.flatten() for weight in theirs.values()]).norm()
    assert total > 1000
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= 5e-6 * max(want.norm(), 1e-2 * total), name
