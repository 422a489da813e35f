"""The least time that a step of ours can take, phase by phase, from rates measured on the same device.

    prefill, score, update   operations (`medground.costs`) at the rate of one large matrix product
    decode                   weights and caches read once a step, or its operations, whichever takes longer, and the
                             copy of the weights that decodes, refreshed
    optimizer                AdamW's weights, gradients and moments, read and written, at the rate of a copy; the
                             norm's gradients read once more
Data, reward and checkpoint have no floor of the device's.
"""

from typing import NamedTuple

import torch

from bench.packed_floors import copy_rate, product_rate
from bench.step_job import PHASES, Job
from bench.step_ours import OurSide
from medground.costs import Sizes, sizes_of, step_operations
from medground.policy import Policy
from medground.rollout.cache import bytes_per_token

_ADAMW_BYTES = 7 * 4  # reads weight, gradient and two moments, writes all but the gradient; float32
_NORM_BYTES = 4


class Rates(NamedTuple):
    """Bytes a second of a copy, read and write counted; operations a second of a product."""

    copy: float
    product: float


class Model(NamedTuple):
    """What floors need to know beside the operations.

    Attributes:
        parameters: trained ones.
        refresh_bytes: what bringing the weights that decode up to date reads and writes.
        weights: elements that a decoding step reads.
        itemsize: bytes of one.
        token_bytes: keys and values of a token.
    """

    parameters: int
    refresh_bytes: int
    weights: int
    itemsize: int
    token_bytes: int


def measure_rates(job: Job) -> Rates:
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    return Rates(copy_rate(job.device), product_rate(job.device, dtype))


def step_floors(ours: OurSide, rates: Rates) -> dict[str, float]:
    """Seconds of each phase of the last step."""
    policy, whole = ours.asker.policy, ours.asker.whole.policy
    model = Model(
        _trained(policy),
        refresh_bytes(policy, whole.vlm.lm_head.weight.itemsize),
        ours.network.token_weights + ours.network.head_weights,
        whole.vlm.lm_head.weight.itemsize,
        bytes_per_token(whole.vlm.config.text_config, whole.vlm.lm_head.weight.dtype),
    )
    groups = sizes_of(ours.groups)
    return floors(model, groups, step_operations(ours.network, groups), rates)


def floors(model: Model, groups: list[Sizes], operations: dict[str, float], rates: Rates) -> dict[str, float]:
    """Seconds of each phase; operations of phases that have any."""
    found = dict.fromkeys(PHASES, 0.0) | {phase: needed / rates.product for phase, needed in operations.items()}
    reading = decode_bytes(model, groups) / rates.copy
    found["decode"] = max(found["decode"], reading) + model.refresh_bytes / rates.copy
    found["optimizer"] = model.parameters * (_ADAMW_BYTES + _NORM_BYTES) / rates.copy
    return found


def refresh_bytes(policy: Policy, itemsize: int) -> int:
    """What a refresh reads and writes: trained weights or, merged with adapters, what those were added to."""
    if not policy.lora.rank:
        return _trained(policy) * (4 + itemsize)
    adapted = sum(weight.numel() for name, weight in policy.named_parameters() if name.endswith("base_layer.weight"))
    return _trained(policy) * 4 + adapted * 2 * itemsize


def _trained(policy: Policy) -> int:
    return sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)


def decode_bytes(model: Model, groups: list[Sizes]) -> float:
    """What all decoding steps read, all rows running at once: weights, running groups' prompts, rows' own tokens."""
    steps = max(max(group.completions) for group in groups) - 1
    tokens = 0
    for group in groups:
        tokens += group.prompt * (max(group.completions) - 1)
        tokens += sum(length * (length - 1) // 2 for length in group.completions)
    return float(steps * model.weights * model.itemsize + tokens * model.token_bytes)
