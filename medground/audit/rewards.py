"""`medground audit rewards`: what degenerate policies earn beside honest ones, before a GPU is spent on a reward."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medground.config import RewardConfig, Template
from medground.records import Example

if TYPE_CHECKING:
    from medground.audit.earnings import Earned
    from medground.loading import PromptMaker
    from medground.prompts import Processor
    from medground.records import Prompt
    from medground.rewards.total import Scorer

BRIEF, BRIEF_SEEING = 64, 16
"""Most records of the short form at the start of a training; where the reward looks at images."""


@dataclass(frozen=True, kw_only=True)
class RewardAuditConfig:
    """See what degenerate answers earn under a reward, beside honest ones."""

    data: tuple[str, ...]
    """Folder that holds records.jsonl, or several."""
    split: str = "train"
    """Split whose records are asked about."""
    train_split: str = "train"
    """Split that blind prior and semantic reward know their categories from."""
    records: int = 256
    """Most records, drawn by the seed."""
    seed: int = 0
    """Of records and of what the policies draw."""
    template: Template = "patient-side"
    """That completions answer to, as --prompt.template."""
    group_size: int = 8
    """Completions of a group, for the advantages."""
    per_reward: bool = False
    """As --loss.per-reward."""
    model: str = ""
    """Model folder, for its processor; length and custom rewards want it, since they count tokens. Without one: the
    image sizes of Qwen2.5-VL."""
    min_pixels: int = 56 * 56
    """As data.min_pixels of a run."""
    max_pixels: int = 1280 * 28 * 28
    """As data.max_pixels of a run."""
    max_new_tokens: int = 512
    """As rollout.max_new_tokens of a run: the length reward looks at it. Nothing is cut here."""
    device: str = "auto"
    """auto: the GPU where there is one."""
    json: str = ""
    """File to write everything into, as JSON."""
    html: str = ""
    """File to write a page with pictures into."""
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        if not self.data or not all(self.data):
            raise ValueError(f"data: want the name of a folder, or of several; got {self.data}")
        if self.records < 2 or self.group_size < 2 or self.seed < 0:
            got = f"{self.records}, {self.group_size}, {self.seed}"
            raise ValueError(f"records, group_size, seed: want >= 2, >= 2, >= 0; got {got}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"min_pixels: want 0 < min_pixels <= max_pixels; got {self.min_pixels}")
        counts = "custom" if self.reward.custom else "length_weight" if self.reward.length_weight else ""
        if counts and not self.model:
            raise ValueError(f"model: want a model folder with reward.{counts}, since tokens are counted; got none")


def run_reward_audit(config: RewardAuditConfig) -> None:
    """Audit a reward, print a table, write what was asked for.

    Raises:
        ValueError: data, model, encoder or reward cannot be used.
    """
    from medground.audit.rewards_page import table, write_page
    from medground.datasets.inventory import written_whole

    for option, name in (("json", config.json), ("html", config.html)):
        if name and not Path(name).parent.is_dir():
            raise ValueError(f"{option}: want a file in a folder that exists; got {name}")
    found, earned = audit_rewards(config)
    if config.json:
        with written_whole(Path(config.json)) as file:
            file.write(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    if config.html:
        write_page(found, earned, config.data, Path(config.html))
    print(table(found))


def audit_rewards(config: RewardAuditConfig) -> tuple[dict[str, Any], Earned]:
    """Audit a reward.

    Returns:
        What the JSON file holds, and every completion's earnings.

    Raises:
        ValueError: data, model, encoder or reward cannot be used.
    """
    import torch

    from medground.audit.earnings import described, earn, judge
    from medground.datasets.folders import load_folders
    from medground.datasets.manifest import select
    from medground.loading import PromptMaker
    from medground.rewards.total import Scorer
    from medground.scoring import blind_answers

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    everything = [example for part in load_folders(config.data) for example in part]
    name = ", ".join(config.data)
    train = select(everything, config.train_split, name)
    chosen = drawn(select(everything, config.split, name), config.records, config.seed)
    processor = _processor(config)
    scorer = Scorer(config.reward, config.template, config.max_new_tokens, device, train)
    make = PromptMaker(config.data, processor, config.template) if config.model else None
    tokens = partial(count_tokens, processor) if config.model else None
    seeing = bool(config.reward.semantic_weight or config.reward.custom)
    prompts = prompts_of(chosen, config.data, processor, make, seeing=seeing)
    priors, fairs = blind_answers(train, chosen), config.group_size
    earned = earn(prompts, priors, scorer, config.template, fairs=fairs, seed=config.seed, tokens=tokens)
    told = described(config.reward, config.template, config.seed)
    found = {"data": list(config.data), "split": config.split, "group_size": config.group_size, **told}
    return found | judge(earned, per_reward=config.per_reward), earned


def brief_audit(
    scorer: Scorer, make: PromptMaker, train: Sequence[Example], reward: RewardConfig, seed: int
) -> dict[str, Any]:
    """The short form of a training's start: few records, no group, images where the semantic reward looks at them.

    Args:
        scorer: of the run.
        make: of the run.
        train: the training records.
        reward: of the run.
        seed: of the run.

    Returns:
        What audit/rewards.json holds.
    """
    from medground.audit.earnings import described, earn, judge
    from medground.scoring import blind_answers

    seeing = bool(reward.semantic_weight or reward.custom)
    chosen = drawn(train, BRIEF_SEEING if seeing else BRIEF, seed)
    prompts = prompts_of(chosen, make.folders, make.processor, make, seeing=seeing)
    tokens = partial(count_tokens, make.processor) if reward.length_weight or reward.custom else None
    priors = blind_answers(train, chosen)
    earned = earn(prompts, priors, scorer, make.template, fairs=1, seed=seed, tokens=tokens)  # type: ignore[arg-type]
    return described(reward, make.template, seed) | judge(earned)  # type: ignore[arg-type]


def warnings_of(found: dict[str, Any]) -> list[str]:
    """A line for each cheat that earns more than the truth 25 % off."""
    return [
        f"reward audit: {row['cheat']} earns {row['reward']:.2f}, a 25 % off truth {row['jittered_truth']:.2f}"
        + (" (nothing to find)" if row["records"] == "absent" else "")
        for row in found["cheats_above_jittered_truth"]
    ]


def drawn(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most so many of the records, drawn by the seed, in their order."""
    import numpy as np

    places = np.random.default_rng([seed, 23]).permutation(len(examples))[:most]
    return [examples[place] for place in sorted(places.tolist())]


