"""What a step may have to do at most, and what it does on average: prompts, completions, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from medground.config import Config
from medground.datasets.manifest import load_records
from medground.prompts import load_processor, mrope_positions, prompt_tokens
from medground.records import Example, Group, Prompt, Rollout

TEXT_TOKENS = 160
"""Assumed: the longest template with its chat takes about 100 tokens, a long phrase 60."""
UNKNOWN_STEPS = 1000
"""Assumed where a run is in epochs and its data are not here."""


class PromptSize(NamedTuple):
    """The longest prompt: tokens of text, patches of the image along height and width, and how that is known."""

    text: int
    grid: tuple[int, int]
    told: str

    @property
    def tokens(self) -> int:
        """Of text and image, four patches to a token."""
        return self.text + math.prod(self.grid) // 4


class MicroBatch(NamedTuple):
    """The largest micro-batch that `loss.micro_batch_tokens` allows, and how many a rank may have.

    Attributes:
        lengths: of each group the tokens of its completions.
        tokens: of all, prompts included.
        number: 2 where a rank's groups may need more than one; more take no more memory than two.
    """

    lengths: list[list[int]]
    tokens: int
    number: int


def longest_prompt(config: Config, text_tokens: int | None = None) -> PromptSize:
    """Of a data folder and model folder that are there, or else of `data.max_pixels` and so many tokens of text."""
    tokenizer = Path(config.model.path) / "tokenizer_config.json"
    if text_tokens is None and _data_is_here(config) and tokenizer.is_file():
        return _measured_prompt(config)
    side = config.data.max_pixels // 28**2
    if not side:
        raise ValueError(f"data.max_pixels: want 784 or more, one token of an image; got {config.data.max_pixels}")
    rows = math.isqrt(side)
    text = TEXT_TOKENS if text_tokens is None else text_tokens
    how = "assumed" if text_tokens is None else "given"
    return PromptSize(text, (2 * rows, 2 * (side // rows)), f"image of data.max_pixels, text {how}")


def _measured_prompt(config: Config) -> PromptSize:
    examples = [example for folder in config.data.path for example in load_records(folder)]
    processor = load_processor(Path(config.model.path), config.data.min_pixels, config.data.max_pixels)
    tokens = {example.id: prompt_tokens(example, processor, config.prompt.template) for example in examples}
    text = max(words for words, _ in tokens.values())
    largest = max(examples, key=lambda example: tokens[example.id][1])
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    height, width = smart_resize(largest.height, largest.width, 28, **limits)
    return PromptSize(
        text, (height // 14, width // 14), f"longest text and largest image of {', '.join(config.data.path)}"
    )


def in_steps(config: Config) -> Config:
    """The configuration with steps: those that its epochs come to, or 1000 where the data are not here."""
    if not _data_is_here(config):
        return replace(config, steps=config.steps or UNKNOWN_STEPS, epochs=0)
    records = [load_records(folder) for folder in config.data.path]
    return config.in_steps(sum(example.split == config.data.train_split for part in records for example in part))


def _data_is_here(config: Config) -> bool:
    return all((Path(folder) / "records.jsonl").is_file() for folder in config.data.path)


def check_sizes(config: Config, prompt: PromptSize, gpus: int, context: int) -> None:
    """See that the ranks can share a step's prompts, and that prompts, completions and groups fit their limits.

    Raises:
        ValueError: naming the option.
    """
    r, P = config.rollout, prompt.tokens
    if gpus < 1:
        raise ValueError(f"--gpus: want 1 or more; got {gpus}")
    if r.prompts_per_step % gpus:
        raise ValueError(f"rollout.prompts_per_step: want a multiple of the {gpus} GPUs; got {r.prompts_per_step}")
    if P + r.max_new_tokens > context:
        raise ValueError(
            f"data.max_pixels, rollout.max_new_tokens: want a prompt and {r.max_new_tokens} new tokens within the "
            f"model's context of {context} tokens; got a prompt of {P} ({prompt.told})"
        )
    group = group_tokens(config, prompt)
    if group > config.loss.micro_batch_tokens:
        raise ValueError(
            f"loss.micro_batch_tokens: want at least {group}, a prompt of {P} tokens ({prompt.told}) and "
            f"{r.group_size} completions of {r.max_new_tokens}; got {config.loss.micro_batch_tokens}"
        )


def group_tokens(config: Config, prompt: PromptSize) -> int:
    """Of the largest group."""
    return prompt.tokens + config.rollout.group_size * config.rollout.max_new_tokens


def rank_tokens(config: Config, prompt: PromptSize, gpus: int) -> int:
    """Of all groups of a rank at their largest: a larger `loss.micro_batch_tokens` changes nothing."""
    return config.rollout.prompts_per_step // gpus * group_tokens(config, prompt)


def largest_micro_batch(config: Config, prompt: PromptSize, gpus: int) -> MicroBatch:
    """The micro-batch that takes most memory: as many images as can be, and tokens up to the limit."""
    r, P, limit = config.rollout, prompt.tokens, config.loss.micro_batch_tokens
    G, whole = r.group_size, rank_tokens(config, prompt, gpus)
    groups = min(r.prompts_per_step // gpus, limit // (P + G))
    drawn = min(limit - groups * P, groups * G * r.max_new_tokens)
    each, more = divmod(drawn, groups * G)
    flat = [each + (i < more) for i in range(groups * G)]
    lengths = [flat[i * G : (i + 1) * G] for i in range(groups)]
    return MicroBatch(lengths, groups * P + drawn, 1 if whole <= limit else 2)


def made_prompts(prompt: PromptSize, model: Qwen2_5_VLConfig, count: int) -> list[Prompt]:
    """Prompts of that size, each with an image of its own."""
    grid = torch.tensor([[1, *prompt.grid]])
    tokens, vision = prompt.tokens, model.vision_config
    ids = torch.zeros(tokens, dtype=torch.int64)
    ids[prompt.text // 2 : prompt.text // 2 + tokens - prompt.text] = model.image_token_id
    merge = torch.tensor([1, vision.spatial_merge_size, vision.spatial_merge_size])
    positions = mrope_positions(ids == model.image_token_id, grid // merge)
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(math.prod(prompt.grid), size)
    height, width = (14 * side for side in prompt.grid)
    example = Example("made up", "", width, height, "", (), "", "", "", "", "")
    return [Prompt(example, ids, positions, pixels, grid, (str(i),), width, height) for i in range(count)]


def made_groups(prompts: Sequence[Prompt], lengths: Sequence[Sequence[int]]) -> list[Group]:
    """Prompts with completions of these lengths."""

    def rollout(length: int) -> Rollout:
        return Rollout(torch.zeros(length, dtype=torch.int64), torch.zeros(length), "", False)

    pairs = zip(prompts, lengths, strict=False)
    return [Group(prompt, tuple(rollout(length) for length in own)) for prompt, own in pairs]
