"""Example -> Prompt, and boxes to and from the coordinates that the model speaks.

The model sees the image resized so that its sides are multiples of patch * merge (28 pixels for Qwen2.5-VL). Some
families name boxes in the pixels of *that* image, others in thousandths of its sides: `to_spoken` and `to_original`
convert. What a completion says is read in answers.py.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medground.records import Box, Coordinates, Example, Prompt

IMAGE_TOKEN = "<|image_pad|>"

_ASK = "Please provide the bounding box coordinate of the region this sentence describes: {phrase}. "
_SIDES = "Left and right are the patient's: the patient's left is on the image's right. "
_FORM = (
    "First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format."
)
# JSON's braces are doubled: the whole is a format string
_CHAIN = (
    "First think step by step in <think> </think> tags. Whenever you name a region while thinking, put its box right "
    'after it: {{"bbox_2d": [x1, y1, x2, y2], "label": "region"}}. Then output one final answer in <answer> </answer> '
    "tags. Output the final answer in JSON format."
)
TEMPLATES = {
    # for models too small to read instructions: the wording only says which of two forms they were taught is wanted
    "brief": "Find: {phrase}",
    "brief-chain": "Find in steps: {phrase}",
    # the wording of MedGround-R1
    "plain": _ASK + _FORM,
    "patient-side": _ASK + _SIDES + _FORM,
    # Chain-of-Box, the idea of MedGround-R1's paper; its wording is not known, this is ours
    "chain-of-box": _ASK + _SIDES + _CHAIN,
}

FAMILIES: dict[str, Coordinates] = {
    "qwen2_5_vl": "processed",
    "qwen3_vl": "thousandths",
    "qwen3_vl_moe": "thousandths",
    "internvl": "thousandths",
    "internvl_chat": "thousandths",
}
"""`model_type` of a model folder's config.json -> coordinates that the family was taught to name boxes by."""


def spoken_coordinates(folder: Path) -> Coordinates:
    """What the model in a folder speaks.

    Raises:
        ValueError: its family is not in FAMILIES, or the folder has no configuration.
    """
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{folder}: want a model folder with a config.json; got none that can be read") from None
    if kind not in FAMILIES:
        raise ValueError(f"{file}: want a model_type of {', '.join(FAMILIES)}; got {kind!r}")
    return FAMILIES[kind]


@dataclass(frozen=True)
class Processor:
    """A model folder's tokenizer and image processor, and what the model speaks."""

    tokenizer: PreTrainedTokenizerBase
    images: Qwen2VLImageProcessorPil
    coordinates: Coordinates = "processed"


def load_processor(folder: Path, min_pixels: int, max_pixels: int) -> Processor:
    """Read the tokenizer (with its chat template) and the image processor of a model folder.

    Raises:
        ValueError: the folder lacks one of them, or is of a family that FAMILIES has not.
    """
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder}: want a model folder with a processor (preprocessor_config.json); it has none")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder}: want a model folder with a tokenizer (tokenizer_config.json); it has none")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    separate = folder / "chat_template.json"
    if tokenizer.chat_template is None and separate.is_file():
        tokenizer.chat_template = json.loads(separate.read_text())["chat_template"]
    if tokenizer.chat_template is None:
        raise ValueError(f"{folder}: want a tokenizer with a chat template; it has none")
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    # the hub's files have min_pixels and max_pixels, which would go before size
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, size=size, min_pixels=min_pixels, max_pixels=max_pixels)
    # a processor by itself is what base_model starts from, which makes a Qwen2.5-VL; check_model wants the file
    spoken = spoken_coordinates(folder) if (folder / "config.json").is_file() else "processed"
    return Processor(tokenizer, images, spoken)


