"""The policy: a Qwen2.5-VL, and what training asks of it.

`Policy.forward` scores completions, `Policy.loss` trains on them, both inside the root module's forward, where FSDP2
has the whole embedding and head. `Policy.prefill` begins to sample them; `rollout.decoder` goes on.

Tokens come as one flat stream (`packing.Packed`), batch size 1. Who attends to whom is in an `Attend` that goes with
the call: the registered attention function hands it each layer's heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from medground.config import LoraConfig
from medground.lora import adapters_off, add_adapters
from medground_kernels.grpo_options import GrpoOptions, GrpoOutput
from medground_kernels.linear_grpo import linear_grpo
from medground_kernels.linear_logprob import linear_logprob
from medground_kernels.prefix_attention import prefix_attention
from medground_kernels.token_logprob import TokenLogprob
from medground_kernels.varlen_attention import VarlenPlan, varlen_attention, varlen_plan

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig

    from medground.packing import Packed

# transformers hands the segments of its vision tower over in one call if the name says "flash"
_TEXT, _VISION = "medground_stream", "medground_flash_vision"


class Attend(Protocol):
    """Attention of one layer over the stream."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""


class Store(Protocol):
    """Where prefill leaves the keys and values of its stream."""

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k and v [T, Hkv, D] of one layer."""


def check_model(folder: Path) -> Qwen2_5_VLConfig:
    """See whether a folder holds a Qwen2.5-VL with weights as safetensors.

    Returns:
        Its configuration.

    Raises:
        ValueError: it does not.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: want a model folder with config.json; it has none")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{folder}: want model_type qwen2_5_vl; got {config.model_type!r}")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: want weights as .safetensors; it has none")
    return config


def empty_policy(folder: Path, dtype: torch.dtype) -> Policy:
    """A model folder's policy without its weights: they are on "meta", in `dtype`; buffers are there already.

    Raises:
        ValueError: the folder holds no such model.
    """
    config = check_model(folder)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(config)
    vlm.to(dtype)
    if (folder / "generation_config.json").is_file():
        vlm.generation_config = GenerationConfig.from_pretrained(folder)
    for module in list(vlm.modules()):
        if list(module.buffers(recurse=False)):  # rotary frequencies, float32 whatever the weights
            for name, buffer in type(module)(module.config).named_buffers():
                setattr(module, name, buffer)
    return Policy(vlm)


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> Policy:
    """Load a Qwen2.5-VL model folder, from safetensors alone.

    Raises:
        ValueError: the folder holds no such model.
    """
    check_model(folder)
    return Policy(Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True))


