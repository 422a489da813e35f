"""Ranks: mistakes are everyone's, weights come back sharded."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from medground.policy import load_policy
from medground.sharding import gathered, join_ranks, shard


def test_a_mistake_on_one_rank_is_raised():
    def fail():
        raise ValueError("the file is missing")

    with join_ranks() as ranks:
        assert ranks.together(lambda: 7) == 7
        with pytest.raises(ValueError, match="the file is missing"):
            ranks.together(fail)
        assert ranks.gather("x") == ["x"] and ranks.is_first


def test_weights_are_whole_inside_and_sharded_outside(base_folder: Path):
    with join_ranks() as ranks:
        policy = shard(load_policy(base_folder), ranks, "float32")
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        with gathered(policy):
            assert not any(isinstance(p, DTensor) for p in policy.parameters())
            assert not torch.is_grad_enabled()
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        with pytest.raises(RuntimeError, match="inside"), gathered(policy):
            raise RuntimeError("inside")
        assert all(isinstance(p, DTensor) for p in policy.parameters())


def test_half_precision_computes_in_half(base_folder: Path):
    with join_ranks() as ranks:
        policy = shard(load_policy(base_folder), ranks, "bfloat16")
        assert all(p.dtype == torch.float32 for p in policy.parameters())
        with gathered(policy):
            assert policy.vlm.lm_head.weight.dtype == torch.bfloat16
