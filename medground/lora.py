"""Low-rank adapters, through peft: add, draw, switch off, merge, save.

    y = W x + alpha / rank * B A x,    A [rank, in],  B [out, rank],  W frozen

(Hu et al. 2021, arXiv:2106.09685.) B begins as zeros, so that the first step's policy is the model itself; with the
adapters off it always is, which makes it its own reference policy. Names of weights are those that peft gives them:
`q_proj.weight` becomes `q_proj.base_layer.weight`, beside `q_proj.lora_A.default.weight` and `lora_B`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medground.config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION, _MLP = r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up|down)_proj"
_TARGETS = {"attention": _ATTENTION, "mlp": _MLP, "all": f"({_ATTENTION}|{_MLP})"}


def need_peft() -> None:
    """See that peft can be imported.

    Raises:
        ValueError: it cannot.
    """
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(f"model.lora.rank: adapters want peft: pip install medground[lora]; got {error}") from None


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int | None) -> None:
    """Freeze a Qwen2.5-VL and give it adapters, in place: float32, whatever the model's dtype.

    Args:
        model: its weights may be on "meta"; so are those of its adapters then.
        lora: the adapters.
        seed: of what they begin as; None where that is drawn later.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(lora), model, low_cpu_mem_usage=model.device.type == "meta")
    for layer in _adapted(model):
        layer.lora_A.float()
        layer.lora_B.float()
    if seed is not None:
        draw_adapters(model, seed)


@torch.no_grad()
def draw_adapters(model: nn.Module, seed: int, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Begin anew: A uniform within 1 / sqrt(in), as peft's default, and B zero; the seed alone decides.

    Args:
        model: with adapters.
        seed: of the draw.
        put: puts the whole of a weight, the second one, where the first one is; those that are sharded take a part.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(model):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        put(A, torch.empty(A.shape).uniform_(-1, 1, generator=generator) * A.shape[1] ** -0.5)
        B.zero_()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had adapters; without gradients."""
    layers = _adapted(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(weights: Mapping[str, Tensor], lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the plain model, one after another.

    Args:
        weights: by name; an adapter and what it adapts are all there or none is. They stay as they are.
        lora: of the adapters, if there are any.

    Yields:
        (name, weight), in float32 where an adapter was added.
    """
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            A, B = (weights[f"{stem}.lora_{which}.default.weight"].float() for which in "AB")
            weight = torch.addmm(weight.float(), B, A, alpha=lora.alpha / lora.rank)
        yield name.replace(".base_layer.", "."), weight


def save_adapters(folder: Path, weights: Mapping[str, Tensor], lora: LoraConfig, base: str) -> None:
    """Write adapters as peft does.

    Args:
        folder: where to.
        weights: whole, by their names in the model; others than the adapters' are left out.
        lora: their configuration.
        base: the model that they belong to, a folder or a name on the hub.
    """
    config = peft_config(lora, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(folder)
    state = {
        f"base_model.model.{name.replace('.default.', '.')}": value.contiguous()
        for name, value in weights.items()
        if ".lora_" in name
    }
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


def merge_adapters(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapters of a folder added to its weights, in place."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def peft_config(lora: LoraConfig, **more: Any) -> Any:
    """A peft.LoraConfig that says the same, and what `more` says."""
    from peft import LoraConfig as PeftLoraConfig

    targets = rf".*\.language_model\.layers\.\d+\.{_TARGETS[lora.targets]}"
    return PeftLoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM", **more)


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]
