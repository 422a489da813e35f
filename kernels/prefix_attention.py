"""Attention of packed groups: each prompt stands once and all its completions see it.

    [prompt | c1 | ... | cG] [prompt | c1 | ... | cG] ...

A prompt's token sees the prompt up to itself; a completion's token sees its prompt and its own completion up to itself.
That gives the same rows, and the same gradients, as G sequences [prompt | c] with the prompt G times.

It is one call of `varlen_attention`. The segments of the stream are the queries; a completion's keys are those of its
prompt and its own. On CUDA keys are laid out like that first, and in the gradient a kernel adds up the G + 1 copies of
each prompt's row, in float32 and in their order, without atomics. On a CPU they are read straight from the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medground_kernels.backend import cdiv, jit, runs_triton, tl
from medground_kernels.varlen_attention import Rows, VarlenPlan, varlen_attention, varlen_plan

ROWS, COLS, NUM_WARPS = 8, 256, 4  # not measured yet


def prefix_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[tuple[int, Sequence[int]]], scale: float
) -> Tensor:
    """The definition, token by token, in the dtype of the inputs; float64 inputs give the truth."""
    shared = q.shape[1] // k.shape[1]
    out: list[Tensor] = []
    start = 0
    for P, lengths in groups:
        prompt = list(range(start, start + P))
        seen = [prompt[: j + 1] for j in range(P)]
        start += P
        for C in lengths:
            seen += [prompt + list(range(start, start + j + 1)) for j in range(C)]
            start += C
        for keys in seen:
            query = q[len(out)].view(-1, shared, q.shape[2])  # [Hkv, Hq / Hkv, D]
            scores = torch.einsum("hgd,khd->hgk", query, k[keys]) * scale
            out.append(torch.einsum("hgk,khd->hgd", scores.softmax(-1), v[keys]).flatten(0, 1))
    return torch.stack(out)


@jit(do_not_specialize=["T"])
def _fold_kernel(
    grad_ptr, readers_ptr, starts_ptr, total_ptr, T, width, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    # int64, as are readers, so that their products with the width may pass 2**31
    start = tl.load(starts_ptr + row, mask=row < T, other=0)
    end = tl.load(starts_ptr + row + 1, mask=row < T, other=0)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for step in range(0, tl.max(end - start, 0)):
        at = start + step
        reader = tl.load(readers_ptr + at, mask=at < end)
        grad = tl.load(grad_ptr + reader[:, None] * width + col, mask=(at < end)[:, None] & (col < width), other=0.0)
        total += grad.to(tl.float32)
    place = total_ptr + row[:, None].to(tl.int64) * width + col
    tl.store(place, total, mask=(row < T)[:, None] & (col < width))


def _fold(grad: Tensor, rows: Rows) -> Tensor:
    """Add up the gradients [K, ...] of each row's copies: [T, ...]."""
    T, width = len(rows.starts) - 1, grad[0].numel()
    total = torch.empty((T, *grad.shape[1:]), dtype=grad.dtype, device=grad.device)
    _fold_kernel[(cdiv(T, ROWS), cdiv(width, COLS))](
        grad.contiguous(), rows.readers, rows.starts, total, T, width, ROWS=ROWS, COLS=COLS, num_warps=NUM_WARPS
    )
    return total


class _Spread(torch.autograd.Function):
    """Lay rows [T, ...] out as the segments read them, [K, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _fold(grad, ctx.rows), None


@dataclass(frozen=True, eq=False)
class PrefixLayout:
    """How groups lie in a stream of T tokens, for all layers of a batch; made by `prefix_layout`.

    Attributes:
        T: tokens of the stream.
        K: keys of all segments, where a prompt's count G + 1 times.
        plan: the segments, in the order of the stream: prompt, c1, ..., cG of each group.
    """

    T: int
    K: int
    plan: VarlenPlan

    @cached_property
    def spread_plan(self) -> VarlenPlan:
        """The same segments over keys that are laid out already."""
        return replace(self.plan, rows_k=self.K, keys=None)


def prefix_layout(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device | str) -> PrefixLayout:
    """Lay groups out in a stream, each a prompt and then its completions.

    Args:
        groups: of each the length of its prompt, at least 1, and those of its completions, at least 1; a group may
            have none.
        device: where q, k and v will lie.

    Raises:
        ValueError: there is no group, or a length is below 1; it names the group, counted from 0.
    """
    if not groups:
        raise ValueError("want at least one group; got none")
    lengths_q, lengths_k, keys = [], [], []
    start = 0
    for number, (P, lengths) in enumerate(groups):
        if P < 1 or any(C < 1 for C in lengths):
            raise ValueError(f"want P >= 1 and every C >= 1; got P = {P}, C = {list(lengths)} in group {number}")
        lengths_q += [P, *lengths]
        lengths_k += [P, *(P + C for C in lengths)]
        prompt = torch.arange(start, start + P, device="cpu")
        keys.append(prompt)
        start += P
        for C in lengths:
            keys += [prompt, torch.arange(start, start + C, device="cpu")]
            start += C
    repeated = any(lengths for _, lengths in groups)
    plan = varlen_plan(lengths_q, lengths_k, device, causal=True, keys=torch.cat(keys) if repeated else None)
    return PrefixLayout(start, sum(lengths_k), plan)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float | None = None) -> Tensor:
    """Attention of packed groups.

    Args:
        q: [T, Hq, D], float32, bfloat16 or float16, unit stride in D.
        k: [T, Hkv, D] alike, Hq a multiple of Hkv.
        v: [T, Hkv, D] alike.
        layout: of the T tokens.
        scale: of the scores; D ** -0.5 if None.

    Returns:
        [T, Hq, D] of the same dtype; differentiable in q, k and v.

    Raises:
        ValueError: an input is not as above, or as `varlen_attention` wants it.
    """
    if not len(q) == len(k) == len(v) == layout.T:
        raise ValueError(f"want q, k and v of the layout's {layout.T} tokens; got {len(q)}, {len(k)}, {len(v)}")
    rows = layout.plan.key_rows if runs_triton(q) else None
    if rows is None:
        return varlen_attention(q, k, v, layout.plan, scale=scale)
    k, v = _Spread.apply(k, rows), _Spread.apply(v, rows)
    return varlen_attention(q, k, v, layout.spread_plan, scale=scale)
