"""MedCLIP's ViT encoder (Wang et al. 2022, arXiv:2210.10163), from its published weights, without its package.

    image: Swin-tiny's pooled output W_v                                       [512]
    text:  mean over tokens of the mean of hidden states 1, 2 and last, W_t    [512]

The archive medclip-vit-pretrained.zip holds pytorch_model.bin, with keys as transformers 4.24 named them. The package
averages over the padding of a batch, too; here each text is what it would be alone. Setup says BSD, there is no licence
file, and the weights' licence is not stated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer, SwinConfig, SwinModel

from medground.rewards.encoders import Encoder, need_file, scale_of

SIZE, MEAN, STD, TOKENS = 224, 0.5862785803043838, 0.27950088968644304, 77
_HOW = (
    "Unpack https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip there, and put vocab.txt of "
    "emilyalsentzer/Bio_ClinicalBERT beside it; the weights' licence is not stated."
)
_RENAMED = (  # Swin's keys: transformers 4.24 -> 5
    (r"\.attention\.self\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (
        r"\.attention\.self\.relative_position_bias_table$",
        ".attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
_DERIVED = ("position_ids", "relative_position_index")  # buffers that are not learnt


class _Tower(nn.Module):
    model: nn.Module
    projection_head: nn.Linear

    def __init__(self, model: nn.Module, width: int, projected: int, bias: bool) -> None:
        super().__init__()
        self.model, self.projection_head = model, nn.Linear(width, projected, bias=bias)


class MedClip(Encoder):
    """The two towers; `vocab` is a file of word pieces."""

    def __init__(
        self, weights: dict[str, Tensor], vision: SwinConfig, text: BertConfig, vocab: Path, device: Any
    ) -> None:
        """Put the published weights into towers of these shapes.

        Raises:
            ValueError: a key is missing, left over or of another shape; names it.
        """
        super().__init__([MEAN] * 3, [STD] * 3, device)
        self.size, self.scale = vision.image_size, scale_of(weights.get("logit_scale", torch.tensor(2.6593)))
        weights = _renamed(weights)
        projected = weights["vision_model.projection_head.weight"].shape[0]
        bias = "text_model.projection_head.bias" in weights
        self._vision = _Tower(SwinModel(vision), vision.hidden_size, projected, bias=False)
        self._text = _Tower(BertModel(text), text.hidden_size, projected, bias)
        towers = nn.ModuleDict({"vision_model": self._vision, "text_model": self._text})
        wanted = {name: tuple(value.shape) for name, value in towers.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        for name in wanted | given:
            if wanted.get(name) != given.get(name) and not name.endswith(_DERIVED):
                got = given.get(name, "nothing")
                raise ValueError(f"MedCLIP's weights: {name}: want {wanted.get(name, 'nothing')}; got {got}")
        towers.load_state_dict(weights, strict=False)  # compared above
        towers.to(device, self.dtype).eval()
        self._tokenizer = BertTokenizer(str(vocab), do_lower_case=False)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As `Encoder` says."""
        return self._vision.projection_head(self._vision.model(pixels).pooler_output)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """As `Encoder` says."""
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        tokens = tokens.to(self.device)
        states = self._text.model(**tokens, output_hidden_states=True).hidden_states
        mean = torch.stack([states[1], states[2], states[-1]]).mean(0)
        real = tokens["attention_mask"][..., None].to(mean.dtype)
        return self._text.projection_head((mean * real).sum(1) / real.sum(1))


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in weights.items():
        if name == "logit_scale" or name.endswith(_DERIVED):
            continue
        if name.startswith("vision_model.model."):
            for old, new in _RENAMED:
                name = re.sub(old, new, name)
        out[name] = value
    return out


def load(place: str, device: torch.device | str) -> MedClip:
    """Read it from a folder; `vision.json` and `text.json` there describe towers of other shapes than the published.

    Raises:
        ValueError: a file is missing, or the weights are not MedCLIP's.
    """
    file = need_file(place, "pytorch_model.bin", _HOW)
    vocab = need_file(place, "vocab.txt", _HOW)
    vision, text = (_shape(Path(place) / name) for name in ("vision.json", "text.json"))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return MedClip(weights, SwinConfig(**vision), BertConfig(**({"vocab_size": 28996} | text)), vocab, device)


def _shape(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
