"""Save and resume a run's state; export the policy as an ordinary model folder.

A checkpoint is torch.distributed.checkpoint's sharded form of float32 weights and AdamW moments, with a
small JSON file beside it. Everything else of a run follows from its configuration and step: the data
order, every random number and the learning rate are functions of them, so there is no other state.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Qwen2_5_VLForConditionalGeneration

if TYPE_CHECKING:
    from medground.policy import Policy
    from medground.sharding import Ranks

STATE_FILE = "state.json"


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
        (aside / STATE_FILE).write_text(json.dumps({"step": step}) + "\n")
        os.rename(aside, final)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint of `folder` in place, for any number of ranks.

    Returns:
        Steps done when it was saved; 0 where there is no checkpoint yet.

    Raises:
        ValueError: the checkpoint's layout is not one.
    """
    found = _checkpoints(folder)
    if not found:
        return 0
    reader = _LayoutReader(found[-1])
    reader.read_metadata()  # dcp.load would wrap its ValueError
    dcp.load(_state(policy, optimizer), storage_reader=reader)
    return int(json.loads((found[-1] / STATE_FILE).read_text())["step"])


def export_policy(folder: Path, policy: Policy, model_folder: Path, ranks: Ranks) -> None:
    """Write the policy as a model folder that plain transformers loads; every rank must call it.

    Args:
        folder: where to; replaced.
        policy: what.
        model_folder: the folder it was loaded from; tokenizer, processor and dtype are as there.
        ranks: the first writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = cast(dict[str, Tensor], get_model_state_dict(policy, options=options))
    if not ranks.is_first:
        return
    config = policy.plain_config()
    dtype = _stored_dtype(model_folder)
    state = {name.removeprefix("vlm."): value.to(dtype) for name, value in whole.items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    # the sharded class would name the keys and the dtype otherwise than the hub does
    with torch.device("meta"):
        plain = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    shutil.rmtree(folder, ignore_errors=True)
    plain.save_pretrained(folder, state_dict=state)
    for file in sorted(model_folder.iterdir()):
        written = file.name in ("config.json", "recipe.json") or file.name.endswith(".index.json")
        if file.suffix in (".json", ".txt", ".jinja") and not written:
            shutil.copyfile(file, folder / file.name)


def _stored_dtype(model_folder: Path) -> torch.dtype:
    config = json.loads((model_folder / "config.json").read_text())
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def _state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            if not moments:  # before the first step
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                step = torch.zeros((), device=parameter.device)
                moments.update(step=step, exp_avg=zeros, exp_avg_sq=zeros.clone())
            state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
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
        {("torch", name) for name in ("Size", "device", "float32", "bfloat16", "int64")}
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
