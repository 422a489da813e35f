"""The policy, its reference and its optimizer, as a configuration says.

No rank ever holds the whole model but where it has to decode: the model is made without weights, sharded, and each
rank reads its own rows of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from medground.activation_checkpointing import checkpoint_activations
from medground.adamw import adamw
from medground.config import Config
from medground.lora import draw_adapters
from medground.packing import Packed
from medground.policy import Policy, empty_policy
from medground.sharding import Ranks, compute_dtype, own_rows, shard
from medground.weight_files import Stored, check_weights, read_weights
from medground_kernels.token_logprob import TokenLogprob

Score = Callable[[Packed, float], TokenLogprob]
"""`Policy.forward`, or what stands in for it."""


def build_policy(folder: Path, config: Config, ranks: Ranks) -> Policy:
    """What is trained, sharded: float32, or adapters in float32 and the rest in the compute dtype.

    Raises:
        ValueError: the folder's weights are not those of its model; on every rank, as of all of these.
    """
    lora, model = config.model.lora, config.model
    policy = empty_policy(folder, compute_dtype(ranks, model.precision) if lora.rank else torch.float32)
    if lora.rank:
        policy.add_adapters(lora, seed=None)
    else:
        policy.vlm.model.visual.requires_grad_(not model.freeze_vision)
    checkpoint_activations(policy.vlm, model.activation_checkpointing, compiled=model.compile)
    _place(policy, folder, config, ranks)
    if lora.rank:
        draw_adapters(policy.vlm, config.seed, _put)
    return policy.train()


def build_reference(policy: Policy, folder: Path, config: Config, ranks: Ranks) -> Score | None:
    """What the KL term holds on to: the policy without its adapters, or a second model, frozen, in compute dtype."""
    if not config.loss.beta:
        return None
    if config.model.lora.rank:
        return partial(policy, adapters=False)
    reference = empty_policy(folder, compute_dtype(ranks, config.model.precision)).requires_grad_(False)
    _place(reference, folder, config, ranks)
    cast(FSDPModule, reference).set_reshard_after_forward(True)  # the root's too: no backward pass needs it
    return reference.eval()


def build_whole(folder: Path, dtype: torch.dtype, ranks: Ranks) -> Policy:
    """A policy that is asked and never trained: whole on every rank, frozen, in `dtype`.

    Raises:
        ValueError: the folder's weights are not those of its model; on every rank.
    """
    policy = empty_policy(folder, dtype).requires_grad_(False)
    stored = ranks.together(lambda: check_weights(policy.vlm, folder))
    _fill(policy, stored, ranks, ranks.device)
    return policy.eval()


def build_optimizer(policy: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return adamw(trained, config.optimizer)


def _place(policy: Policy, folder: Path, config: Config, ranks: Ranks) -> None:
    """Shard a policy without weights, and fill them from its folder, adapters aside."""
    stored = ranks.together(lambda: check_weights(policy.vlm, folder))
    if config.model.compile:
        policy.compile_layers()
    offload = config.sharding.cpu_offload
    shard(policy, ranks, config.model.precision, cpu_offload=offload)
    _fill(policy, stored, ranks, torch.device("cpu") if offload else ranks.device)


def _fill(policy: Policy, stored: dict[str, Stored], ranks: Ranks, device: torch.device) -> None:
    """Give a policy on "meta" its memory on a device, and what it holds there; buffers stay as they are."""
    buffers = {name: buffer.to(ranks.device) for name, buffer in policy.named_buffers()}
    policy.to_empty(device=device)
    for name, buffer in buffers.items():
        policy.set_tensor(name, buffer)
    if not isinstance(policy, FSDPModule):  # which keeps what is tied
        policy.vlm.tie_weights()
    ranks.together(lambda: read_weights(policy.vlm, stored, own_rows))


def _put(parameter: Tensor, whole: Tensor) -> None:
    local, start, stop = own_rows(parameter)
    local.copy_(whole[start:stop])
