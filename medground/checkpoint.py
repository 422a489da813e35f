"""Save and resume a run's state; export the policy as an ordinary model folder.

A checkpoint is torch.distributed.checkpoint's sharded form of the weights that are trained and their AdamW moments,
float32, with a small JSON file beside it. What is frozen is in the model folder still. Everything else of a run follows
from its configuration and step: the data order, every random number and the learning rate are functions of them, so
there is no other state.

It is written aside and renamed when complete, so a folder `step-*` is whole. No pickle that could run
code is loaded: tensors are read with `weights_only`, and the layout, which DCP keeps as a pickle, through
an unpickler that knows the dozen classes a layout of tensors is made of. (Not that of entries that are bytes,
which DCP would unpickle.)
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Qwen2_5_VLForConditionalGeneration

from medground.adamw import state_of
from medground.config import LoraConfig
from medground.lora import merge_adapters, save_adapters

if TYPE_CHECKING:
    from medground.policy import Policy
    from medground.sharding import Ranks

STATE_FILE = "state.json"
ADAPTERS = "adapter"
"""Folder, within an export, of adapters by themselves."""


def save_checkpoint(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks, keep: int
) -> None:
    """Save the state after `step` steps as `folder`/step-NNNNNN, and drop all but the newest `keep`."""
    final = folder / f"step-{step:06d}"
    aside = folder / f".step-{step:06d}.partial"
    if ranks.is_first:
        for leftover in [final, *folder.glob(".*.partial")]:
            shutil.rmtree(leftover, ignore_errors=True)
    ranks.barrier()
    dcp.save(_state(policy, optimizer), storage_writer=dcp.FileSystemWriter(aside))
    if ranks.is_first:
        (aside / STATE_FILE).write_text(json.dumps({"step": step, "lora": asdict(policy.lora)}) + "\n")
        os.rename(aside, final)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint of `folder` in place, for any number of ranks.

    Returns:
        Steps done when it was saved; 0 where there is no checkpoint yet.

    Raises:
        ValueError: the checkpoint's layout is not one, or its adapters are others than the policy's.
    """
    found = _checkpoints(folder)
    if not found:
        return 0
    state = json.loads((found[-1] / STATE_FILE).read_text())
    theirs = state.get("lora", asdict(LoraConfig()))  # there was a time without adapters
    for name, value in asdict(policy.lora).items():
        if theirs[name] != value:
            raise ValueError(f"{found[-1]}: want a checkpoint of model.lora.{name} {value!r}; got {theirs[name]!r}")
    reader = _LayoutReader(found[-1])
    reader.read_metadata()  # dcp.load would wrap its ValueError
    dcp.load(_state(policy, optimizer), storage_reader=reader)
    return int(state["step"])


def export_policy(folder: Path, policy: Policy, model_folder: Path, ranks: Ranks, base: str | None = None) -> None:
    """Write the policy as a model folder that plain transformers loads; every rank must call it.

    Adapters are merged into the weights of `model_folder`, and written by themselves into a folder within.

    Args:
        folder: where to; replaced.
        policy: what.
        model_folder: the folder it was loaded from; tokenizer, processor and dtype are as there.
        ranks: the first writes.
        base: what the adapters call the model that they belong to; None for `model_folder`.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(policy.lora.rank))
    whole = cast(dict[str, Tensor], get_model_state_dict(policy, options=options))
    if not ranks.is_first:
        return
    shutil.rmtree(folder, ignore_errors=True)
    state = {name.removeprefix("vlm."): value for name, value in whole.items()}
    if policy.lora.rank:
        save_adapters(folder / ADAPTERS, state, policy.lora, base or str(model_folder))
        dtype = _stored_dtype(model_folder)
        plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, dtype=dtype, use_safetensors=True)
        merge_adapters(plain, folder / ADAPTERS).save_pretrained(folder)
    else:
        _save_whole(folder, policy, state, _stored_dtype(model_folder))
    for file in sorted(model_folder.iterdir()):
        written = file.name in ("config.json", "recipe.json") or file.name.endswith(".index.json")
        if file.suffix in (".json", ".txt", ".jinja") and not written:
            shutil.copyfile(file, folder / file.name)


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


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def _state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    weights, state = policy.state_dict(), {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            state[f"policy.{name}"] = weights[name]
            state |= {f"optimizer.{name}.{key}": value for key, value in state_of(optimizer, parameter).items()}
    return state


class _LayoutReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _LayoutUnpickler(file).load()
            except pickle.UnpicklingError as error:
                raise ValueError(f"{path}: not the layout of a checkpoint: {error}") from None
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _LayoutUnpickler(pickle.Unpickler):
    _KNOWN = frozenset(
        {("torch", name) for name in ("Size", "device", "float32", "bfloat16", "int64", "uint8")}
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "ChunkStorageMetadata", "MetadataIndex", "Metadata", "StorageMeta",
                "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )
        }
        | {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
            ("pathlib._local", "PosixPath"),  # where Python 3.13 has them
            ("pathlib._local", "Path"),
            ("collections", "OrderedDict"),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
