"""Save and resume a run's state, while training goes on.

A checkpoint is torch.distributed.checkpoint's sharded form of the weights that are trained and their AdamW moments,
float32, with a small JSON file beside it. What is frozen is in the model folder still. Everything else of a run follows
from its configuration and step: the data order, every random number and the learning rate are functions of them, so no
random generator, position or scheduler has a state of its own.

Saving copies the state to the host's memory and goes on; a thread writes it, and talks to the other ranks' threads
through a process group of its own. Until all ranks' files are on the disk the folder has another name
(`checkpoint_folder`), and loading hashes every file first.

No pickle that could run code is loaded: tensors are read with `weights_only`, and the layout, which DCP keeps as a
pickle, through an unpickler that knows the dozen classes a layout of tensors is made of. (Not that of entries that are
bytes, which DCP would unpickle.)
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from medground.adamw import state_of
from medground.checkpoint_folder import aside_of, checkpoints, complaints, describe, publish, set_aside, tidy
from medground.config import LoraConfig

if TYPE_CHECKING:
    from medground.policy import Policy
    from medground.sharding import Ranks

T = TypeVar("T")

STATE_FILE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """A run's checkpoints; every rank must make one, and call its methods alike."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        """Take checkpoints in `folder`, which all ranks must see, and keep the newest `keep`."""
        self.folder, self.keep, self._ranks = folder, keep, ranks
        self._group = dist.new_group(backend="gloo")
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._mesh: DeviceMesh | None = None

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
        """Copy the state after `step` steps, and begin to write it; the one before is written by then.

        Args:
            step: steps done.
            policy: whose weights are saved.
            optimizer: its moments.
            facts: what else `load` is to give back; JSON values, of the first rank.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        staged = {name: self._copy(name, value) for name, value in _state(policy, optimizer).items()}
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        state = {"step": step, "lora": asdict(policy.lora), "facts": dict(facts)}
        self._writing = self._writer.submit(self._write, step, staged, json.dumps(state) + "\n")

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once; ranks learn of it at different times."""
        return bool(self._writing and self._writing.done() and self._writing.exception())

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """End the thread, once it has written what it had to."""
        self._writer.shutdown()

    def load(self, policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint that is whole, in place, whatever the number of ranks that saved it.

        Newer ones that are not are named on standard error and renamed to `*.broken`.

        Returns:
            Steps done when it was saved, and the facts saved with it; 0 and none where there is no checkpoint yet.

        Raises:
            ValueError: there are checkpoints and none is whole, its layout is not one, its tensors are others than the
                policy's, or so are its adapters.
        """
        found, broken = self._newest()
        if not found:
            if broken:
                raise ValueError(f"{self.folder}: want a checkpoint that is whole; got none: {'; '.join(broken)}")
            return 0, {}
        if broken and self._ranks.is_first:
            told = "; ".join(broken)
            print(f"medground: warning: damaged checkpoints: {told}; going on from {found.name}", file=sys.stderr)
            for path in checkpoints(self.folder):
                if path.name > found.name:
                    set_aside(path)
        state = json.loads((found / STATE_FILE).read_text())
        for name, value in asdict(policy.lora).items():
            theirs = state.get("lora", asdict(LoraConfig()))[name]
            if theirs != value:
                raise ValueError(f"{found}: want a checkpoint of model.lora.{name} {value!r}; got {theirs!r}")
        reader = _LayoutReader(found)
        reader.read_metadata()  # dcp.load would wrap its ValueError
        try:
            dcp.load(_state(policy, optimizer), storage_reader=reader)
        except CheckpointException as error:  # no Exception, but a BaseException
            raise ValueError(f"{found}: not a checkpoint of this model: {_reason(error)}") from error
        return int(state["step"]), state["facts"]

    def _newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with newer ones; the same on every rank."""
        ranks = self._ranks
        broken: list[str] = []
        for name in reversed(ranks.gather([path.name for path in checkpoints(self.folder)])[0]):
            path = self.folder / name
            said = ranks.gather(complaints(path, ranks.rank, ranks.size))
            wrong = list(dict.fromkeys(problem for share in said for problem in share))
            if not wrong:
                return path, broken
            broken += wrong
        return None, broken

    def _copy(self, name: str, value: Tensor) -> Tensor:
        """A tensor in the host's memory, which the next save overwrites."""
        local = value.to_local() if isinstance(value, DTensor) else value
        if name not in self._buffers:
            pinned = local.device.type == "cuda"
            self._buffers[name] = torch.empty_like(local, device="cpu", pin_memory=pinned)
        copied = self._buffers[name].copy_(local, non_blocking=True)
        if not isinstance(value, DTensor):
            return copied
        if self._mesh is None:
            mesh = value.device_mesh
            on_cpu = mesh.device_type == "cpu"
            self._mesh = mesh if on_cpu else DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return DTensor.from_local(
            copied, self._mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )

    def _write(self, step: int, staged: dict[str, Tensor], state: str) -> None:
        """What the thread does; each part is done on all ranks before the next begins."""
        aside, first = aside_of(self.folder, step), self._ranks.is_first
        try:
            self._everywhere(lambda: tidy(self.folder, self.keep) if first else None)
            dcp.save(staged, storage_writer=dcp.FileSystemWriter(aside), process_group=self._group)
            shares = self._everywhere(lambda: self._describe(aside, state))
            files = {name: facts for share in shares for name, facts in share.items()}
            self._everywhere(lambda: publish(self.folder, step, files) if first else None)
            if first:
                tidy(self.folder, self.keep)
        except (CheckpointException, CheckpointError, OSError) as error:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            last = checkpoints(self.folder)
            kept = f"the last one is {last[-1].name}" if last else "there is none yet"
            free = shutil.disk_usage(self.folder).free / 1e9
            said = f"could not be written: {_reason(error)} ({free:.3g} GB are free there); {kept}"
            raise CheckpointError(f"{self.folder / aside.name}: {said}") from error

    def _describe(self, aside: Path, state: str) -> dict[str, dict[str, int | str]]:
        """This rank's files, and the first one's small ones."""
        mine = sorted(aside.glob(f"__{self._ranks.rank}_*"))
        if self._ranks.is_first:
            path = aside / STATE_FILE
            with path.open("w") as file:
                file.write(state)
                file.flush()
                os.fsync(file.fileno())
            mine += [aside / ".metadata", path]
        return describe(mine)

    def _everywhere(self, action: Callable[[], T]) -> list[T]:
        """Results of `action` on all ranks; where it fails on one, it does on all."""
        value, problem = None, None
        try:
            value = action()
        except OSError as error:
            problem = _reason(error)
        said: list[Any] = [None] * self._ranks.size
        dist.all_gather_object(said, (value, problem), group=self._group)
        for _, text in said:
            if text is not None:
                raise CheckpointError(text)
        return [result for result, _ in said]


def _reason(error: BaseException) -> str:
    """What the first rank that failed said."""
    if isinstance(error, CheckpointException):
        return next((_reason(failure[0]) for failure in error.failures.values()), str(error))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


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
