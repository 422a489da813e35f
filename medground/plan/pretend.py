"""GPUs that are not there: for as long as it is entered, "meta" tensors pass for those of one rank of many.

The code that trains runs as it is. What it meets instead of a device is all here:

    process group   torch's fake one, which does nothing, for any number of ranks
    FSDP2           takes "meta" for a device and its streams from torch.cpu
    branches        a tensor on "meta" is asked for a yes or no by checks alone: is a number not finite, a token beyond
                    the vocabulary; the answer is no
    SDPA            takes the kernel that it takes on a CPU
    CUDA            `is_cuda` is true, Triton kernels are not launched, FlashAttention only allocates
    CPU             what asks for numbers that are not there is left out

Of the CUDA side that is what decides memory. How long anything takes is not to be learnt here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.fx.experimental._config as shape_config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param as fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from medground.plan.gpus import NODE
from medground.plan.tracker import Tracker
from medground.sharding import Ranks
from medground_kernels import prefix_decode, varlen_attention
from medground_kernels.backend import triton


class PretendedRanks(Ranks):
    """A rank among others that have the same work."""

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        return [value] * self.size

    def exchange(self, outgoing: Sequence[tuple[int, Any]], incoming: Sequence[int]) -> list[Any]:
        """Nothing to exchange among ranks that are alike."""
        assert not outgoing and not incoming, "alike ranks have nothing to even out"
        return []


@contextmanager
def pretend(ranks: int, *, cuda: bool, tracker: Tracker) -> Iterator[PretendedRanks]:
    """One rank of so many, on GPUs or on CPUs.

    Raises:
        ValueError: there is no Triton, without which a GPU's way cannot be run.
    """
    if cuda and triton is None:
        raise ValueError("--gpu: want Triton, whose kernels a GPU runs (it has wheels for Linux alone); or --gpu cpu")
    assert not dist.is_initialized(), "a process group is already there"
    with ExitStack() as stack:
        # as torchrun says on nodes of 8
        stack.enter_context(patch.dict(os.environ, LOCAL_WORLD_SIZE=str(min(ranks, NODE))))
        for change in (*_device(), *_answers(), *(_cuda() if cuda else _cpu()), *_labels(tracker)):
            stack.enter_context(change)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("meta", (ranks,))
        stack.enter_context(tracker)
        yield PretendedRanks(0, ranks, torch.device("meta"), mesh)


def _device() -> Iterator[Any]:
    """FSDP2 finds the module of a device's streams by its name in torch."""
    handle = SimpleNamespace(
        Stream=torch.cpu.Stream,
        Event=torch.cpu.Event,
        stream=torch.cpu.stream,
        current_stream=torch.cpu.current_stream,
        current_device=lambda: 0,
        device_count=lambda: 1,
    )
    yield patch.object(torch, "meta", handle, create=True)
    yield patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
    # of a thousand chunks of each weight the first, which is this rank's; all others would take a minute to make
    yield patch.object(
        fsdp_param, "_chunk_with_empty", lambda weight, n, dim: [weight.narrow(dim, 0, -(-weight.shape[dim] // n))]
    )
    adam = importlib.import_module("torch.optim.adam")  # torch.optim hides it
    yield patch.object(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    # both work in place: AdamW, of which DTensor takes seconds to find that out, and torchao's, weight by weight
    yield patch.object(torch, "_fused_adamw_", _nothing)
    yield patch.object(torch, "compile", lambda *args, **kwargs: _nothing)
    yield patch.object(nn.Module, "compile", lambda *args, **kwargs: None)
    yield patch.object(nn.functional, "scaled_dot_product_attention", _attention)


def _answers() -> Iterator[Any]:
    asked = Tensor.__bool__
    yield patch.object(Tensor, "__bool__", lambda tensor: False if tensor.is_meta else asked(tensor))
    # a selection by a mask takes all: the most that it could be
    yield cast(Any, shape_config).patch(meta_nonzero_assume_all_nonzero=True)


def _cuda() -> Iterator[Any]:
    yield patch.object(Tensor, "is_cuda", property(lambda tensor: tensor.is_meta))
    yield patch.object(triton.runtime.jit.KernelInterface, "__getitem__", lambda kernel, grid: _nothing)
    yield patch.object(varlen_attention, "_backend", lambda device: ("FlashAttention", _flash_attention))


def _cpu() -> Iterator[Any]:
    yield patch.object(varlen_attention, "_backend", lambda device: ("torch SDPA", None))
    # asks for the lengths in its tensors
    yield patch.object(prefix_decode, "_decode_torch", lambda q, *args: torch.empty_like(q))
    # which sampling asks on a CPU, to see that not every token is banned
    yield patch.object(Tensor, "unique", lambda tensor: tensor)


def _labels(tracker: Tracker) -> Iterator[Any]:
    """What FSDP2 allocates for: whole weights of a unit, gradients."""
    for name in ("unshard", "wait_for_unshard"):
        method = tracker.labelled("gathered", getattr(FSDPParamGroup, name))
        yield patch.object(FSDPParamGroup, name, method)
    reduce = tracker.labelled("whole_gradients", FSDPParamGroup.post_backward)

    def post_backward(group: FSDPParamGroup, *args: Any) -> None:
        reduce(group, *args)
        for weight in group.fsdp_params:
            whole = getattr(weight, "_unsharded_param", None)
            for grad in (weight.unsharded_accumulated_grad, None if whole is None else whole.grad):
                if grad is not None:
                    tracker.relabel(grad, "whole_gradients")
            if weight.sharded_param.grad is not None:
                tracker.relabel(weight.sharded_param.grad, "gradients")

    yield patch.object(FSDPParamGroup, "post_backward", post_backward)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A launch."""


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, *segments: Any, causal: bool, scale: float) -> Tensor:
    return _FlashAttention.apply(q, k, v, len(segments[0]) - 1)


class _FlashAttention(torch.autograd.Function):
    """What flash-attn 2 allocates (csrc/flash_attn/flash_api.cpp, mha_varlen_fwd and mha_varlen_bwd)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: int) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, _ = ctx.saved_tensors
        rows = len(q) + 128 * ctx.segments
        sums = [q.new_empty((rows, *q.shape[1:]), dtype=torch.float32)]
        sums.append(q.new_empty((q.shape[1], rows), dtype=torch.float32))
        if q.shape[1] != k.shape[1]:  # keys' gradients of each query head, added up later
            sums += [k.new_empty((len(k), *q.shape[1:])) for _ in range(2)]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """SDPA as on a CPU, without its scores in memory, which on "meta" it would have."""
    if attn_mask is not None:
        attn_mask = torch.where(attn_mask, q.new_zeros(()), q.new_full((), -torch.inf))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