def prompts_of(
    examples: Sequence[Example],
    folders: tuple[str, ...],
    processor: Processor,
    make: PromptMaker | None,
    *,
    seeing: bool,
) -> Iterator[Prompt]:
    """A prompt for each record, one at a time: as a run makes it where the reward sees, else of its sizes alone.

    Args:
        examples: the records.
        folders: of the data.
        processor: of the model.
        make: of a run; without it prompts have patches, but no tokens.
        seeing: whether images are read.
    """
    import torch

    from medground.datasets.folders import image_path
    from medground.datasets.images import read_image
    from medground.loading import Question
    from medground.records import Prompt

    none = torch.empty(0, dtype=torch.int64)
    for example in examples:
        if seeing and make:
            yield make(Question(example))
            continue
        width, height = seen_size(example, processor)
        grid, patches = none, torch.empty(0)
        if seeing:
            made = processor.images(images=[read_image(image_path(folders, example.image))], return_tensors="pt")
            grid, patches = made["image_grid_thw"], made["pixel_values"]
        yield Prompt(example, none, none, patches, grid, (), width, height, processor.coordinates)


def seen_size(example: Example, processor: Processor) -> tuple[int, int]:
    """Width and height of the record's image as the model sees it, without reading it.

    Raises:
        ValueError: the processor refuses an image of this shape; names the record.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    images = processor.images
    least, most = images.size["shortest_edge"], images.size["longest_edge"]
    step = images.patch_size * images.merge_size
    try:
        height, width = smart_resize(example.height, example.width, step, least, most)
    except ValueError as error:
        raise ValueError(f"record {example.id}: {error}") from None
    return width, height


def count_tokens(processor: Processor, texts: list[str]) -> list[int]:
    """Tokens of each text and a stop token."""
    return [len(ids) + 1 for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _processor(config: RewardAuditConfig) -> Processor:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from medground.prompts import Processor, load_processor

    if config.model:
        if not Path(config.model).is_dir():
            raise ValueError(f"{config.model}: want a model folder; there is none")
        return load_processor(Path(config.model), config.min_pixels, config.max_pixels)
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    return Processor(None, Qwen2VLImageProcessorPil(size=size))  # nothing is tokenised
