"""What the stages hand each other: Example -> Prompt -> Rollout -> Group.

Boxes are xyxy. *Original* boxes are in pixels of the image file, *processed* boxes in pixels of
the resized image that the model sees (Qwen2.5-VL speaks these).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # a second to import, which `medground data` does not need

Box = tuple[float, float, float, float]


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
    """

    example: Example
    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    image_keys: tuple[str, ...]
    processed_width: int
    processed_height: int


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
        well_formed: the completion has exactly the form that the prompt asks for.
    """

    boxes: tuple[Box, ...] | None
    well_formed: bool
