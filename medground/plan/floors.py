"""The least time that the phases of a step can take on one device, from rates of products and of a copy.

prefill, score, update   operations (`medground.costs`) at the rate of products
decode                   weights and caches read once a step, or its operations, whichever takes longer, and the
                         copy of the weights that decodes, refreshed
optimizer                AdamW's weights, gradients and moments, read and written, at the rate of a copy; the
                         norm's gradients read once more
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from medground.costs import Network, Sizes, network_of
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
        parameters: trained ones, that this rank has.
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


class Decoding(NamedTuple):
    """Steps that it takes to draw all completions, and tokens whose keys and values these read."""

    steps: int
    tokens: int


def model_of(policy: Policy, itemsize: int, network: Network | None = None) -> Model:
    """Of a policy, sharded or not, that decodes in elements of so many bytes; on one rank."""
    network, text = network or network_of(policy), policy.vlm.config.text_config
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    return Model(
        _trained(policy),
        refresh_bytes(policy, itemsize),
        network.token_weights + network.head_weights,
        itemsize,
        bytes_per_token(text, dtype),
    )


def floors(
    model: Model, groups: Sequence[Sizes], operations: Mapping[str, float], rates: Rates, slots: int | None = None
) -> dict[str, float]:
    """Seconds of each phase; of prefill, score and update from operations.

    Args:
        model: what decodes and is trained.
        groups: of this rank.
        operations: by phase.
        rates: of the device.
        slots: rows that decode at once; None for all.
    """
    found = {phase: needed / rates.product for phase, needed in operations.items()}
    reading = decode_bytes(model, groups, slots) / rates.copy
    found["decode"] = max(found.get("decode", 0.0), reading) + model.refresh_bytes / rates.copy
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


def decode_bytes(model: Model, groups: Sequence[Sizes], slots: int | None = None) -> float:
    """What all decoding steps read: weights, prompts of running groups, rows' own tokens."""
    steps, tokens = decoding(groups, slots)
    return float(steps * model.weights * model.itemsize + tokens * model.token_bytes)


def decoding(groups: Sequence[Sizes], slots: int | None = None) -> Decoding:
    """Rows take slots in their order, each as soon as one is free; a completion's first token needs no step."""
    free = [0] * (slots or sum(len(group.completions) for group in groups))
    tokens = last = 0
    for group in groups:
        spans = []
        for length in group.completions:
            start = heapq.heappop(free)
            heapq.heappush(free, start + length - 1)
            spans.append((start, start + length - 1))
            tokens += length * (length - 1) // 2
        until = 0
        for start, end in sorted(spans):
            tokens += group.prompt * max(end - max(start, until), 0)
            until = max(until, end)
        last = max(last, until)
    return Decoding(last, tokens)
