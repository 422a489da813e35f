"""The policy: a Qwen2.5-VL, and what training asks of it.

`Policy.forward` scores completions, `Policy.loss` trains on them, `Policy.prefill` and `Policy.decode` sample them. All
run inside the root module's forward, where FSDP2 has the whole embedding and head.

Scoring is the plain form: one row [prompt | completion] for each completion, padded on the right
(which causal attention never looks at). The image of a prompt is encoded once for all its rows, and its
features go to prompt positions only, so a sampled image token cannot break the forward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache

from medground.records import Group, Prompt
from medground_kernels.grpo_options import GrpoOptions, GrpoOutput
from medground_kernels.linear_grpo import linear_grpo
from medground_kernels.linear_logprob import linear_logprob
from medground_kernels.token_logprob import TokenLogprob


class Rows(NamedTuple):
    """Groups as padded rows: S rows of T tokens, N completion tokens.

    Attributes:
        input_ids: [S, T], int64.
        position_ids: [3, S, T], int64.
        is_image: [S, T], bool, image placeholders of the prompt.
        scored: [N], int64, flat indices into S*T of the positions that predict a completion token.
        targets: [N], int64, those tokens.
        cu_seqlens: [S+1], int32, where each completion starts in the N tokens.
        pixel_values: [patches, features], float32, each image once.
        image_grid_thw: [B, 3], int64.
        copies: [B], int64, rows of each prompt.
    """

    input_ids: Tensor
    position_ids: Tensor
    is_image: Tensor
    scored: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    copies: Tensor


def check_model(folder: Path) -> None:
    """See whether a folder holds a Qwen2.5-VL with weights as safetensors.

    Raises:
        ValueError: it does not.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: want a model folder with config.json; it has none")
    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    if kind != "qwen2_5_vl":
        raise ValueError(f"{folder}: want model_type qwen2_5_vl; got {kind!r}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: want weights as .safetensors; it has none")


def load_policy(folder: Path) -> "Policy":
    """Load a Qwen2.5-VL model folder in float32, from safetensors alone.

    Raises:
        ValueError: the folder holds no such model.
    """
    check_model(folder)
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True
    )
    return Policy(vlm)


def pack_rows(groups: Sequence[Group], image_token: int, device: torch.device) -> Rows:
    """Lay groups out as padded rows; a group may have any number of completions."""
    ids, positions, images, scored, targets, copies = [], [], [], [], [], []
    for group in groups:
        prompt, P = group.prompt, len(group.prompt.input_ids)
        copies.append(len(group.rollouts))
        for rollout in group.rollouts:
            C = len(rollout.tokens)
            ids.append(torch.cat([prompt.input_ids, rollout.tokens]))
            following = prompt.position_ids.max() + 1 + torch.arange(C)
            positions.append(torch.cat([prompt.position_ids, following.expand(3, -1)], 1).T)
            images.append(torch.cat([prompt.input_ids == image_token, torch.zeros(C, dtype=torch.bool)]))
            scored.append(torch.arange(P - 1, P + C - 1))
            targets.append(rollout.tokens)
    input_ids = pad_sequence(ids, batch_first=True)
    S, T = input_ids.shape
    lengths = torch.tensor([len(t) for t in targets])
    rows = Rows(
        input_ids=input_ids,
        position_ids=pad_sequence(positions, batch_first=True).permute(2, 0, 1),
        is_image=pad_sequence(images, batch_first=True),
        scored=torch.cat([s + row * T for row, s in enumerate(scored)]),
        targets=torch.cat(targets),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        pixel_values=torch.cat([group.prompt.pixel_values for group in groups]),
        image_grid_thw=torch.cat([group.prompt.image_grid_thw for group in groups]),
        copies=torch.tensor(copies),
    )
    return Rows(*(t.to(device) for t in rows))


