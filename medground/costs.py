"""Operations of a step: what has to be computed, by phase, each prompt once.

A multiplication and an addition are two operations. Counted are the matrix products of language model, head and vision
tower, and attention's two products over the pairs of tokens that see each other. Not counted are norms, activations,
softmax and sampling, and what is computed a second time to save memory. An update makes three products with a matrix:
its output, its input's gradient and its own; with a frozen one it makes two, and below the first trained one the output
alone. Adapters count in the update only, since merged they cost nothing. So the counts are the same for every trainer
of the same job, and

    model FLOPs utilisation (MFU) = operations / (seconds * peak rate * GPUs)

compares them (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from medground.policy import Policy
    from medground.records import Group
    from medground.sharding import Ranks

PEAK_RATES = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L20": 119.5e12, "L4": 121e12,
    "A40": 149.7e12, "RTX 6000 Ada": 364e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "RTX A6000": 154.8e12,
}  # fmt: skip
"""Dense bfloat16 products with float32 sums a second, from NVIDIA's data sheets, by what the GPU's name has in it."""


def peak_rate(device: str) -> float | None:
    """Most bfloat16 operations a second of a GPU by its name; None where it is not known."""
    return next((rate for name, rate in PEAK_RATES.items() if re.search(rf"\b{name}\b", device)), None)


def peak_of(ranks: Ranks, dtype: torch.dtype) -> float | None:
    """The same of all ranks' GPUs, taken to be alike; None on CPUs, in another dtype, where it is not known."""
    if ranks.device.type != "cuda" or dtype != torch.bfloat16:
        return None
    rate = peak_rate(torch.cuda.get_device_name(ranks.device))
    return rate and rate * ranks.size


class Network(NamedTuple):
    """What decides the operations of a Qwen2.5-VL.

    Attributes:
        token_weights: elements of all decoder layers' matrices; every token of the stream meets them.
        token_update: the same, adapters included, each times the products that an update makes with it.
        head_weights: elements of the head, which a token that is scored or drawn meets.
        head_update: the same, times the products of an update.
        pair_width: heads times their size, over all decoder layers: what two tokens that see each other cost.
        pair_update: the same, times three where an update's backward pass gets to the attention.
        patch_weights: elements of the vision tower's matrices that an image patch meets, its share of the merger's.
        full_width: as pair_width, of the vision blocks that see a whole image.
        window_width: the same of those that see windows.
        window: merged patches along a window's side.
        merge: patches along a merged patch's side.
        vision_trained: whether the vision tower has a backward pass.
    """

    token_weights: int
    token_update: int
    head_weights: int
    head_update: int
    pair_width: int
    pair_update: int
    patch_weights: float
    full_width: int
    window_width: int
    window: int
    merge: int
    vision_trained: bool


class Sizes(NamedTuple):
    """A group: tokens of its prompt, patches of each image along time, height and width, tokens of each completion."""

    prompt: int
    grids: Sequence[Sequence[int]]
    completions: Sequence[int]


def network_of(policy: Policy) -> Network:
    """Of a policy, sharded or not."""
    visual, text, config = policy.vlm.model.visual, policy.vlm.model.language_model, policy.vlm.config
    merge, vision = visual.spatial_merge_size, config.vision_config
    full, head = len(vision.fullatt_block_indexes), policy.vlm.lm_head.weight
    token_update, attentions = _update_products(text)
    return Network(
        token_weights=_matrices(text.layers),
        token_update=token_update,
        head_weights=head.numel(),
        head_update=(2 + head.requires_grad) * head.numel(),
        pair_width=len(text.layers) * config.text_config.hidden_size,
        pair_update=attentions * config.text_config.hidden_size,
        patch_weights=_matrices(visual) + (1 / merge**2 - 1) * _matrices(visual.merger),
        full_width=full * vision.hidden_size,
        window_width=(vision.depth - full) * vision.hidden_size,
        window=visual.window_size // merge // visual.patch_size,
        merge=merge,
        vision_trained=any(weight.requires_grad for weight in visual.parameters()),
    )


