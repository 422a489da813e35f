"""What both sides of `bench.step_against_trl` are given: a model folder, images, phrases, a reward."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.random_model import (
    ARCHITECTURES,
    SIZES,
    Size,
    make_config,
    make_example,
    make_image,
    make_processor,
    make_vlm,
    save_processor,
)
from medground.records import Example

LR, NO_LIMIT = 1e-6, 1e9  # of the gradient's norm, which is computed but never reached, so that gradients compare


class Job(NamedTuple):
    """One step, over and over again.

    Attributes:
        name: of the model's architecture.
        size: of prompts and completions.
        model: folder of the model and its processor.
        data: folder of the images.
        examples: B records, the same in each step.
        groups_at_once: groups of a micro-batch.
        checkpointing: whether activations are recomputed.
        device: where both sides run.
    """

    name: str
    size: Size
    model: Path
    data: Path
    examples: list[Example]
    groups_at_once: int
    checkpointing: bool
    device: torch.device

    @property
    def sizes(self) -> dict[str, Any]:
        """What tells one job from another, as JSON has it."""
        return self.size._asdict() | {
            "model": self.name,
            "prompts": len(self.examples),
            "groups_at_once": self.groups_at_once,
            "checkpointing": self.checkpointing,
        }

    @property
    def pixels(self) -> int:
        return self.examples[0].width * self.examples[0].height


class Capture(NamedTuple):
    """What a trainer's step was."""

    prompts: torch.Tensor  # [B, P]
    completions: torch.Tensor  # [B, G, C]
    advantages: torch.Tensor  # [B, G]
    grads: dict[str, torch.Tensor]  # of the model's weights, by their names


def make_job(
    folder: Path, name: str, device: torch.device, prompts: int, groups_at_once: int, checkpointing: bool
) -> Job:
    """Write a model's folder and images."""
    shape, size = ARCHITECTURES[name], SIZES[name]
    if prompts % groups_at_once:
        raise ValueError(f"want prompts a multiple of groups at once; got {prompts}, {groups_at_once}")
    processor = make_processor(shape.V, size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, data = folder / "model", folder / "data"
    make_vlm(make_config(shape, processor), device, dtype).save_pretrained(model)
    save_processor(processor, model)
    data.mkdir()
    examples = [make_example(size, i, f"{i}.png") for i in range(prompts)]
    for i, example in enumerate(examples):
        make_image(size, i).save(data / example.image)
    return Job(name, size, model, data, examples, groups_at_once, checkpointing, device)


def reward(text: str) -> float:
    """Cheap, from 0 to 1, and seldom the same twice."""
    return sum(map(ord, text)) % 97 / 97
