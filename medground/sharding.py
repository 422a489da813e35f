"""Ranks, device mesh and FSDP2.

One unit per decoder layer and vision block; embedding, final norm and head in the root unit. Weights that are
trained, gradients and their reduction are float32; what is frozen may lie in the compute dtype.

Several replicas (HSDP): the mesh is [replicas, shards], a replica on ranks that follow one another, as those of a node
do. Weights are gathered within a replica; of gradients, shards are summed up within one and then across.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from medground.job.store import Place, meet
from medground.job.watch import Progress
from medground.lora import merged

if TYPE_CHECKING:
    from medground.policy import Policy

T = TypeVar("T")


class SharedError(ValueError):
    """A user's mistake that every rank knows of, so that one need tell."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: from 0.
        size: of the run, in processes.
        device: this process computes on it.
        mesh: [shards], or [replicas, shards] if there are several replicas.
        progress: what it does, for the others to see.
        store: where ranks meet; None for one that is alone.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    progress: Progress = field(default_factory=Progress)
    store: Place | None = None

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes files and shows progress."""
        return self.rank == 0

    def replicas(self, asked: int) -> int:
        """How many copies of the sharded state `sharding.replicas` comes to: 0 is one for each node of torchrun's.

        Raises:
            ValueError: the ranks cannot be shared out evenly.
        """
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if not asked and self.size % local:
            raise ValueError(
                f"sharding.replicas: want nodes of equally many ranks for 0; got {self.size} ranks, {local} on a node"
            )
        found = asked or self.size // local
        if self.size % found:
            raise ValueError(f"sharding.replicas: want a divisor of the {self.size} ranks; got {found}")
        return found

    def arranged(self, replicas: int) -> Ranks:
        """The same ranks with a mesh of as many replicas as `sharding.replicas` asks for; every rank must call it."""
        found = self.replicas(replicas)
        if found == 1:
            return self
        shape, names = (found, self.size // found), ("replicate", "shard")
        return replace(self, mesh=init_device_mesh(self.device.type, shape, mesh_dim_names=names))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on some rank; the same on every rank."""
        said = torch.tensor(float(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where it is a user's mistake on one, it is on all.

        Raises:
            SharedError: what the first rank that failed said.
        """
        value, problem = None, None
        try:
            value = action()
        except ValueError as error:
            problem = str(error)
        problems = [text for text in self.gather(problem) if text is not None]
        if problems:
            raise SharedError(problems[0])
        return cast(T, value)

    def exchange(self, outgoing: Sequence[tuple[int, Any]], incoming: Sequence[int]) -> list[Any]:
        """Send values to other ranks and take theirs; all ranks must call it, in agreement.

        Args:
            outgoing: (receiving rank, value).
            incoming: the rank of each value to take; those of one rank come in the order in which it sends them.
        """
        values: list[Any] = [None] * len(incoming)
        for sender in range(self.size):
            for receiver in range(self.size):
                if self.rank == sender:
                    for to, value in outgoing:
                        if to == receiver:
                            dist.send_object_list([value], dst=receiver, device=torch.device("cpu"))
                elif self.rank == receiver:
                    for at, source in enumerate(incoming):
                        if source == sender:
                            box: list[Any] = [None]
                            dist.recv_object_list(box, src=sender, device=torch.device("cpu"))
                            values[at] = box[0]
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


@contextmanager
def join_ranks(timeout: float = 1800.0) -> Iterator[Ranks]:
    """Join the ranks that torchrun started; alone where there is no torchrun.

    Args:
        timeout: seconds that one may wait for the others.
    """
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank, size, place = 0, 1, None
    store: dist.Store = dist.HashStore()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, place = meet(rank, size, timeout)
    wait = timedelta(seconds=timeout)
    dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=size)
    try:
        mesh = init_device_mesh(device.type, (size,))
        yield Ranks(rank, size, device, mesh, store=place)
    finally:
        dist.destroy_process_group()


def compute_dtype(ranks: Ranks, precision: str) -> torch.dtype:
    """What auto, float32 or bfloat16 comes to: auto is bfloat16 on a GPU and float32 on a CPU."""
    return dtype_on(ranks.device, precision)


def dtype_on(device: torch.device, precision: str) -> torch.dtype:
    """The same, of a device."""
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def shard(policy: Policy, ranks: Ranks, precision: str, *, cpu_offload: bool = False) -> Policy:
    """Move a policy to its device and shard it over the ranks, in place.

    Args:
        policy: the same on every rank; what is trained in float32. On "meta" it stays there.
        ranks: where it goes.
        precision: auto, float32 or bfloat16, of the computation.
        cpu_offload: its shards stay in CPU memory.
    """
    dtype = compute_dtype(ranks, precision)
    # inputs stay as the model makes them: it computes rotary phases in float32
    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if cpu_offload else OffloadPolicy()
    if {parameter.device for parameter in policy.parameters()} - {ranks.device, torch.device("meta")}:
        policy.to(ranks.device)
    for block in [*policy.vlm.model.visual.blocks, *policy.vlm.model.language_model.layers]:
        fully_shard(block, mesh=ranks.mesh, mp_policy=mixed, offload_policy=offload)
    fully_shard(policy, mesh=ranks.mesh, mp_policy=mixed, offload_policy=offload)
    register_fsdp_forward_method(policy, "loss")
    return policy


def own_rows(parameter: Tensor) -> tuple[Tensor, int, int]:
    """What this rank holds of a parameter: rows start to stop of the first dimension, in place.

    The first ranks have equally many rows, what is left over is the last ones', which may have none.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, len(parameter)
    rows, start, stop = len(parameter), 0, len(parameter)
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, placement
            each = -(-rows // parameter.device_mesh.size(dim))
            start = min(parameter.device_mesh.get_local_rank(dim) * each, rows)
            stop = min(start + each, rows)
    local = cast(DTensor, parameter.detach()).to_local()
    assert len(local) == stop - start, (len(local), start, stop)
    return local, start, stop


def reduce_gradients(policy: Policy, *, last: bool, each: bool) -> None:
    """Say whether the next backward pass sums gradients over the ranks.

    Args:
        policy: sharded.
        last: it is the update's last one, after which sums have to be complete.
        each: shards are summed after every one; across replicas in the last one all the same.
    """
    sharded = cast(FSDPModule, policy)
    sharded.set_requires_gradient_sync(last or each)
    sharded.set_requires_all_reduce(last)


class WholeCopy:
    """A sharded policy's weights, whole on every rank, in the compute dtype, at fixed addresses, adapters merged.

    So decoding needs no other rank, and CUDA graphs stay valid from step to step. Where a rank has the whole of a
    frozen weight already, in that dtype and without an adapter, it is the very same memory.
    """

    def __init__(self, sharded: Policy, ranks: Ranks, precision: str):
        self._sharded = sharded
        self._changing = [pair for pair in sharded.named_modules() if isinstance(pair[1], FSDPModule)]
        dtype = compute_dtype(ranks, precision)
        self._shared = _whole_already(sharded, dtype, ranks.device)
        self.policy = sharded.empty_copy(dtype, ranks.device, self._shared)

    @torch.no_grad()
    def refresh(self) -> Policy:
        """Copy the weights as they are now, a unit at a time; every rank must call it.

        Units without a weight that is trained are copied once.
        """
        targets = dict(self.policy.named_parameters())
        units, self._changing = self._changing, []
        for prefix, unit in units:
            unit.unshard()
            named = cast(nn.Module, unit).named_parameters(prefix)
            weights = {name: weight for name, weight in named if not isinstance(weight, DTensor)}  # of an inner unit
            for name, weight in merged(weights, self._sharded.lora):
                if name not in self._shared:
                    targets[name].copy_(weight)
            if any(weight.requires_grad for weight in weights.values()):
                self._changing.append((prefix, unit))
            unit.reshard()
        return self.policy


def _whole_already(sharded: Policy, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Frozen weights that this rank holds whole, as a copy in `dtype` would have them, by name."""
    found = {}
    for name, parameter in sharded.named_parameters():
        local, start, stop = own_rows(parameter)
        whole = start == 0 and stop == len(parameter)
        adapted = name.endswith(".base_layer.weight") or ".lora_" in name
        if whole and not parameter.requires_grad and not adapted and (local.dtype, local.device) == (dtype, device):
            found[name.replace(".base_layer.", ".")] = local
    return found
