"""Small models and groups of any shape, made without files, for tests of packing and decoding."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from medground.policy import Policy
from medground.prompts import mrope_positions
from medground.records import Example, Group, Prompt, Rollout

V = 160
IMAGE, VIDEO, START, END, EOS = 150, 151, 152, 153, 154
STOPS = (EOS, *range(12))  # so many that completions differ in length
CHANNELS, PATCH, TEMPORAL, MERGE = 3, 4, 2, 2


def small_model(
    seed: int = 0, vision: Mapping[str, object] | None = None, **text: object
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights that are large enough to tell tokens apart, as transformers runs it."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08,
            "max_position_embeddings": 512, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        } | text,
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": PATCH, "temporal_patch_size": TEMPORAL, "spatial_merge_size": MERGE, "in_channels": CHANNELS,
            "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.1,
        } | dict(vision or {}),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    vlm = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    vlm.generation_config.eos_token_id = list(STOPS)
    return vlm.eval()


def policy_of(vlm: Qwen2_5_VLForConditionalGeneration) -> Policy:
    """The same weights as a policy of ours."""
    twin = type(vlm)._from_config(type(vlm.config).from_dict(vlm.config.to_dict()), attn_implementation="sdpa")
    twin.load_state_dict(vlm.state_dict())
    twin.generation_config = deepcopy(vlm.generation_config)
    return Policy(twin.eval())


def made_prompt(name: str, texts: Sequence[int], images: Sequence[tuple[int, int]] = (), seed: int = 0) -> Prompt:
    """texts[0] text tokens, the first image of (height, width) merged patches, texts[1] text tokens, ..."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, grids = [], [], []
    for number, count in enumerate(texts):
        ids.append(torch.randint(0, 140, (count,), generator=generator))
        if number < len(images):
            h, w = images[number]
            ids.append(torch.tensor([START] + [IMAGE] * (h * w) + [END]))
            grids.append([1, h * MERGE, w * MERGE])
            pixels.append(torch.randn(h * w * MERGE**2, CHANNELS * TEMPORAL * PATCH**2, generator=generator))
    input_ids = torch.cat(ids)
    grid = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    return Prompt(
        example=Example(name, f"{name}.png", 64, 64, "a phrase", (), "category", name, name, "made up", "train"),
        input_ids=input_ids,
        position_ids=mrope_positions(input_ids == IMAGE, grid // torch.tensor([1, MERGE, MERGE])),
        pixel_values=torch.cat(pixels) if pixels else torch.empty(0, CHANNELS * TEMPORAL * PATCH**2),
        image_grid_thw=grid,
        image_keys=tuple(f"{name}/{seed}/{i}" for i in range(len(grids))),
        processed_width=64,
        processed_height=64,
    )


def made_group(prompt: Prompt, lengths: Sequence[int], seed: int = 0) -> Group:
    """Random completions of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return Group(prompt, tuple(rolled(torch.randint(0, 140, (C,), generator=generator)) for C in lengths))


def rolled(tokens: Tensor) -> Rollout:
    """A completion of these tokens."""
    return Rollout(tokens, torch.zeros(len(tokens)), "", True)


class Words:
    """As much of a tokenizer as decoding needs."""

    eos_token_id = EOS

    def decode(self, tokens: Tensor) -> str:
        """Tokens by number."""
        return " ".join(map(str, tokens.tolist()))