class Policy(nn.Module):
    """A Qwen2.5-VL as GRPO uses it."""

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration):
        super().__init__()
        self.vlm = vlm

    @property
    def image_token(self) -> int:
        """Id of the image placeholder."""
        return self.vlm.config.image_token_id

    @property
    def never_sampled(self) -> list[int]:
        """Ids of image, video and vision-marker tokens, which mean nothing in a completion."""
        config = self.vlm.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        found = {getattr(config, name, None) for name in names}
        return sorted(token for token in found if token is not None)

    def forward(self, rows: Rows, temperature: float) -> TokenLogprob:
        """Log-probability and entropy, float32 [N], of every completion token of `rows`."""
        return linear_logprob(self._scored(rows), self.vlm.lm_head.weight, rows.targets, temperature=temperature)

    def loss(
        self,
        rows: Rows,
        advantages: Tensor,
        *,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        options: GrpoOptions,
        total_tokens: int,
    ) -> GrpoOutput:
        """GRPO loss of `rows`, from float32 advantages [S] and old and reference log-probabilities [N]."""
        return linear_grpo(
            self._scored(rows),
            self.vlm.lm_head.weight,
            rows.targets,
            advantages,
            rows.cu_seqlens,
            old_logp=old_logp,
            ref_logp=ref_logp,
            options=options,
            total_tokens=total_tokens,
        )

    def _scored(self, rows: Rows) -> Tensor:
        """The final hidden state [N, H] that predicts each completion token."""
        embeds = self._embed(rows.input_ids, rows.is_image, rows.pixel_values, rows.image_grid_thw, rows.copies)
        hidden = self.vlm.model.language_model(
            inputs_embeds=embeds, position_ids=rows.position_ids, attention_mask=None, use_cache=False
        ).last_hidden_state
        return hidden.flatten(0, 1)[rows.scored]

    def prefill(self, prompts: Sequence[Prompt], copies: int) -> tuple[Tensor, "Decoding"]:
        """Run each prompt once and repeat its cache for `copies` completions.

        Returns:
            Logits [B*copies, V] of the first token, and the state that `decode` continues from. Rows of
            a prompt are neighbours.
        """
        device = self.vlm.lm_head.weight.device
        # padded on the left, so that every row's last token stands in the last column
        input_ids = _pad_left([p.input_ids for p in prompts]).to(device)
        position_ids = _pad_left([p.position_ids.T for p in prompts]).permute(2, 0, 1).to(device)
        mask = _pad_left([torch.ones_like(p.input_ids) for p in prompts]).to(device)
        embeds = self._embed(
            input_ids,
            input_ids == self.image_token,
            torch.cat([p.pixel_values for p in prompts]).to(device),
            torch.cat([p.image_grid_thw for p in prompts]).to(device),
            torch.ones(len(prompts), dtype=torch.int64, device=device),
        )
        cache = DynamicCache(config=self.vlm.config.text_config)
        hidden = self.vlm.model.language_model(
            inputs_embeds=embeds, position_ids=position_ids, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        cache.batch_repeat_interleave(copies)
        following = torch.stack([p.position_ids.max() + 1 for p in prompts]).to(device)
        state = Decoding(cache, mask.repeat_interleave(copies, 0), following.repeat_interleave(copies))
        return self.vlm.lm_head(hidden).repeat_interleave(copies, 0), state

    def decode(self, tokens: Tensor, state: "Decoding") -> tuple[Tensor, "Decoding"]:
        """Append one token to each row: [R], int64 -> logits [R, V] of the next, and the new state."""
        mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], 1)
        hidden = self.vlm.model.language_model(
            inputs_embeds=self.vlm.model.get_input_embeddings()(tokens)[:, None],
            position_ids=state.following.expand(3, 1, -1).transpose(1, 2),
            attention_mask=mask,
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return self.vlm.lm_head(hidden), Decoding(state.cache, mask, state.following + 1)

    def _embed(self, input_ids: Tensor, is_image: Tensor, pixels: Tensor, grids: Tensor, copies: Tensor) -> Tensor:
        embeds = self.vlm.model.get_input_embeddings()(input_ids)
        per_image = self.vlm.model.get_image_features(pixels, grids).pooler_output
        features = torch.cat([f.repeat(n, 1) for f, n in zip(per_image, copies.tolist(), strict=True)])
        return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))


class Decoding(NamedTuple):
    """Where decoding stands: cache, attention mask [R, tokens so far], next position [R]."""

    cache: Cache
    mask: Tensor
    following: Tensor


def _pad_left(rows: list[Tensor]) -> Tensor:
    flipped = pad_sequence([row.flip(0) for row in rows], batch_first=True)
    return flipped.flip(1)
