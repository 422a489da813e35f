"""What every side of `bench.steps` is given: a model folder, images, phrases, lengths of answers, a reward.

A side is a trainer. `step()` runs one step and returns its seconds: "step", and those of its phases, which are named
alike on all sides. Sides that others wrote keep the first step's gradient, so that ours can be compared with it.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
from bench.step_workloads import AnswerLengths, Workload
from medground.config import LoraConfig
from medground.lora import draw_adapters, peft_config
from medground.records import Example

LR, NO_LIMIT = 1e-6, 1e9  # of the gradient's norm, which is computed but never reached, so that gradients compare
SEED = 0  # of new adapters
PHASES = ("data", "prefill", "decode", "reward", "score", "update", "optimizer")

Seconds = dict[str, float]


class Side(Protocol):
    """A trainer on a job."""

    def step(self) -> Seconds:
        """Run the next step."""

    def close(self) -> None:
        """Give memory back."""


class Job(NamedTuple):
    """Steps on the same prompts, over and over again; only the answers' lengths differ from step to step.

    Attributes:
        name: of the workload.
        workload: what it is.
        size: of prompts; C is the longest answer.
        model: folder of the model and its processor.
        data: folder of the images.
        examples: B records.
        device: where all sides run.
    """

    name: str
    workload: Workload
    size: Size
    model: Path
    data: Path
    examples: list[Example]
    device: torch.device

    @property
    def answers(self) -> AnswerLengths:
        return self.workload.answers

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.workload.lora_rank)

    @property
    def loaded_dtype(self) -> torch.dtype:
        """Of the weights that peers load: float32 where they are trained, else that of the computation."""
        return torch.bfloat16 if self.lora.rank and self.device.type == "cuda" else torch.float32

    @property
    def facts(self) -> dict[str, Any]:
        """What tells one job from another, as JSON has it."""
        work, (P, _, G, _), (median, deviation, least, most) = self.workload, self.size, self.answers
        return {
            "name": self.name,
            "model": work.model,
            "prompts": work.prompts,
            "groups_at_once": work.groups_at_once,
            "checkpointing": work.checkpointing,
            "P": P,
            "image_tokens": self.size.image_tokens,
            "G": G,
            "answers": f"log-normal, median {median}, deviation {deviation}, {least} to {most} tokens",
        } | ({"lora_rank": work.lora_rank} if work.lora_rank else {})

    @property
    def pixels(self) -> int:
        return self.examples[0].width * self.examples[0].height

    def lengths(self, step: int) -> list[list[int]]:
        """Tokens of each answer to each prompt."""
        return self.answers.draw(len(self.examples), self.size.G, step)


class Capture(NamedTuple):
    """What a trainer's step was."""

    prompts: torch.Tensor  # [B, P]
    completions: list[list[torch.Tensor]]  # B of G of their lengths
    advantages: torch.Tensor  # [B, G]
    grads: dict[str, torch.Tensor]  # of the weights that are trained, by their names in the plain model


def make_job(folder: Path, name: str, workload: Workload) -> Job:
    """Write a model's folder and images."""
    shape, size = ARCHITECTURES[workload.model], SIZES[workload.model]._replace(C=workload.answers.most)
    if workload.prompts % workload.groups_at_once:
        raise ValueError(
            f"{name}: want prompts a multiple of groups at once; got {workload.prompts}, {workload.groups_at_once}"
        )
    device = torch.device(workload.device)
    processor = make_processor(shape.V, size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, data = folder / "model", folder / "data"
    make_vlm(make_config(shape, processor), device, dtype).save_pretrained(model)
    save_processor(processor, model)
    data.mkdir()
    examples = [make_example(size, i, f"{i}.png") for i in range(workload.prompts)]
    for i, example in enumerate(examples):
        make_image(size, i).save(data / example.image)
    return Job(name, workload, size, model, data, examples, device)


def adapt(model: Any, job: Job) -> Any:
    """A model of transformers with the job's adapters as peft has them, which begin as ours do; itself without any."""
    if not job.lora.rank:
        return model
    from peft import get_peft_model

    model = get_peft_model(model, peft_config(job.lora))
    draw_adapters(model, SEED)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of what is trained of a model of transformers or of peft, float32 on the CPU."""
    named = [(name.removeprefix("base_model.model."), weight) for name, weight in model.named_parameters()]
    return {name: weight.grad.float().to("cpu", copy=True) for name, weight in named if weight.requires_grad}


def reward(text: str) -> float:
    """Cheap, from 0 to 1, and seldom the same twice."""
    return sum(map(ord, text)) % 97 / 97
