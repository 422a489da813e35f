"""A Qwen2.5-VL with random weights, its processor and prompts of an exact length, for benchmarks of the whole model.

The shapes of 3B and 7B are those of the published configurations. The tokenizer knows single bytes, and names for all
other ids, so that every completion has a text. The token that ends an answer is the first id past the model's
vocabulary: nobody can draw it, so completions are all as long as they may be, on every side that is measured.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medground.plan.shapes import IMAGE_TOKENS, MERGE, PATCH, PUBLISHED, Architecture, config_of
from medground.policy import Policy
from medground.prompts import IMAGE_TOKEN, TEMPLATES, Processor, make_prompt
from medground.records import Example, Group, Prompt, Rollout

TEMPLATE = "brief"
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN, "<|video_pad|>"
)  # fmt: skip
_NEVER = "<|never_drawn|>"
_CHAT = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
)
_FRAME = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>")  # of a prompt, beside image and text


class Size(NamedTuple):
    """Prompt tokens, patches along a side of its square image, completions of a prompt, tokens of a completion."""

    P: int
    side: int
    G: int
    C: int

    @property
    def image_tokens(self) -> int:
        return (self.side // MERGE) ** 2

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def token_bound(self) -> float:
        """How many times fewer tokens a packed group has than its rows."""
        return self.G * (self.P + self.C) / (self.P + self.G * self.C)


ARCHITECTURES = {
    # of the usual 0.02, so small a model would make nearly flat distributions
    "tiny": Architecture(64, 2, 4, 2, 96, 320, False, 2, 32, 2, 64, (1,), 0.1),
    "small": Architecture(256, 4, 8, 2, 704, 2048, False, 4, 128, 4, 256, (1, 3), 0.06),
    **PUBLISHED,
}
SIZES = dict.fromkeys(ARCHITECTURES, Size(600, 40, 8, 128)) | {"tiny": Size(40, 8, 2, 6)}


def make_processor(V: int, size: Size) -> Processor:
    """A tokenizer for a vocabulary of V and an image processor for images of this size."""
    names = [*_SPECIAL, *sorted(ByteLevel.alphabet())]
    vocabulary = {name: i for i, name in enumerate(names + [f"w{i}" for i in range(len(names), V)])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token=_NEVER,
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=list(_SPECIAL),
    )
    assert tokenizer.eos_token_id == V, (tokenizer.eos_token_id, V)
    tokenizer.chat_template = _CHAT
    pixels = (size.side * PATCH) ** 2
    return Processor(tokenizer, Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels}))


def make_config(shape: Architecture, processor: Processor) -> Qwen2_5_VLConfig:
    """The configuration as transformers reads it."""
    token = processor.tokenizer.convert_tokens_to_ids
    names = ("<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN, "<|video_pad|>")
    return config_of(shape, dict(zip(IMAGE_TOKENS, map(token, names), strict=True)), token("<|endoftext|>"))


def make_vlm(
    config: Qwen2_5_VLConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """The model as transformers runs it, for inference and training alike (it has no dropout)."""
    torch.manual_seed(seed)
    with torch.device(device):
        vlm = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return vlm.eval()


def policy_of(vlm: Qwen2_5_VLForConditionalGeneration) -> Policy:
    """Our policy with the very weights of a model, which stays as it is."""
    return Policy(copy.deepcopy(vlm, {id(weight): weight for weight in vlm.parameters()})).eval()


def make_image(size: Size, seed: int) -> Image.Image:
    """A grey picture of random squares."""
    squares = np.random.default_rng(seed).integers(256, size=(size.side, size.side), dtype=np.uint8)
    side = size.side * PATCH
    return Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST)


def make_example(size: Size, number: int, image: str = "") -> Example:
    """A record whose prompt has P tokens; its phrase is not the next one's."""
    frame = len(_FRAME) + len(TEMPLATES[TEMPLATE].format(phrase=""))
    letters = size.P - size.image_tokens - frame
    if letters < 4:
        raise ValueError(f"want P of at least {size.P - letters + 4}, {size.image_tokens} the image's; got {size.P}")
    phrase = (f"{number:04d}" + " a small left apical pneumothorax" * (letters // 8))[:letters]
    px = size.side * PATCH
    return Example(f"{number:04d}", image, px, px, phrase, ((0, 0, px / 2, px / 2),), "", f"{number}", "", "", "train")


def make_prompts(processor: Processor, size: Size, count: int) -> list[Prompt]:
    """Prompts of P tokens, each with its own image and phrase."""
    return [
        make_prompt(make_example(size, i), make_image(size, i).convert("RGB"), processor, TEMPLATE)
        for i in range(count)
    ]


def make_groups(prompts: list[Prompt], V: int, size: Size, seed: int = 0) -> list[Group]:
    """Each prompt with G completions of C random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def completion() -> Rollout:
        tokens = torch.randint(len(_SPECIAL), V, (size.C,), generator=generator)
        return Rollout(tokens, torch.zeros(size.C), "", False)

    return [Group(prompt, tuple(completion() for _ in range(size.G))) for prompt in prompts]


def save_processor(processor: Processor, folder: Path) -> None:
    """Into a model folder."""
    processor.tokenizer.save_pretrained(folder)
    processor.images.save_pretrained(folder)
