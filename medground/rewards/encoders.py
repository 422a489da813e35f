"""Frozen image-text encoders: crops and phrases -> unit vectors whose product says how well they agree.

    open_clip:PLACE      a folder or hub name that open_clip loads (BiomedCLIP, PMC-CLIP); wants open_clip_torch
    transformers:PLACE   CLIP and SigLIP families (PubMedCLIP, MedSigLIP)
    medclip:FOLDER       MedCLIP's ViT: pytorch_model.bin as published, and vocab.txt of Bio_ClinicalBERT
    phantom:FOLDER       a small one for phantom films: medground encoders build

Nothing is loaded at import. Weights come from files that cannot run code (safetensors, `weights_only`). Each encoder
brings its own size, mean and deviation of pixels.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 256
"""Crops that go through the network at once."""

KINDS = {
    "open_clip": "medground.rewards.encoder_open_clip",
    "transformers": "medground.rewards.encoder_transformers",
    "medclip": "medground.rewards.encoder_medclip",
    "phantom": "medground.rewards.encoder_phantom",
}


class Encoder(ABC):
    """An image-text encoder on its device.

    Attributes:
        size: sides of the crops that it takes.
        scale: what the cosine is multiplied by before a softmax, as it was trained.
        channels: of the crops that it takes: 3, or the first alone.
    """

    channels: int = 3
    size: int
    scale: float

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> None:
        """Remember how pixels are scaled and where they go, a number for each channel."""
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._mean, self._std = (torch.tensor(list(v), device=device).view(1, -1, 1, 1) for v in (mean, std))
        self._known: dict[str, Tensor] = {}

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """[n, channels, size, size] of scaled pixels, in `dtype` -> [n, D]."""

    @abstractmethod
    def encode_texts(self, texts: list[str]) -> Tensor:
        """n texts -> [n, D]."""

    @torch.inference_mode()
    def images(self, crops: Tensor) -> Tensor:
        """Unit vectors [n, D], float32, of crops [n, channels, size, size] in 0..1 on the device."""
        parts = [
            self.encode_images(((part - self._mean) / self._std).to(self.dtype)).float() for part in crops.split(BATCH)
        ]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, D], float32, of texts; each distinct text is encoded once and kept."""
        new = sorted({text for text in texts if text not in self._known})
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            vectors = torch.nn.functional.normalize(self.encode_texts(some).float(), dim=-1)
            self._known |= dict(zip(some, vectors.unbind(), strict=True))
        return torch.stack([self._known[text] for text in texts])


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """The encoder that `kind:place` names, ready on the device.

    Raises:
        ValueError: no such kind, nothing at the place, or weights that do not fit; says how to get it.
    """
    kind, _, place = name.partition(":")
    if kind not in KINDS or not place:
        raise ValueError(f"reward.encoder: want {', '.join(f'{k}:PLACE' for k in KINDS)}; got {name!r}")
    try:
        return importlib.import_module(KINDS[kind]).load(place, device)
    except (OSError, ImportError, KeyError, RuntimeError) as error:  # what hubs and loaders raise
        raise ValueError(f"reward.encoder: {name} cannot be loaded: {type(error).__name__}: {error}") from error


def need_file(folder: str, file: str, how: str) -> Path:
    """A file of an encoder's folder.

    Raises:
        ValueError: there is none; says how to get it.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise ValueError(f"reward.encoder: want {path}; there is none. {how}")
    return path


def scale_of(logit: Any) -> float:
    """exp of a learnt logit scale, at most 100, as the encoders clamp it."""
    return min(math.exp(float(logit)), 100.0)
