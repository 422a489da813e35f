"""The language model as a step of decoding runs it: one token of each row, with as few launches as the weights allow.

Products that share an input are one product: the weights of q, k and v lie one after another in memory, and those of
gate and up. They stay the policy's own, so whatever is copied into those is what decodes. On a GPU, all between two
products is one compiled kernel. The arithmetic is that of transformers' layers, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

    from medground.policy import Attend, Policy


class _Layer(NamedTuple):
    """Weights of a decoder layer, and what its norms add to a mean square."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    norm_mlp: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float


class Decoder:
    """A policy's language model, embedding and head included."""

    def __init__(self, policy: Policy, compile_with: str | None = None):
        """Join a policy's weights, in place.

        Args:
            policy: its weights are whole.
            compile_with: backend of torch.compile for all but attention, embedding and head; None for inductor on a
                GPU and no compilation on a CPU.

        Raises:
            ValueError: the activation is another one than Qwen2.5-VL's.
        """
        model, text = policy.vlm.model.language_model, policy.vlm.config.text_config
        if text.hidden_act != "silu":
            raise ValueError(f"{text._name_or_path}: want hidden_act silu; got {text.hidden_act!r}")
        self._embed, self._rotary, self._head = model.embed_tokens, model.rotary_emb, policy.vlm.lm_head
        self._norm = model.norm.weight.detach()
        self._layers = [_join(layer, text.rms_norm_eps) for layer in model.layers]
        self._scale = (text.hidden_size // text.num_attention_heads) ** -0.5
        backend = compile_with or ("inductor" if policy.device.type == "cuda" else None)

        def compiled(part: Callable) -> Callable:
            return torch.compile(part, fullgraph=True, backend=backend) if backend else part

        self._ask, self._between, self._last = compiled(_ask), compiled(_between), compiled(_last)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One more token of R rows.

        Args:
            tokens: int64 [R].
            positions: int64 [R].
            attend: of each layer; keeps its keys and values.

        Returns:
            [R, V], logits of the tokens that follow.
        """
        x = self._embed(tokens)
        # the three axes of a text token's position are equal
        cos, sin = (part[0][:, None] for part in self._rotary(x, positions.expand(3, 1, -1)))
        q, k, v = self._ask(x, self._layers[0], cos, sin)
        for i, (layer, following) in enumerate(pairwise(self._layers)):
            attended = attend(i, q, k, v, self._scale)
            x, (q, k, v) = self._between(x, attended, layer, following, cos, sin)
        attended = attend(len(self._layers) - 1, q, k, v, self._scale)
        return self._head(self._last(x, attended, self._layers[-1], self._norm))


def _ask(x: Tensor, layer: _Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [R, heads, D] of a layer's input [R, H], at the phases [R, 1, D]."""
    D = cos.shape[2]
    x = F.rms_norm(x, x.shape[1:], layer.norm, layer.eps)
    every = F.linear(x, layer.qkv, layer.qkv_bias).unflatten(1, (-1, D))
    q_heads = layer.o.shape[1] // D
    kv_heads = (every.shape[1] - q_heads) // 2
    turning, v = every.split((q_heads + kv_heads, kv_heads), 1)
    a, b = turning.chunk(2, 2)
    q, k = (turning * cos + torch.cat((-b, a), 2) * sin).split((q_heads, kv_heads), 1)
    return q, k, v


def _answer(x: Tensor, attended: Tensor, layer: _Layer) -> Tensor:
    """A layer's output [R, H] from its input and its attended heads [R, Hq, D]."""
    x = x + F.linear(attended.flatten(1), layer.o)
    gate, up = F.linear(F.rms_norm(x, x.shape[1:], layer.norm_mlp, layer.eps), layer.gate_up).chunk(2, 1)
    return x + F.linear(F.silu(gate) * up, layer.down)


def _between(x: Tensor, attended: Tensor, layer: _Layer, following: _Layer, cos: Tensor, sin: Tensor):
    """The end of a layer and the beginning of the next one."""
    x = _answer(x, attended, layer)
    return x, _ask(x, following, cos, sin)


def _last(x: Tensor, attended: Tensor, layer: _Layer, norm: Tensor) -> Tensor:
    """The end of the last layer and the norm before the head."""
    x = _answer(x, attended, layer)
    return F.rms_norm(x, x.shape[1:], norm, layer.eps)


def _join(layer: Qwen2_5_VLDecoderLayer, eps: float) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _lay_together(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, _ = _lay_together(mlp.gate_proj, mlp.up_proj)
    return _Layer(
        norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        o=attention.o_proj.weight.detach(),
        norm_mlp=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        down=mlp.down_proj.weight.detach(),
        eps=eps,
    )


@torch.no_grad()
def _lay_together(*products: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of products with one input as those of one product, of which theirs become parts."""

    def lay(*parts: Tensor) -> Tensor:
        whole = torch.cat(parts)
        for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = place
        return whole

    biases = [product.bias for product in products if product.bias is not None]
    return lay(*(product.weight for product in products)), lay(*biases) if biases else None