class Policy(nn.Module):
    """A Qwen2.5-VL as GRPO uses it.

    Attributes:
        vlm: the model.
        lora: of its adapters; rank 0 where it has none.
    """

    def __init__(self, vlm: Qwen2_5_VLForConditionalGeneration):
        super().__init__()
        vlm.config.text_config._attn_implementation = _TEXT
        vlm.config.vision_config._attn_implementation = _VISION
        self.vlm, self.lora = vlm, LoraConfig()

    def add_adapters(self, lora: LoraConfig, seed: int | None) -> None:
        """Freeze the model and train adapters in its place, which begin as the seed says; before it is sharded.

        Without a seed they are not drawn yet.
        """
        add_adapters(self.vlm, lora, seed)
        self.lora = lora

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each decoder layer and vision block, attention aside, once for all lengths."""
        for block in [*self.vlm.model.visual.blocks, *self.vlm.model.language_model.layers]:
            block.compile(dynamic=True, backend=backend)

    def plain_config(self) -> Qwen2_5_VLConfig:
        """A copy of the model's configuration, as transformers runs it without us."""
        config = copy.deepcopy(self.vlm.config)
        for part in (config.text_config, config.vision_config):
            part._attn_implementation = "sdpa"
        return config

    def empty_copy(self, dtype: torch.dtype, device: torch.device, shared: Mapping[str, Tensor]) -> Policy:
        """A policy of the same shape, frozen, in `dtype`, whose weights are not filled in yet.

        Args:
            dtype: of the weights.
            device: where they are.
            shared: weights to take as they are, by name; they stay the caller's.
        """
        with torch.device("meta"):
            vlm = Qwen2_5_VLForConditionalGeneration(self.plain_config())
        vlm.generation_config = self.vlm.generation_config
        copied = Policy(vlm).eval()
        for name, empty in list(copied.named_parameters()):  # tied ones once
            weight = shared.get(name)
            weight = torch.empty_like(empty, dtype=dtype, device=device) if weight is None else weight
            copied.set_tensor(name, nn.Parameter(weight, requires_grad=False))
        vlm.tie_weights()
        for name, buffer in self.named_buffers():  # not computed on "meta", and float32 whatever the weights
            copied.set_tensor(name, buffer.clone())
        return copied

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Put a parameter or buffer in the place of another."""
        module, _, own = name.rpartition(".")
        setattr(self.get_submodule(module), own, value)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vlm.lm_head.weight.device

    @property
    def never_sampled(self) -> list[int]:
        """Ids of image, video and vision-marker tokens, which mean nothing in a completion."""
        config = self.vlm.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        found = {getattr(config, name, None) for name in names}
        return sorted(token for token in found if token is not None)

    @property
    def patch_cost(self) -> float:
        """Work of an image patch, in tokens of the stream: as its weights are to the layers'."""
        visual, text = self.vlm.model.visual, self.vlm.model.language_model
        return sum(p.numel() for p in visual.parameters()) / sum(p.numel() for p in text.layers.parameters())

    def forward(self, packed: Packed, temperature: float, *, adapters: bool = True) -> TokenLogprob:
        """Log-probability and entropy, float32 [N], of every completion token.

        Args:
            packed: the tokens.
            temperature: divides the logits.
            adapters: False for the model without its adapters, and without gradients.
        """
        weight = self.vlm.lm_head.weight
        # here and not around the call: before its first forward pass FSDP2 looks at what is trained
        with nullcontext() if adapters else adapters_off(self.vlm):
            return linear_logprob(self._scored(packed), weight, packed.targets, temperature=temperature)

    def loss(
        self,
        packed: Packed,
        advantages: Tensor,
        *,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        options: GrpoOptions,
        total_tokens: int,
    ) -> GrpoOutput:
        """GRPO loss, from float32 advantages [S] and old and reference log-probabilities [N]."""
        return linear_grpo(
            self._scored(packed),
            self.vlm.lm_head.weight,
            packed.targets,
            advantages,
            packed.cu_seqlens,
            old_logp=old_logp,
            ref_logp=ref_logp,
            options=options,
            total_tokens=total_tokens,
        )

    def prefill(self, packed: Packed, store: Store) -> Tensor:
        """Run prompts without completions: logits [B, V] of each one's first token; keys and values go to `store`."""
        return self.vlm.lm_head(self._run(packed, store)[packed.ends])

    def _scored(self, packed: Packed) -> Tensor:
        """The final hidden state [N, H] that predicts each completion token."""
        return self._run(packed)[packed.scored]

    def _run(self, packed: Packed, store: Store | None = None) -> Tensor:
        """Final hidden states [T, H] of a stream; keys and values go to `store`, if there is one."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if store:
                store(layer, k, v)
            return prefix_attention(q, k, v, packed.layout, scale=scale)

        model = self.vlm.model.language_model
        embeds, positions = self._embed(packed)[None], packed.position_ids[:, None]
        return model(inputs_embeds=embeds, position_ids=positions, use_cache=False, attend=attend).last_hidden_state[0]

    def _embed(self, packed: Packed) -> Tensor:
        """Embeddings [T, H] of the stream, features of the images in their places."""
        embeds = self.vlm.model.get_input_embeddings()(packed.input_ids)
        if not packed.image_grids:
            # under FSDP2 every rank has to run the vision tower: one image of zeros, which changes nothing
            config = self.vlm.config.vision_config
            merge = config.spatial_merge_size
            size = config.in_channels * config.temporal_patch_size * config.patch_size**2
            features = self._see(embeds.new_zeros(merge**2, size), [[1, merge, merge]])
            return embeds + 0 * features.sum()
        features = self._see(packed.pixel_values, packed.image_grids)[packed.image_from]
        return embeds.index_copy(0, packed.image_at, features.to(embeds.dtype))

    def _see(self, pixels: Tensor, sizes: list[list[int]]) -> Tensor:
        """Features [rows, H] of images; what their sizes alone decide is worked out on the CPU, so nothing waits."""
        visual, device = self.vlm.model.visual, pixels.device
        merge, grids = visual.spatial_merge_size, torch.tensor(sizes)
        whole = get_vision_cu_seqlens(grids)
        order, windows = get_vision_window_index(grids, merge, visual.window_size, visual.patch_size)
        plans = [varlen_plan(cu.diff().tolist(), cu.diff().tolist(), device, causal=False) for cu in (whole, windows)]
        settings: dict[str, Any] = {
            "position_ids": get_vision_position_ids(grids, merge).to(device),
            "cu_seqlens": plans[0].cu_q,
            "max_seqlen": plans[0].max_q,
            "window_index": order.to(device),
            "cu_window_seqlens": plans[1].cu_q,
            "max_window_seqlen": plans[1].max_q,
        }
        pixels = pixels.to(visual.dtype)
        return visual(pixels, grid_thw=grids, plans=plans, **settings).pooler_output


@torch.compiler.disable
def _attend_stream(module, query, key, value, attention_mask, *, scaling, attend: Attend, **_: Any):
    """transformers' attention of a decoder layer: heads [1, heads, T, D] -> [1, T, heads, D]."""
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return attend(module.layer_idx, q, k, v, scaling)[None], None


@torch.compiler.disable
def _attend_images(
    module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, plans: list[VarlenPlan], **_: Any
):
    """The same of a vision block, within whole images or within windows."""
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    plan = next(plan for plan in plans if plan.cu_q is cu_seq_lens_q)
    return varlen_attention(q, k, v, plan, scale=scaling)[None], None


AttentionInterface.register(_TEXT, _attend_stream)
AttentionInterface.register(_VISION, _attend_images)
