"""CLIP and SigLIP encoders through transformers, from a folder or the hub: PubMedCLIP (MIT), MedSigLIP (gated)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from medground.rewards.encoders import Encoder, scale_of

FAMILIES = ("clip", "siglip", "siglip2")


class TransformersEncoder(Encoder):
    """A dual encoder of transformers."""

    def __init__(self, model: Any, tokenizer: Any, mean: Any, std: Any, device: torch.device | str) -> None:
        """Take a loaded model, its tokenizer and its pixels' mean and deviation."""
        super().__init__(mean, std, device)
        self.size = model.config.vision_config.image_size
        self.scale = scale_of(model.logit_scale.item())
        self._model, self._tokenizer = model.to(device, self.dtype).eval(), tokenizer
        self._length = model.config.text_config.max_position_embeddings
        # SigLIP was trained on texts padded to its length, without a mask
        self._padding = "max_length" if model.config.model_type.startswith("siglip") else True

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As `Encoder` says."""
        return _features(self._model.get_image_features(pixel_values=pixels))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """As `Encoder` says."""
        tokens = self._tokenizer(
            texts, padding=self._padding, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self.device)
        mask = {} if self._padding == "max_length" else {"attention_mask": tokens["attention_mask"]}
        return _features(self._model.get_text_features(input_ids=tokens["input_ids"], **mask))


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def load(place: str, device: torch.device | str) -> TransformersEncoder:
    """Read it; nothing but its weights is taken from the place, no code.

    Raises:
        ValueError: it is of another family.
    """
    kind = AutoConfig.from_pretrained(place, trust_remote_code=False).model_type
    if kind not in FAMILIES:
        raise ValueError(f"reward.encoder: {place}: want a model_type of {', '.join(FAMILIES)}; got {kind!r}")
    model = AutoModel.from_pretrained(place, trust_remote_code=False, dtype=torch.float32)
    pixels, _ = ImageProcessingMixin.get_image_processor_dict(place)  # the processor itself may want torchvision
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    return TransformersEncoder(model, tokenizer, pixels["image_mean"], pixels["image_std"], device)
