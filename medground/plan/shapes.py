"""Shapes of models whose folder is not on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, Qwen2_5_VLConfig

PATCH, MERGE = 14, 2
IMAGE_TOKENS = {
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "image_token_id": 151_655,
    "video_token_id": 151_656,
}
"""Of the published models."""


@dataclass(frozen=True)
class Architecture:
    """Shape of a Qwen2.5-VL, and the deviation of random weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    V: int
    tied: bool
    vision_depth: int
    vision_hidden: int
    vision_heads: int
    vision_intermediate: int
    full_attention: tuple[int, ...]
    deviation: float = 0.02


_VISION = (32, 1280, 16, 3420, (7, 15, 23, 31))
PUBLISHED = {
    "3b": Architecture(2048, 36, 16, 2, 11_008, 151_936, True, *_VISION),
    "7b": Architecture(3584, 28, 28, 4, 18_944, 152_064, False, *_VISION),
}
"""Those of the published configurations, by size."""

_NAMES = {f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct": shape for size, shape in PUBLISHED.items()}


def config_of(shape: Architecture, tokens: Mapping[str, int], pad_token: int | None = None) -> Qwen2_5_VLConfig:
    """The configuration as transformers reads it.

    Args:
        shape: of the model.
        tokens: ids of the image tokens, by the names of IMAGE_TOKENS.
        pad_token: id, if there is one.
    """
    half = shape.hidden // shape.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.V,
            "initializer_range": shape.deviation,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 128_000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8],
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": pad_token,
        },
        vision_config={
            "depth": shape.vision_depth,
            "initializer_range": shape.deviation,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 112,
            "fullatt_block_indexes": list(shape.full_attention),
        },
        **tokens,
        tie_word_embeddings=shape.tied,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def model_config(path: str) -> Qwen2_5_VLConfig:
    """Of a model folder (its config.json is enough), or of a published model by its name on the hub.

    Raises:
        ValueError: there is no such folder and the name is not known, or it is another kind of model.
    """
    if path in _NAMES and not Path(path).is_dir():
        return config_of(_NAMES[path], IMAGE_TOKENS)
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"model.path: want a folder with config.json (weights are not needed) or one of {', '.join(_NAMES)}, whose "
            f"shapes are known; got {path!r}"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{path}: want model_type qwen2_5_vl; got {config.model_type!r}")
    return config