def make_prompt(example: Example, image: Image.Image, processor: Processor, template: str) -> Prompt:
    """Ask for the example's phrase on an image.

    Args:
        example: the phrase.
        image: RGB; the example's own, or another one for a control.
        processor: of the model that is asked.
        template: a key of TEMPLATES.
    """
    patches = processor.images(images=[image], return_tensors="pt")
    grid, pixels = patches["image_grid_thw"], patches["pixel_values"]
    merge = processor.images.merge_size
    head, tail = _question(example, processor, template)
    # one placeholder in the chat, one per merged patch in the prompt
    text = head + IMAGE_TOKEN * (int(grid.prod()) // merge**2) + tail
    input_ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    is_image = input_ids == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return Prompt(
        example=example,
        input_ids=input_ids,
        position_ids=mrope_positions(is_image, grid // torch.tensor([1, merge, merge])),
        pixel_values=pixels,
        image_grid_thw=grid,
        image_keys=(hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest(),),
        processed_width=int(grid[0, 2]) * processor.images.patch_size,
        processed_height=int(grid[0, 1]) * processor.images.patch_size,
        coordinates=processor.coordinates,
    )


def prompt_tokens(example: Example, processor: Processor, template: str) -> tuple[int, int]:
    """How many tokens of the example's prompt are text and how many its image, without reading the image.

    Raises:
        ValueError: the image is of a shape that the processor refuses; names the record.
    """
    head, tail = _question(example, processor, template)
    text = processor.tokenizer(head + IMAGE_TOKEN + tail, add_special_tokens=False)["input_ids"]
    try:
        patches = processor.images.get_number_of_image_patches(example.height, example.width)
    except ValueError as error:
        raise ValueError(f"record {example.id}: {error}") from None
    return len(text) - 1, patches // processor.images.merge_size**2


def question_text(phrase: str, template: str) -> str:
    """What the user says, after the image."""
    return TEMPLATES[template].format(phrase=phrase)


def _question(example: Example, processor: Processor, template: str) -> tuple[str, str]:
    """The chat that asks for the example's phrase, before and after the image's placeholder."""
    check_phrase(example, processor)
    question = [{"type": "image"}, {"type": "text", "text": question_text(example.phrase, template)}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    head, placeholder, tail = text.partition(IMAGE_TOKEN)
    assert placeholder, f"the chat template leaves out the image: {text!r}"
    return head, tail


def check_phrase(example: Example, processor: Processor) -> None:
    """Refuse a phrase that holds one of the tokenizer's special tokens.

    Raises:
        ValueError: naming the record and the token.
    """
    held = [token for token in processor.tokenizer.all_special_tokens if token in example.phrase]
    if held:
        raise ValueError(f"record {example.id}: want a phrase without special tokens; got {held[0]!r} in it")


def mrope_positions(is_image: Tensor, grids: Tensor) -> Tensor:
    """Positions of a prompt's tokens along time, height and width, as Qwen2.5-VL counts them.

    Args:
        is_image: [P], bool, where the image placeholders are.
        grids: [images, 3], int64, each image's tokens along time, height and width.

    Returns:
        [3, P], int64. Text advances all three axes by one; an image spans its grid from the position
        it starts at, and the text after it starts past the larger side.
    """
    flags = is_image.tolist()
    parts, start, at = [], 0, 0
    remaining = iter(grids.tolist())
    while at < len(flags):
        if flags[at]:
            t, h, w = next(remaining)
            axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            parts.append(torch.stack(axes).flatten(1) + start)
            at, start = at + t * h * w, start + max(h, w)
        else:
            end = flags.index(True, at) if True in flags[at:] else len(flags)
            parts.append((torch.arange(end - at) + start).expand(3, -1))
            at, start = end, start + end - at
    return torch.cat(parts, 1)


def to_original(box: Box, prompt: Prompt) -> Box:
    """A spoken box -> pixels of the image file, clipped to the image."""
    w, h = prompt.example.width, prompt.example.height
    sx, sy = spoken_size(prompt)
    x1, y1, x2, y2 = box
    return (_within(x1 * w / sx, w), _within(y1 * h / sy, h), _within(x2 * w / sx, w), _within(y2 * h / sy, h))


def _within(value: float, side: int) -> float:
    return float(min(max(value, 0), side))


def to_spoken(box: Box, prompt: Prompt) -> Box:
    """A box in pixels of the image file -> what the model would call it, before rounding."""
    return _rescaled(box, prompt, spoken_size(prompt))


def to_processed(box: Box, prompt: Prompt) -> Box:
    """A box in pixels of the image file -> processed pixels."""
    return _rescaled(box, prompt, (prompt.processed_width, prompt.processed_height))


def spoken_size(prompt: Prompt) -> tuple[int, int]:
    """The lower right corner of the whole image, as the model would call it."""
    return (1000, 1000) if prompt.coordinates == "thousandths" else (prompt.processed_width, prompt.processed_height)


def _rescaled(box: Box, prompt: Prompt, size: tuple[int, int]) -> Box:
    sx, sy = size[0] / prompt.example.width, size[1] / prompt.example.height
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
