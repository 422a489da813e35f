"""Named GRPO steps, for `bench.steps` and `profiles.record`: models of true shapes, random weights, made-up films.

Answers are as long as a draw from a log-normal distribution says, cut off at both ends: a line of reasoning and a box
in JSON take about 100 tokens, some answers twice as many. Every trainer's answers get the same lengths, and a step's
number decides them, so that the same step is the same work each time. The prompt's length is the same for all.
"""

from typing import NamedTuple

import torch


class AnswerLengths(NamedTuple):
    """Tokens of an answer: log-normal with this median and deviation of the logarithm, from `least` to `most`."""

    median: int
    deviation: float
    least: int
    most: int

    def draw(self, prompts: int, G: int, step: int) -> list[list[int]]:
        """Of G answers to each prompt."""
        noise = torch.randn(prompts, G, generator=torch.Generator().manual_seed(step))
        return (self.median * (self.deviation * noise).exp()).round().long().clamp(self.least, self.most).tolist()


class Workload(NamedTuple):
    """A step.

    Attributes:
        device: cpu or cuda.
        model: shape and prompt of `bench.random_model`.
        prompts: of a step (B).
        groups_at_once: of a micro-batch.
        answers: how long they are.
        checkpointing: whether activations are recomputed.
        lora_rank: of adapters in the decoder layers; 0 trains all weights.
    """

    device: str
    model: str
    prompts: int
    groups_at_once: int
    answers: AnswerLengths
    checkpointing: bool = False
    lora_rank: int = 0


_ANSWERS = AnswerLengths(96, 0.4, 32, 224)
WORKLOADS = {
    "test": Workload("cpu", "tiny", 2, 1, AnswerLengths(4, 0.4, 2, 6)),
    "tiny-cpu": Workload("cpu", "small", 2, 2, _ANSWERS),
    "3b-h100": Workload("cuda", "3b", 16, 1, _ANSWERS, checkpointing=True),
    "7b-lora-h100": Workload("cuda", "7b", 16, 1, _ANSWERS, checkpointing=True, lora_rank=64),
}


def find_workload(name: str) -> Workload:
    """A workload by its name, where its device is.

    Raises:
        ValueError: there is none of that name, or the device is not visible.
    """
    if name not in WORKLOADS:
        raise ValueError(f"want a workload among {', '.join(WORKLOADS)}; got {name!r}")
    workload, cuda = WORKLOADS[name], torch.cuda.is_available()
    if (workload.device == "cuda") != cuda:
        raise ValueError(f"{name}: want {workload.device}; a GPU is {'' if cuda else 'not '}visible")
    return workload
