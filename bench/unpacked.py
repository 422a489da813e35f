"""Groups as other trainers run them: G padded rows [prompt | completion], the image encoded once for each.

Nothing of ours is in it but the form of a group: transformers finds the positions and masks, PyTorch the
log-probabilities. Tests compare with it, benchmarks measure beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration

from medground.records import Group


class Rows(NamedTuple):
    """S rows of T tokens, padded on the right; N completion tokens.

    Attributes:
        inputs: what the model takes.
        scored: [N], int64, flat indices into S*T of the tokens that predict a completion token.
        targets: [N], int64.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    targets: Tensor


def load_plain(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The model as transformers runs it, float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def pad_rows(groups: Sequence[Group], image_token: int, device: torch.device) -> Rows:
    """A row for every completion."""
    rows = [(group.prompt, rollout.tokens) for group in groups for rollout in group.rollouts]
    ids = [torch.cat([prompt.input_ids, tokens]) for prompt, tokens in rows]
    T = max(len(row) for row in ids)
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "mm_token_type_ids": pad_sequence([(row == image_token).int() for row in ids], batch_first=True),
    }
    if any(len(prompt.image_grid_thw) for prompt, _ in rows):
        inputs["pixel_values"] = torch.cat([prompt.pixel_values for prompt, _ in rows])
        inputs["image_grid_thw"] = torch.cat([prompt.image_grid_thw for prompt, _ in rows])
    spans = [(s * T + len(p.input_ids) - 1, len(tokens)) for s, (p, tokens) in enumerate(rows)]
    scored = torch.cat([torch.arange(start, start + C) for start, C in spans])
    targets = torch.cat([tokens for _, tokens in rows])
    return Rows({name: t.to(device) for name, t in inputs.items()}, scored.to(device), targets.to(device))


def unpacked_logp(vlm: Qwen2_5_VLForConditionalGeneration, rows: Rows, temperature: float) -> Tensor:
    """Log-probability of every completion token, float32 [N]."""
    hidden = vlm.model(**rows.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[rows.scored]
    logits = vlm.lm_head(hidden).float() / temperature
    return logits.log_softmax(-1).gather(-1, rows.targets[:, None])[:, 0]
