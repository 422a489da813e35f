"""Everything that can be known before the first step: data, model, memory of the cache, ranks; each mistake by name."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from medground.adamw import need_torchao
from medground.augmentation import swap_sides
from medground.config import Config, differing_fields
from medground.data_order import DataOrder
from medground.datasets.folders import folders_hash, load_folders
from medground.datasets.manifest import select
from medground.loading import check_shared_memory
from medground.lora import need_peft
from medground.policy import check_model
from medground.prompts import Processor, load_processor, prompt_tokens
from medground.records import Example
from medground.rewards.custom import load_custom
from medground.rewards.encoders import load_encoder
from medground.rollout.engine import Limits, plan_cache
from medground.run_folder import check_folder
from medground.sharding import Ranks, SharedError, compute_dtype
from medground.summary import Splits


class Checked(NamedTuple):
    """What a run works with.

    Attributes:
        splits: its records.
        order: of training.
        data_hash: SHA-256 of all of them.
        model_folder: on this machine.
        processor: of the model.
        limits: of decoding.
    """

    splits: Splits
    order: DataOrder
    data_hash: str
    model_folder: Path
    processor: Processor
    limits: Limits


def check_job(config: Config, ranks: Ranks) -> Checked:
    """Check everything that a user may have got wrong, before any work.

    Raises:
        SharedError: something is; the same on every rank.
    """
    first, *others = ranks.gather(config)
    for rank, other in enumerate(others, 1):
        if differing := differing_fields(first, other):
            raise SharedError(f"rank {rank} was started with another configuration than rank 0: {'; '.join(differing)}")
    B = config.rollout.prompts_per_step
    if B % ranks.size:
        raise SharedError(f"rollout.prompts_per_step: want a multiple of the {ranks.size} ranks; got {B}")

    def check() -> Checked:
        ranks.replicas(config.sharding.replicas)
        parts = load_folders(config.data.path)
        data_hash = folders_hash(config.data.path)
        check_folder(config, data_hash)
        model_folder = model_folder_of(config.model.path)
        check_model(model_folder)
        if config.model.lora.rank:
            need_peft()
        if config.reward.custom:
            load_custom(config.reward.custom)
        if config.reward.semantic_weight:
            load_encoder(config.reward.encoder)  # to see whether it can be: seconds, once
        if config.optimizer.kind == "adamw-8bit":
            need_torchao()
        processor = load_processor(model_folder, config.data.min_pixels, config.data.max_pixels)
        splits, order = _splits(parts, config)
        examples = [example for split in splits for example in split]
        if config.data.augment.flip:
            examples += with_swapped_sides(splits.train)
        limits = limits_of(config, examples, processor, model_folder, compute_dtype(ranks, config.model.precision))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
        check_shared_memory(config.data.workers, B // ranks.size, limits.longest_prompt, here)
        return Checked(splits, order, data_hash, model_folder, processor, limits)

    return ranks.together(check)


def _splits(parts: list[list[Example]], config: Config) -> tuple[Splits, DataOrder]:
    """The records of training and evaluations from those of each folder, and the order of training.

    Raises:
        ValueError: a split has no record, in all folders or in one that has a weight, or cannot serve.
    """
    data, folders = config.data, ", ".join(config.data.path)
    records = [example for part in parts for example in part]
    # in turn, so that the curve's few records are from all folders
    curves = [[example for example in part if example.split == data.curve_split] for part in parts]
    in_turn = [example for some in zip_longest(*curves) for example in some if example]
    pools = [select(records, data.train_split, folders)]
    if data.weights:
        weighted = zip(parts, data.path, data.weights, strict=True)
        pools = [select(part, data.train_split, folder) for part, folder, weight in weighted if weight]
    train = [example for pool in pools for example in pool]
    curve, test = in_turn or select(records, data.curve_split, folders), select(records, data.test_split, folders)
    if not any(example.boxes for example in train):
        raise ValueError(f"{folders}: want a record with a box in split {data.train_split!r}; got none")
    if len({example.patient for example in test}) < 2:
        raise ValueError(f"{folders}: want two patients or more in split {data.test_split!r} (shuffled images)")
    order = DataOrder(pools, config.seed, [weight for weight in data.weights if weight])
    return Splits(train, curve[: config.evaluation.curve_records], test), order


def limits_of(
    config: Config, examples: Sequence[Example], processor: Processor, model_folder: Path, dtype: torch.dtype
) -> Limits:
    """What decoding and training need, once it is certain that every prompt fits with its completions.

    Raises:
        ValueError: one does not; names the option, and the records with the longest text and the largest image.
    """
    P, told = longest_prompt(examples, processor, config.prompt.template)
    text = AutoConfig.from_pretrained(model_folder, trust_remote_code=False).text_config
    r = config.rollout
    if P + r.max_new_tokens > text.max_position_embeddings:
        raise ValueError(
            f"data.max_pixels, rollout.max_new_tokens: want a prompt and {r.max_new_tokens} new tokens within the "
            f"model's context of {text.max_position_embeddings} tokens; {told}"
        )
    group = P + r.group_size * r.max_new_tokens
    if group > config.loss.micro_batch_tokens:
        raise ValueError(
            f"loss.micro_batch_tokens: want at least {group}, a prompt and {r.group_size} completions of "
            f"{r.max_new_tokens} tokens; got {config.loss.micro_batch_tokens}; {told}"
        )
    limits = Limits(P, r.max_new_tokens, r.max_rows, r.cache_gb * 1e9, r.prefill_tokens)
    try:
        plan_cache(text, dtype, limits, prompts=1, copies=1)
    except ValueError as error:
        raise ValueError(f"{error}; {told}") from None
    return limits


def longest_prompt(examples: Sequence[Example], processor: Processor, template: str) -> tuple[int, str]:
    """Tokens of the longest prompt there may be, whose phrase and image may be of two records; and the two in words."""
    tokens = {example.id: prompt_tokens(example, processor, template) for example in examples}
    wordy, large = max(tokens, key=lambda name: tokens[name][0]), max(tokens, key=lambda name: tokens[name][1])
    text, image = tokens[wordy][0], tokens[large][1]
    told = f"the longest text takes {text} tokens (record {wordy}), the largest image {image} (record {large})"
    return text + image, told


def with_swapped_sides(examples: Sequence[Example]) -> list[Example]:
    """Of those that have a phrase for a mirrored image, the record with it, which may take more tokens."""
    swapped = ((example, swap_sides(example.phrase)) for example in examples)
    return [replace(e, id=f"{e.id}, mirrored", phrase=phrase) for e, phrase in swapped if phrase]


def model_folder_of(path: str) -> Path:
    """A model folder, or what the hub has under a name, on this machine.

    Raises:
        ValueError: there is none.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        # the card and the licence are for the card of what is trained
        kinds = ["*.json", "*.txt", "*.jinja", "*.safetensors", "README.md", "LICENSE*"]
        return Path(snapshot_download(path, allow_patterns=kinds))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"model.path: want a model folder or a name on the hub; got {path!r}: {error}") from None
