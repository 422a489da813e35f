"""Encoders of open_clip (MIT), from a folder (`open_clip_config.json` and weights) or the hub.

A folder with a text tower of transformers needs its configuration beside: `text_cfg.hf_model_name` in
open_clip_config.json is then the path of a folder with BERT's config.json and tokenizer.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medground.rewards.encoders import Encoder, scale_of


class OpenClip(Encoder):
    """A model of open_clip."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str) -> None:
        """Take a loaded model and its tokenizer."""
        visual = model.visual
        super().__init__(visual.image_mean, visual.image_std, device)
        self.size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
        self.scale = scale_of(model.logit_scale.item())
        self._model, self._tokenizer = model.to(device, self.dtype).eval(), tokenizer

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As `Encoder` says."""
        return self._model.encode_image(pixels)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """As `Encoder` says."""
        return self._model.encode_text(self._tokenizer(texts).to(self.device))


def load(place: str, device: torch.device | str) -> OpenClip:
    """Read it from a folder, or by its name on the hub.

    Raises:
        ValueError: open_clip is not installed, or the folder is none of its.
    """
    try:
        open_clip = importlib.import_module("open_clip")
    except ModuleNotFoundError:
        raise ValueError("reward.encoder: open_clip is not installed: pip install 'medground[semantic]'") from None
    folder = Path(place)
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise ValueError(f"reward.encoder: want {folder / 'open_clip_config.json'}; there is none")
        name = f"local-dir:{folder}"
    else:
        name = f"hf-hub:{place}"
    model = open_clip.create_model(name, device=device)
    return OpenClip(model, open_clip.get_tokenizer(name), device)
