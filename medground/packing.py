"""Groups -> one flat stream in which each prompt stands once, and groups -> the ranks' micro-batches.

    [prompt | c1 | .. | cG] [prompt | c1 | .. | cG] ..

Completions continue the positions of their prompt and attend to it and to themselves (docs/packing.md), so that the
stream gives the log-probabilities and gradients of G rows [prompt | completion] with G - 1 prompts less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from medground.records import Group, Prompt
from medground_kernels.prefix_attention import PrefixLayout, prefix_layout

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


class Packed(NamedTuple):
    """B groups as one stream of T tokens, on the device.

    Attributes:
        input_ids: [T], int64.
        position_ids: [3, T], int64, of the M-RoPE (time, height, width).
        pixel_values: [patches, patch_features], float32, each distinct image once.
        image_grids: patches of each distinct image along time, height and width; numbers, for which nothing waits.
        image_at: [n], int64, where image tokens stand in the stream; never in a completion.
        image_from: [n], int64, their rows among the features of all images.
        ends: [B], int64, the last token of each prompt.
        scored: [N], int64, the tokens that predict a completion token.
        targets: [N], int64, the tokens that they predict.
        cu_seqlens: [S+1], int32, where each completion starts in the N tokens.
        layout: who attends to whom.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_grids: list[list[int]]
    image_at: Tensor
    image_from: Tensor
    ends: Tensor
    scored: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    layout: PrefixLayout


def pack(groups: Sequence[Group], config: Qwen2_5_VLConfig, device: torch.device) -> Packed:
    """Lay groups out as one stream, ready for the device.

    Raises:
        ValueError: a group has no completion, or a completion no token; names the record.
    """
    for group in groups:
        if not group.rollouts or not all(len(rollout.tokens) for rollout in group.rollouts):
            lengths = [len(rollout.tokens) for rollout in group.rollouts]
            name = group.prompt.example.id
            raise ValueError(f"record {name}: want completions of one token or more; got {lengths or 'none'}")
    completions = [[rollout.tokens for rollout in group.rollouts] for group in groups]
    return _pack([group.prompt for group in groups], completions, config, device)


def pack_prompts(prompts: Sequence[Prompt], config: Qwen2_5_VLConfig, device: torch.device) -> Packed:
    """The same of prompts that have no completions yet."""
    return _pack(prompts, [[] for _ in prompts], config, device)


def _pack(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], config: Qwen2_5_VLConfig, device: torch.device
) -> Packed:
    pixels, grids, image_rows = _distinct_images(prompts, config.vision_config.spatial_merge_size**2)
    ids, positions, ends, scored, image_at, image_from = [], [], [], [], [], []
    start = 0
    for prompt, tokens in zip(prompts, completions, strict=True):
        P, lengths = len(prompt.input_ids), torch.tensor([len(c) for c in tokens], dtype=torch.int64)
        own = torch.cat([prompt.input_ids[:0], *tokens])
        firsts = lengths.cumsum(0) - lengths
        within = torch.arange(len(own)) - firsts.repeat_interleave(lengths)
        following = prompt.position_ids.max() + 1 + within
        ids += [prompt.input_ids, own]
        positions += [prompt.position_ids, following.expand(3, -1)]
        predicting = start + P - 1 + torch.arange(len(own))
        predicting[firsts] = start + P - 1  # the prompt's last token predicts each completion's first
        scored.append(predicting)
        ends.append(start + P - 1)
        places = (prompt.input_ids == config.image_token_id).nonzero()[:, 0]
        rows = [image_rows[key] for key in prompt.image_keys]
        wanted = sum(len(row) for row in rows)
        if len(places) != wanted:
            name = prompt.example.id
            raise ValueError(f"record {name}: want {wanted} image tokens for its images; got {len(places)}")
        image_at.append(places + start)
        image_from += rows
        start += P + len(own)
    targets = [c for tokens in completions for c in tokens]
    tensors = {
        "input_ids": torch.cat(ids),
        "position_ids": torch.cat(positions, 1),
        "pixel_values": pixels,
        "image_at": torch.cat(image_at),
        "image_from": torch.cat([image_at[0][:0], *image_from]),
        "ends": torch.tensor(ends),
        "scored": torch.cat(scored),
        "targets": torch.cat([ids[0][:0], *targets]),
        "cu_seqlens": torch.tensor([0, *map(len, targets)]).cumsum(0).int(),
    }
    moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
    sizes = [(len(p.input_ids), [len(c) for c in tokens]) for p, tokens in zip(prompts, completions, strict=True)]
    return Packed(**moved, image_grids=grids, layout=prefix_layout(sizes, device))


def _distinct_images(prompts: Sequence[Prompt], merged: int) -> tuple[Tensor, list[list[int]], dict[str, Tensor]]:
    """Patches and grids of each distinct image, and the rows of its features by its key."""
    pixels, grids, rows = [], [], {}
    row = 0
    for prompt in prompts:
        patch = 0
        for key, grid in zip(prompt.image_keys, prompt.image_grid_thw.tolist(), strict=True):
            patches = math.prod(grid)
            if key not in rows:
                rows[key] = torch.arange(row, row + patches // merged)
                pixels.append(prompt.pixel_values[patch : patch + patches])
                grids.append(grid)
                row += patches // merged
            patch += patches
    return torch.cat(pixels) if pixels else prompts[0].pixel_values[:0], grids, rows
