"""Attention of segments of different lengths, which lie one after another in flat tensors.

    out[j] = sum_i softmax_i(scale * q[j] . k[i]) v[i],    i over the keys of j's segment that j sees

Without `causal` a query sees every key of its segment. With it, masks are aligned at the bottom right: the last query
sees every key, query j of a segment its keys up to j + len_k - len_q. Where there are fewer heads of keys than of
queries (GQA), Hq / Hkv query heads in a row share one.

On CUDA in half precision this is FlashAttention (Dao 2023, arXiv:2307.08691): the package flash-attn if it is
installed, else torch's own. Neither waits for the device. Everywhere else it is torch's SDPA over segments padded to a
few sizes. Its rows are read by an index, and the gradient of a row that is read more than once, as the key of several
segments, is added up in float32 and always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medground_kernels.backend import check_devices

_CALL = 6000  # scores, a head, that take a CPU as long as another call: 3000 to 12000 are alike (docs/log.md)


def varlen_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: Sequence[int], lengths_k: Sequence[int], causal: bool, scale: float
) -> Tensor:
    """The definition, in the dtype of the inputs; float64 inputs give the truth."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outs = []
    for queries, keys, values in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if causal:
            seen = torch.ones_like(scores, dtype=torch.bool).tril(len(keys) - len(queries))
            scores = scores.masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outs)


class Rows(NamedTuple):
    """Which rows are read; the reads of row t are `readers[starts[t] : starts[t + 1]]`, save those that pad."""

    source: Tensor  # [reads]
    readers: Tensor  # [reads that do not pad]
    starts: Tensor  # [rows + 1]


