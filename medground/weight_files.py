"""The weights of a model folder: which tensor is in which file, and any rows of it.

Only safetensors, and only what is asked for is read: a rank of many takes its own rows of each tensor, no rank the
whole model. Names are those of transformers 5, whichever a file has:

    visual.*                 -> model.visual.*            as the hub has Qwen2.5-VL
    model.layers.*, ...      -> model.language_model.layers.*, ...
    model.visual.*, model.language_model.*, lm_head.weight    as they are

Tied to the embedding, the head may be in the files or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_STRETCHES, _STRETCH = 64, 1 << 16
_DTYPES = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """Where a tensor is: the file, its name there, its shape and safetensors' name of its dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def stored_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder, by name; only headers are read.

    Raises:
        ValueError: a file is missing, not readable or outside the folder; the index and the files disagree; or two
            tensors have one name.
    """
    found: dict[str, Stored] = {}
    for path, wanted in _files(folder).items():
        held = _header(path)
        if wanted is not None and (missing := sorted(wanted - held.keys())):
            raise ValueError(f"{path}: want tensor {missing[0]!r}, which the index says is there; it is not")
        for stored in held.values():
            name = _modern(stored.name)
            if name in found:
                file, other, *_ = found[name]
                raise ValueError(f"{path}: want each tensor once; got {stored.name!r} and {other!r} of {file}")
            found[name] = stored
    return found


def check_weights(model: nn.Module, folder: Path) -> dict[str, Stored]:
    """See that a folder has the weights of a model, all of them, in their shapes, and no others.

    Args:
        model: of transformers; adapters, which no folder has, are passed over.
        folder: of the model.

    Returns:
        Where they are.

    Raises:
        ValueError: it does not; says the file and the tensor.
    """
    stored = stored_weights(folder)
    wanted = {_plain(name): parameter for name, parameter in _in_files(model)}
    for name, parameter in wanted.items():
        if name not in stored:
            raise ValueError(f"{folder}: want tensor {name!r} in its .safetensors; it is missing")
        file, own, shape, dtype = stored[name]
        if shape != tuple(parameter.shape):
            raise ValueError(f"{file}: want tensor {own!r} of shape {list(parameter.shape)}; got {list(shape)}")
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: want tensor {own!r} in one of {', '.join(_DTYPES)}; got {dtype}")
    for name, (file, own, shape, _) in stored.items():
        if name in wanted:
            continue
        if name != _HEAD or shape != stored[_EMBEDDING].shape:
            raise ValueError(f"{file}: want tensors of the model in config.json; got {own!r}, which it has not")
    return stored


def weights_hash(folder: Path) -> str:
    """SHA-256, in hexadecimal, of a folder's config.json and of 64 stretches of each file of weights, 64 KiB each.

    Small files are hashed whole. Of large ones it does not see every change, but every step of training, which
    changes nearly all numbers; and 16 GB need not be read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(_files(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _STRETCHES * _STRETCH:
                digest.update(file.read())
                continue
            for i in range(_STRETCHES):
                file.seek(i * (size - _STRETCH) // (_STRETCHES - 1))
                digest.update(file.read(_STRETCH))
    return digest.hexdigest()


@torch.no_grad()
def read_weights(
    model: nn.Module, stored: dict[str, Stored], rows: Callable[[Tensor], tuple[Tensor, int, int]]
) -> None:
    """Fill a model's weights, adapters aside, each in the dtype that it has.

    Args:
        model: of transformers.
        stored: its weights, as `check_weights` found them.
        rows: of a parameter: what to fill, and which rows of the whole it is.

    Raises:
        ValueError: the head is tied to the embedding, but the files have another one.
    """
    named = {_plain(name): parameter for name, parameter in _in_files(model)}
    for name, place in stored.items():
        if name in named:
            target, start, stop = rows(named[name])
            target.copy_(_rows(place, start, stop))
    if _HEAD in stored and _HEAD not in named:
        target, start, stop = rows(named[_EMBEDDING])
        file, own, *_ = stored[_HEAD]
        if not torch.equal(_rows(stored[_HEAD], start, stop).to(target), target):
            raise ValueError(f"{file}: want {own!r} to be the embedding, to which config.json ties it; it is another")


def _rows(place: Stored, start: int, stop: int) -> Tensor:
    # opened for each tensor anew: what was read of a file counts as this process's memory until it is closed
    with safe_open(place.file, "pt") as opened:
        return opened.get_slice(place.name)[start:stop]


def _in_files(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if ".lora_" not in name)


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _modern(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return name.replace("model.", "model.language_model.", 1)
    return name


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Each file, and the tensors that the index says it holds; None where there is no index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise ValueError(f"{folder}: want {single.name} or {index.name}; it has neither")
    try:
        places = json.loads(index.read_text())["weight_map"]
        files: dict[Path, set[str] | None] = {}
        for name, file in places.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index}: want a .safetensors file of the same folder for {name!r}; got {file!r}")
            files.setdefault(folder / file, set()).add(name)  # type: ignore[union-attr]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: want an index of .safetensors files (weight_map); got {error!r}") from None
    return files


def _header(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise ValueError(f"{path}: want a file with weights; it is missing")
    try:
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return {n: Stored(path, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: want a .safetensors file; {error}") from None
