"""Policies that are not the model they were loaded from."""

from pathlib import Path

import torch

from medground.config import LoraConfig
from medground.policy import Policy, load_policy
from medground.sharding import Ranks, compute_dtype, shard


def moved(base_folder: Path) -> Policy:
    """A policy that is not the base model."""
    policy = load_policy(base_folder)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return policy


def adapted(folder: Path, lora: LoraConfig, ranks: Ranks, precision: str = "float32") -> Policy:
    """A sharded policy whose adapters are more than zeros."""
    policy = load_policy(folder, compute_dtype(ranks, precision))
    policy.add_adapters(lora, seed=1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return shard(policy, ranks, precision)