def _rows(index: Tensor, rows: int, device: torch.device, real: Tensor | None = None) -> Rows | None:
    """To read rows `index` of a tensor of `rows`, where the mask `real` is false for padding; None for all in order."""
    if len(index) == rows and torch.equal(index, torch.arange(rows, device="cpu")):
        return None
    at = torch.arange(len(index), device="cpu") if real is None else real.nonzero()[:, 0]
    readers = at[index[at].argsort(stable=True)]
    ends = index[at].bincount(minlength=rows).cumsum(0)
    return Rows(*(_moved(x, device) for x in (index, readers, torch.cat([ends.new_zeros(1), ends]))))


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.contiguous().index_select(0, rows.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _, readers, starts = ctx.rows
        flat = grad.flatten(1).contiguous()
        # torch's one op that gathers and adds up at once
        total = F.embedding_bag(readers, flat, starts, mode="sum", include_last_offset=True)
        return total.view(-1, *grad.shape[1:]), None


def _read(x: Tensor, rows: Rows | None) -> Tensor:
    return x if rows is None else _Read.apply(x, rows)


class _Bucket(NamedTuple):
    """Segments that one call computes, padded on the right to Q queries and K keys."""

    segments: int
    is_causal: bool
    mask: Tensor | None  # bool, true where seen, broadcasts to [segments, 1, Q, K]


class _Padded(NamedTuple):
    """The buckets, how many rows each has, and where rows come from and go to."""

    buckets: list[_Bucket]
    sizes_q: list[int]
    sizes_k: list[int]
    q: Rows | None
    k: Rows | None
    out: Rows | None


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """How segments lie, for all layers of a batch; made by `varlen_plan`."""

    cu_q: Tensor  # [n + 1], int32
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    lengths_q: list[int]
    lengths_k: list[int]
    rows_k: int  # of k and v
    keys: Tensor | None  # on the CPU

    @cached_property
    def key_rows(self) -> Rows | None:
        """To read the keys of all segments one after another."""
        return None if self.keys is None else _rows(self.keys, self.rows_k, self.cu_k.device)

    @cached_property
    def padded(self) -> _Padded:
        """What the SDPA form needs, made when it is first used."""
        device = self.cu_q.device
        chosen = _choose_buckets(self.lengths_q, self.lengths_k, self.causal)
        with torch.device("cpu"):
            len_q, len_k = torch.tensor(self.lengths_q), torch.tensor(self.lengths_k)
            buckets = [_bucket(len_q[s], len_k[s], self.causal, device) for s in chosen]
            q, real_q, sizes_q = _padded_index(len_q, chosen)
            k, real_k, sizes_k = _padded_index(len_k, chosen)
        k = k if self.keys is None else self.keys[k]
        out = real_q.nonzero()[q[real_q].argsort(), 0]
        q_rows, k_rows = _rows(q, len(out), device, real_q), _rows(k, self.rows_k, device, real_k)
        return _Padded(buckets, sizes_q, sizes_k, q_rows, k_rows, _rows(out, len(q), device))


def _choose_buckets(lengths_q: list[int], lengths_k: list[int], causal: bool) -> list[list[int]]:
    """Which segments share a bucket: sorted by size, and cut where padding would cost more than another call."""
    sizes = list(zip(lengths_q, lengths_k, strict=True))
    square = [causal and len_q == len_k for len_q, len_k in sizes]  # these need no mask, however they are padded
    chosen: list[list[int]] = []
    Q = K = real = 0
    for s in sorted(range(len(sizes)), key=lambda s: (square[s], *sizes[s]), reverse=True):
        len_q, len_k = sizes[s]
        K, real = max(K, len_k), real + len_q * len_k
        if not chosen or square[s] != square[chosen[-1][0]] or (len(chosen[-1]) + 1) * Q * K - real > _CALL:
            chosen.append([])
            Q, K, real = len_q, len_k, len_q * len_k
        chosen[-1].append(s)
    return chosen


def _padded_index(lengths: Tensor, chosen: list[list[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Rows of the buckets, each segment padded with its own last row; which of them are real; rows in each bucket."""
    starts = lengths.cumsum(0) - lengths
    index, real = [], []
    for segments in chosen:
        at, length = torch.arange(int(lengths[segments].max())), lengths[segments, None]
        index.append((starts[segments, None] + at.minimum(length - 1)).flatten())
        real.append((at < length).flatten())
    return torch.cat(index), torch.cat(real), [len(x) for x in index]


def _bucket(lengths_q: Tensor, lengths_k: Tensor, causal: bool, device: torch.device) -> _Bucket:
    offsets = lengths_k - lengths_q
    if causal and not offsets.any():
        return _Bucket(len(lengths_q), True, None)
    last = lengths_k[:, None] - 1  # that a query sees
    if causal:
        # hides padding from real queries too, so that equal offsets make equal masks
        offsets = offsets[:1] if (offsets == offsets[0]).all() else offsets
        last = offsets[:, None] + torch.arange(int(lengths_q.max()))
    mask = torch.arange(int(lengths_k.max())) <= last[:, None, :, None]
    return _Bucket(len(lengths_q), False, None if mask.all() else _moved(mask, device))


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float) -> Tensor:
    padded = plan.padded
    q, k, v = _read(q, padded.q), _read(k, padded.k), _read(v, padded.k)
    splits = (q.split(padded.sizes_q), k.split(padded.sizes_k), v.split(padded.sizes_k))
    outs = []
    for bucket, *parts in zip(padded.buckets, *splits, strict=True):
        # [segments * Q, Hq, D] -> [segments, Hq, Q, D], and keys alike
        query, key, value = (x.unflatten(0, (bucket.segments, -1)).transpose(1, 2) for x in parts)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bucket.mask, is_causal=bucket.is_causal, scale=scale, enable_gqa=True
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return _read(torch.cat(outs) if len(outs) > 1 else outs[0], padded.out)


@cache
def _backend(device: torch.device) -> tuple[str, Callable | None]:
    """Name and function of what computes half precision on a device; no function for the SDPA form."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "torch SDPA", None
    package = find_spec("flash_attn")
    if package and package.origin:  # flash-attn-4 has a folder of this name, without a file of its own
        import flash_attn

        def from_package(*segments: Any, causal: bool, scale: float) -> Any:
            options = {"deterministic": torch.are_deterministic_algorithms_enabled()}  # which torch's own heeds too
            return flash_attn.flash_attn_varlen_func(*segments, causal=causal, softmax_scale=scale, **options)

        return f"flash-attn {flash_attn.__version__}", from_package
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer heads of keys without being told
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def from_torch(*segments: Any, causal: bool, scale: float) -> Any:
        return varlen_attn(*segments, scale=scale, window_size=(-1, 0 if causal else -1), **options)

    return "torch varlen attention", from_torch


def backend_name(device: torch.device | str) -> str:
    """What computes attention in half precision on a device; float32 is "torch SDPA" everywhere."""
    return _backend(torch.device(device))[0]


def varlen_plan(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    device: torch.device | str,
    causal: bool,
    keys: Tensor | None = None,
) -> VarlenPlan:
    """Plan attention for segments of these lengths.

    Args:
        lengths_q: queries of each segment, at least 1.
        lengths_k: keys of each segment, at least 1, with `causal` at least as many as queries.
        device: where q, k and v will lie.
        causal: whether a query sees the keys up to its own place alone, counted from the end.
        keys: [sum(lengths_k)], int64, on the CPU: which row of k and v each key is, where they do not lie in order
            or belong to several segments. The largest is the last row.

    Raises:
        ValueError: an argument is not as above.
    """
    lengths_q, lengths_k = list(lengths_q), list(lengths_k)
    if not lengths_q or len(lengths_q) != len(lengths_k):
        raise ValueError(f"want a length_q and a length_k for each segment; got {len(lengths_q)}, {len(lengths_k)}")
    for s, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if len_q < 1 or len_k < (len_q if causal else 1):
            wanted = "keys >= queries >= 1" if causal else "queries and keys >= 1"
            raise ValueError(f"want {wanted} in each segment; got {len_q} queries, {len_k} keys in segment {s}")
    K = sum(lengths_k)
    if keys is not None and (keys.shape != (K,) or keys.dtype != torch.int64 or keys.device.type != "cpu"):
        raise ValueError(f"want keys [{K}], int64, on the CPU; got {tuple(keys.shape)}, {keys.dtype}, {keys.device}")
    both = torch.tensor([[0, *lengths_q], [0, *lengths_k]], device="cpu")
    cu_q, cu_k = _moved(both.cumsum(1).int(), torch.device(device))
    rows_k = K if keys is None else int(keys.max()) + 1
    return VarlenPlan(cu_q, cu_k, max(lengths_q), max(lengths_k), causal, lengths_q, lengths_k, rows_k, keys)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, *, scale: float | None = None) -> Tensor:
    """Attention of each segment's queries to its keys.

    Args:
        q: [Tq, Hq, D], float32, bfloat16 or float16, unit stride in D.
        k: [Tk, Hkv, D] alike, Hq a multiple of Hkv.
        v: [Tk, Hkv, D] alike.
        plan: of segments with Tq queries and Tk keys in all.
        scale: of the scores; D ** -0.5 if None.

    Returns:
        [Tq, Hq, D] of the same dtype, contiguous; differentiable in q, k and v.

    Raises:
        ValueError: an input is not as above, or D not a multiple of 8 up to 256 where FlashAttention runs.
    """
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"want q [Tq, Hq, D], k and v [Tk, Hkv, D], Hq a multiple of Hkv; got {shapes}")
    if len(q) != sum(plan.lengths_q) or len(k) != plan.rows_k:
        raise ValueError(f"want the plan's {sum(plan.lengths_q)} queries and {plan.rows_k} keys; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"want float32, bfloat16 or float16 q, k and v alike; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        raise ValueError(f"want q, k and v with unit stride in D; got {q.stride()}, {k.stride()}, {v.stride()}")
    check_devices(q=q, k=k, v=v, plan=plan.cu_q)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    flash = _backend(q.device)[1]
    if flash is None or q.dtype == torch.float32:
        return _padded_attention(q, k, v, plan, scale)
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise ValueError(f"want D a multiple of 8 and at most 256 in {q.dtype} on CUDA; got {q.shape[2]}")
    k, v = _read(k, plan.key_rows), _read(v, plan.key_rows)
    return flash(q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, causal=plan.causal, scale=scale)
