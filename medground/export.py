"""The policy as an ordinary model folder, which plain transformers, vLLM and SGLang load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Qwen2_5_VLForConditionalGeneration

from medground.lora import merge_adapters, save_adapters

if TYPE_CHECKING:
    from medground.asking import Asking
    from medground.policy import Policy
    from medground.sharding import Ranks

ADAPTERS = "adapter"
"""Folder, within an export, of adapters by themselves."""


def export_policy(
    folder: Path,
    policy: Policy,
    model_folder: Path,
    ranks: Ranks,
    base: str | None = None,
    asking: Asking | None = None,
) -> None:
    """Write the policy as a model folder that plain transformers loads; every rank must call it.

    Adapters are merged into the weights of `model_folder`, and written by themselves into a folder within.

    Args:
        folder: where to; replaced when the new one is complete.
        policy: what.
        model_folder: the folder it was loaded from; tokenizer, processor and dtype are as there.
        ranks: the first writes.
        base: what the adapters call the model that they belong to; None for `model_folder`.
        asking: how it was asked, which is written beside it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(policy.lora.rank))
    whole = cast(dict[str, Tensor], get_model_state_dict(policy, options=options))
    if not ranks.is_first:
        return
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    state = {name.removeprefix("vlm."): value for name, value in whole.items()}
    if policy.lora.rank:
        save_adapters(aside / ADAPTERS, state, policy.lora, base or str(model_folder))
        dtype = _stored_dtype(model_folder)
        plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, dtype=dtype, use_safetensors=True)
        merge_adapters(plain, aside / ADAPTERS).save_pretrained(aside)
    else:
        _save_whole(aside, policy, state, _stored_dtype(model_folder))
    for file in sorted(model_folder.iterdir()):
        written = file.name in ("config.json", "recipe.json") or file.name.endswith(".index.json")
        terms = file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if (file.suffix in (".json", ".txt", ".jinja") or terms) and not written:
            shutil.copyfile(file, aside / file.name)
    if asking:
        asking.write(aside)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(aside, folder)


def _save_whole(folder: Path, policy: Policy, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    config = policy.plain_config()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    # the sharded class would name the keys and the dtype otherwise than the hub does
    with torch.device("meta"):
        plain = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    plain.save_pretrained(folder, state_dict={name: value.to(dtype) for name, value in state.items()})


def _stored_dtype(model_folder: Path) -> torch.dtype:
    config = json.loads((model_folder / "config.json").read_text())
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
