"""Ranks, device mesh and FSDP2.

One unit per decoder layer and vision block; embedding, final norm and head in the root unit. Weights that are
trained, gradients and their reduction are float32; what is frozen may lie in the compute dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

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
    """This process among those of the run; `progress` says what it does, for the others to see."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    progress: Progress = field(default_factory=Progress)
    store: Place | None = None
    """Where ranks meet; None for one that is alone."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes files and shows progress."""
        return self.rank == 0

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
    half = precision == "bfloat16" or (precision == "auto" and ranks.device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def shard(policy: Policy, ranks: Ranks, precision: str) -> Policy:
    """Move a policy to its device and shard it over the ranks, in place.

    Args:
        policy: the same on every rank; what is trained in float32.
        ranks: where it goes.
        precision: auto, float32 or bfloat16, of the computation.
    """
    dtype = compute_dtype(ranks, precision)
    # inputs stay as the model makes them: it computes rotary phases in float32
    mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    policy.to(ranks.device)
    for block in [*policy.vlm.model.visual.blocks, *policy.vlm.model.language_model.layers]:
        fully_shard(block, mesh=ranks.mesh, mp_policy=mixed)
    fully_shard(policy, mesh=ranks.mesh, mp_policy=mixed)
    register_fsdp_forward_method(policy, "loss")
    return policy


class WholeCopy:
    """A sharded policy's weights, whole on every rank, in the compute dtype, at fixed addresses, adapters merged.

    So decoding needs no other rank, and CUDA graphs stay valid from step to step.
    """

    def __init__(self, sharded: Policy, ranks: Ranks, precision: str):
        self._sharded = sharded
        self._changing = [pair for pair in sharded.named_modules() if isinstance(pair[1], FSDPModule)]
        self.policy = sharded.empty_copy(compute_dtype(ranks, precision))

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
                targets[name].copy_(weight)
            if any(weight.requires_grad for weight in weights.values()):
                self._changing.append((prefix, unit))
            unit.reshard()
        return self.policy
