"""Example -> Prompt, and completion text -> boxes; both in the coordinates that the model speaks.

The model sees the image resized so that its sides are multiples of patch * merge (28 pixels for
Qwen2.5-VL) and names boxes in the pixels of *that* image: `to_processed` and `to_original` convert.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medground.records import Answer, Box, Example, Prompt

IMAGE_TOKEN = "<|image_pad|>"

_ASK = "Please provide the bounding box coordinate of the region this sentence describes: {phrase}. "
_FORM = (
    "First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format."
)
TEMPLATES = {
    # for models too small to read instructions
    "brief": "Find: {phrase}",
    # the wording of MedGround-R1
    "plain": _ASK + _FORM,
    "patient-side": _ASK + "Left and right are the patient's: the patient's left is on the image's right. " + _FORM,
}


@dataclass(frozen=True)
class Processor:
    """A model folder's tokenizer and image processor."""

    tokenizer: PreTrainedTokenizerBase
    images: Qwen2VLImageProcessorPil


def load_processor(folder: Path, min_pixels: int, max_pixels: int) -> Processor:
    """Read the tokenizer (with its chat template) and the image processor of a model folder.

    Raises:
        ValueError: the folder lacks one of them.
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
    return Processor(tokenizer, images)


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


def _question(example: Example, processor: Processor, template: str) -> tuple[str, str]:
    """The chat that asks for the example's phrase, before and after the image's placeholder."""
    check_phrase(example, processor)
    question = [{"type": "image"}, {"type": "text", "text": TEMPLATES[template].format(phrase=example.phrase)}]
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
    """A box in processed pixels -> pixels of the image file, clipped to the image."""
    sx = prompt.example.width / prompt.processed_width
    sy = prompt.example.height / prompt.processed_height
    x1, y1, x2, y2 = np.clip(np.array(box), -1e6, 1e6) * [sx, sy, sx, sy]
    w, h = prompt.example.width, prompt.example.height
    return (min(max(x1, 0), w), min(max(y1, 0), h), min(max(x2, 0), w), min(max(y2, 0), h))


def to_processed(box: Box, prompt: Prompt) -> Box:
    """A box in pixels of the image file -> processed pixels."""
    sx = prompt.processed_width / prompt.example.width
    sy = prompt.processed_height / prompt.example.height
    return (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WELL_FORMED = re.compile(r"<think>(?:(?!</?(?:think|answer)>).)*</think>\s*<answer>[^<]*</answer>\s*", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def parse_answer(text: str) -> Answer:
    """Read the boxes of a completion: the only parser, for training and evaluation alike.

    The answer is what stands between the one pair of <answer> tags: JSON, bare or fenced, of one
    object {"bbox_2d": [x1, y1, x2, y2]} or a list of such (the empty list: nothing found); other keys
    of an object are ignored. Several <answer> blocks are no answer.
    """
    blocks = _ANSWER.findall(text)
    boxes = _read_boxes(blocks[0]) if len(blocks) == 1 else None
    return Answer(boxes, boxes is not None and _WELL_FORMED.fullmatch(text.strip()) is not None)


def _read_boxes(block: str) -> tuple[Box, ...] | None:
    fenced = _FENCE.fullmatch(block.strip())
    try:
        value = json.loads(fenced.group(1) if fenced else block)
    except (ValueError, RecursionError):
        return None
    found = [_read_box(item) for item in (value if isinstance(value, list) else [value])]
    boxes = tuple(box for box in found if box is not None)
    return boxes if len(boxes) == len(found) else None


def _read_box(item: object) -> Box | None:
    box = item.get("bbox_2d") if isinstance(item, dict) else None
    if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):
        return None
    if not all(abs(v) < 1e6 for v in box):  # NaN and Infinity too
        return None
    x1, y1, x2, y2 = (float(v) for v in box)
    return (x1, y1, x2, y2)


def render_answer(boxes: tuple[Box, ...], thought: str) -> str:
    """The completion that `parse_answer` reads back: boxes in processed pixels, rounded to integers."""
    items = ", ".join('{"bbox_2d": [' + ", ".join(str(round(v)) for v in box) + "]}" for box in boxes)
    answer = items if len(boxes) == 1 else f"[{items}]"
    return f"<think>{thought}</think><answer>{answer}</answer>"
