"""What the stages hand each other: Example -> Prompt -> Rollout -> Group.

Boxes are xyxy. *Original* boxes are in pixels of the image file, *processed* boxes in pixels of
the resized image that the model sees, *spoken* boxes in what the model names them by (`Coordinates`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor  # a second to import, which `medground data` does not need

Box = tuple[float, float, float, float]

Coordinates = Literal["processed", "thousandths"]
"""What numbers a model names boxes by: processed pixels, or thousandths of the image's width and height."""

Problem = Literal[
    "no answer", "several answers", "structure", "not JSON", "no box", "no thought box", "malformed thought box"
]
"""How a completion departs from its form: no or several <answer> blocks; more or other than a thought and an answer;
an answer that is no JSON, or no box; a thought without a box, or with what looks like one and is none."""

OF_THOUGHT: tuple[Problem, ...] = ("no thought box", "malformed thought box")
"""Problems where boxes are wanted in the thought alone (chain-of-box, brief-chain)."""


@dataclass(frozen=True)
class Example:
    """One phrase on one image: a line of `records.jsonl` (docs/data/records.md).

    `image` is relative to the data folder; `width` and `height` are pixels of that file; `boxes`
    are original, empty when the phrase has no match on the image.
    """

    id: str
    image: str
    width: int
    height: int
    phrase: str
    boxes: tuple[Box, ...]
    category: str
    patient: str
    study: str
    source: str
    split: str


@dataclass(frozen=True)
class Prompt:
    """What the model is asked about one example, ready for the network (all tensors on the CPU).

    Attributes:
        example: where it comes from.
        input_ids: [P], int64, image placeholders included.
        position_ids: [3, P], int64, the M-RoPE positions (time, height, width).
        pixel_values: [patches, patch_features], float32, of its images one after another.
        image_grid_thw: [images, 3], int64, patches along time, height and width; there may be no image.
        image_keys: a name for each image; prompts with equal names share the image.
        processed_width: width of the image that boxes are in, as the model sees it, in pixels.
        processed_height: its height.
        coordinates: that the model speaks.
    """

    example: Example
    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    image_keys: tuple[str, ...]
    processed_width: int
    processed_height: int
    coordinates: Coordinates = "processed"


@dataclass(frozen=True)
class Rollout:
    """One sampled completion (tensors on the CPU).

    Attributes:
        tokens: [C], int64, the stop token included when there is one.
        logp: [C], float32, log-probability of each token under the policy that sampled it.
        text: the completion, without the stop token.
        finished: False when it was cut at the token limit.
    """

    tokens: Tensor
    logp: Tensor
    text: str
    finished: bool


@dataclass(frozen=True)
class Group:
    """A prompt and its G completions."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Answer:
    """What a completion says.

    Attributes:
        boxes: of the answer; empty for "nothing found", None when no answer can be read.
        labels: what each box is called; empty where it is called nothing.
        thought_boxes: boxes named while thinking, in their order.
        problems: how the completion departs from the form, each once.
    """

    boxes: tuple[Box, ...] | None
    labels: tuple[str, ...] = ()
    thought_boxes: tuple[Box, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def well_formed(self) -> bool:
        """Whether the completion has exactly the form that every template asks for: a thought, then an answer."""
        return all(problem in OF_THOUGHT for problem in self.problems)

    @property
    def chained(self) -> bool:
        """Whether it is well formed and has well-formed boxes in its thought, one or more, as chain-of-box asks."""
        return not self.problems