def sizes_of(groups: Iterable[Group]) -> list[Sizes]:
    """Of groups as they were sampled."""
    return [
        Sizes(len(g.prompt.input_ids), g.prompt.image_grid_thw.tolist(), [len(r.tokens) for r in g.rollouts])
        for g in groups
    ]


def step_operations(
    network: Network, groups: Sequence[Sizes], *, scorings: int = 0, epochs: int = 1
) -> dict[str, float]:
    """Operations of each phase of a step.

    Args:
        network: the policy's.
        groups: of the step.
        scorings: forward passes for log-probabilities of the old and the reference policy.
        epochs: optimizer steps on each group.
    """
    found = dict.fromkeys(("prefill", "decode", "score", "update"), 0.0)
    for group in groups:
        vision = sum(_image(network, grid) for grid in group.grids)
        weights, width = network.token_weights, network.pair_width
        prompt = _stream(weights, width, group.prompt, [])
        found["prefill"] += vision + prompt + 2.0 * network.head_weights
        # the first token of a completion comes from its prompt's logits, and the last one is never fed to the model
        fed = [length - 1 for length in group.completions]
        found["decode"] += _stream(weights, width, group.prompt, fed) - prompt + 2.0 * network.head_weights * sum(fed)
        forward = _stream(weights, width, group.prompt, group.completions)
        forward += 2.0 * network.head_weights * sum(group.completions)
        found["score"] += scorings * (vision + forward)
        update = _stream(network.token_update, network.pair_update, group.prompt, group.completions)
        update += 2.0 * network.head_update * sum(group.completions)
        found["update"] += epochs * (update + (3 if network.vision_trained else 1) * vision)
    return found


def row_operations(network: Network, groups: Sequence[Sizes]) -> float:
    """Operations of an update on G rows [prompt, completion], each with its own image, head on completions alone."""
    rows = [Sizes(g.prompt, g.grids, [length]) for g in groups for length in g.completions]
    return step_operations(network, rows)["update"]


def _stream(weights: int, width: int, prompt: int, completions: Sequence[int]) -> float:
    """Decoder layers of so many weights, attention of such a width, over a packed group."""
    pairs = prompt * (prompt + 1) / 2 + sum(c * prompt + c * (c + 1) / 2 for c in completions)
    return 2.0 * weights * (prompt + sum(completions)) + 4.0 * width * pairs


def _image(network: Network, grid: Sequence[int]) -> float:
    """The vision tower over an image, or over frames that do not see each other."""
    frames, height, width = grid
    patches = height * width
    in_windows = (
        network.merge**4
        * _squares(height // network.merge, network.window)
        * _squares(width // network.merge, network.window)
    )
    pairs = network.full_width * patches**2 + network.window_width * in_windows
    return frames * (2.0 * network.patch_weights * patches + 4.0 * pairs)


def _squares(length: int, part: int) -> int:
    """Sum of the squares of a length's parts, the last of which may be shorter."""
    whole, rest = divmod(length, part)
    return whole * part**2 + rest**2


def _matrices(module) -> int:
    """Elements of a module's matrices, adapters aside."""
    named = module.named_parameters()
    return sum(weight.numel() for name, weight in named if weight.dim() > 1 and ".lora_" not in name)


def _update_products(text) -> tuple[int, int]:
    """Elements of all decoder layers' matrices and attentions, each times the products that an update makes with it."""
    elements = attentions = 0
    reached = text.embed_tokens.weight.requires_grad  # whether a gradient goes on to what lies below
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for alike in (  # have one input
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ):
            named = [pair for product in alike for pair in product.named_parameters() if pair[1].dim() > 1]
            for name, weight in named:
                # an adapter's second matrix hands a gradient on to its first
                elements += weight.numel() * (1 + (reached or "lora_B" in name) + weight.requires_grad)
            reached = reached or any(weight.requires_grad for _, weight in named)
            if alike[0] is attention.q_proj:
                attentions += 3 if reached else 1
    return elements, attentions
