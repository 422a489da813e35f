"""Attention of one decoding step, where the rows of a group share one prefix that is stored once.

    out[r] = softmax(scale * q[r] K.T) V,    K, V = [prefix of r's group | r's own earlier tokens | r's new token]

The rows of a group ask the same keys, so their queries together are one matrix: the prefix is read once per group,
not once per row, and no row keeps a copy (Juravsky et al. 2024, arXiv:2402.05099). One kernel attends to the prefix,
cut into splits so that few groups fill the GPU too, and leaves a result and its log-sum-exp per split; another
attends to a row's own tokens, writes the new one into the cache and joins the parts by their log-sum-exp
(Milakov & Gimelshein 2018, arXiv:1805.02867). Lengths are read on the device, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medground_kernels.backend import cdiv, check_devices, jit, next_power_of_2, runs_triton, tl

# none of these is measured yet
MOST_QUERIES = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # of one program; more would not fit
KEY_BYTES = 8192  # of the keys that a program reads at a time, and of the values
LEAST_KEYS = 128  # of a split
PROGRAMS = 2 * 132  # two for each of an H100's processors

_WANTED = (
    "want q [R, Hq, D], k, v [R, Hkv, D], prefix_k, prefix_v [A, Hkv, P, D], prefix_lengths [A], suffix_k, suffix_v "
    "[R, Hkv, C, D], suffix_lengths [R], members [A, M], places [R], Hq a multiple of Hkv, nothing but R 0"
)


def prefix_decode_reference(
    q: Tensor, k: Tensor, v: Tensor, *, prefix_k: Tensor, prefix_v: Tensor, prefix_lengths: Tensor, suffix_k: Tensor,
    suffix_v: Tensor, suffix_lengths: Tensor, members: Tensor, places: Tensor, scale: float | None = None
) -> Tensor:  # fmt: skip
    """The definition, a row at a time, in the dtype of `q`; as `prefix_decode`. Idle rows get NaN."""
    R, Hq, D = q.shape
    rep = Hq // k.shape[1]
    out = torch.full_like(q, torch.nan)
    for r in range(R):
        group = places[r] // members.shape[1]
        P, C = prefix_lengths[group], suffix_lengths[r]
        if suffix_k.shape[2] <= C:
            continue
        suffix_k[r, :, C], suffix_v[r, :, C] = k[r], v[r]
        keys = torch.cat([prefix_k[group, :, :P], suffix_k[r, :, : C + 1]], 1).repeat_interleave(rep, 0)
        values = torch.cat([prefix_v[group, :, :P], suffix_v[r, :, : C + 1]], 1).repeat_interleave(rep, 0)
        scores = (D**-0.5 if scale is None else scale) * (keys @ q[r, :, :, None])[..., 0]
        out[r] = (scores.softmax(-1)[:, None] @ values)[:, 0]
    return out


@jit
def _in_d(real, D: tl.constexpr, WIDTH: tl.constexpr):
    """The mask [rows, WIDTH] of rows that are real and columns below D."""
    mask = real[:, None]
    if D < WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < D)[None, :]
    return mask


@jit
def _fold_keys(
    q,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    count,
    rate,
    peak,
    total,
    acc,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fold `count` keys and values from the pointers on into a running maximum (of log2), sum and weighted sum."""
    lanes, d = tl.arange(0, BLOCK_N).to(tl.int64), tl.arange(0, WIDTH)
    for start in range(0, count, BLOCK_N):
        real = lanes < count - start
        # beyond the last key a cache may hold anything, NaN too
        k = tl.load(k_ptr + (lanes * k_stride)[:, None] + d[None, :], mask=_in_d(real, D, WIDTH), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * rate
        scores = tl.where(real[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        p = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + (lanes * v_stride)[:, None] + d[None, :], mask=_in_d(real, D, WIDTH), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = new_peak
        k_ptr += BLOCK_N * k_stride
        v_ptr += BLOCK_N * v_stride
    return peak, total, acc


@jit(do_not_specialize=["M", "tiles", "splits", "split_keys"])
def _prefix_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, members_ptr, partial_ptr, lse_ptr,
    q_stride, k_stride, v_stride, M, tiles, splits, split_keys, rate,
    REP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    # int64: a cache of all layers passes 2**31 elements
    group = (tl.program_id(0) // tiles).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    first_query = tl.program_id(0) % tiles * BLOCK_M  # of the group's M * REP
    lanes = tl.arange(0, BLOCK_M)
    member = (first_query + lanes) // REP
    row = tl.load(members_ptr + group * M + member, mask=member < M, other=-1)
    first = split * split_keys
    count = tl.minimum(tl.load(lengths_ptr + group) - first, split_keys)
    if (count > 0) & (tl.max(row, 0) >= 0):
        d = tl.arange(0, WIDTH)
        head = kv_head * REP + (first_query + lanes) % REP
        at = row * q_stride[0] + head * q_stride[1]
        q = tl.load(q_ptr + at[:, None] + d[None, :], mask=_in_d(row >= 0, D, WIDTH), other=0.0)
        peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        k_ptr += group * k_stride[0] + kv_head * k_stride[1] + first.to(tl.int64) * k_stride[2]
        v_ptr += group * v_stride[0] + kv_head * v_stride[1] + first.to(tl.int64) * v_stride[2]
        peak, total, acc = _fold_keys(
            q, k_ptr, v_ptr, k_stride[2], v_stride[2], count, rate, peak, total, acc, D, WIDTH, BLOCK_N
        )
        at = ((group * tl.num_programs(1) + kv_head) * splits + split) * M * REP + first_query
        real = lanes < M * REP - first_query
        tl.store(lse_ptr + at + lanes, peak + tl.log2(total), mask=real)
        tl.store(
            partial_ptr + at * D + (lanes * D)[:, None] + d[None, :], acc / total[:, None], mask=_in_d(real, D, WIDTH)
        )


@jit(do_not_specialize=["C", "M", "splits", "split_keys"])
def _suffix_kernel(
    q_ptr, k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, lengths_ptr, places_ptr, prefix_lengths_ptr, partial_ptr, lse_ptr,
    out_ptr, q_stride, k_stride, v_stride, cache_k_stride, cache_v_stride, C, M, splits, split_keys, rate,
    REP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    if length < C:
        d, lanes = tl.arange(0, WIDTH), tl.arange(0, HEADS)
        head = kv_head * REP + lanes
        real = lanes < REP
        at = row * q_stride[0] + head * q_stride[1]
        q = tl.load(q_ptr + at[:, None] + d[None, :], mask=_in_d(real, D, WIDTH), other=0.0)
        k = tl.load(k_ptr + row * k_stride[0] + kv_head * k_stride[1] + d, mask=d < D, other=0.0)
        v = tl.load(v_ptr + row * v_stride[0] + kv_head * v_stride[1] + d, mask=d < D, other=0.0)
        cache_k_ptr += row * cache_k_stride[0] + kv_head * cache_k_stride[1]
        cache_v_ptr += row * cache_v_stride[0] + kv_head * cache_v_stride[1]
        tl.store(cache_k_ptr + length.to(tl.int64) * cache_k_stride[2] + d, k, mask=d < D)
        tl.store(cache_v_ptr + length.to(tl.int64) * cache_v_stride[2] + d, v, mask=d < D)
        # the new token comes first, so that the running maximum is finite from the start
        peak = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * rate
        total = tl.full([HEADS], 1.0, tl.float32)
        acc = tl.zeros([HEADS, WIDTH], tl.float32) + v.to(tl.float32)[None, :]
        peak, total, acc = _fold_keys(
            q, cache_k_ptr, cache_v_ptr, cache_k_stride[2], cache_v_stride[2], length, rate, peak, total, acc,
            D, WIDTH, BLOCK_N
        )  # fmt: skip
        place = tl.load(places_ptr + row)
        group = place // M
        at = ((group * tl.num_programs(1) + kv_head) * splits * M + place % M) * REP
        lse_ptr += at
        partial_ptr += at * D
        for _ in range(0, tl.cdiv(tl.load(prefix_lengths_ptr + group), split_keys)):
            lse = tl.load(lse_ptr + lanes, mask=real, other=-float("inf"))
            partial = tl.load(partial_ptr + (lanes * D)[:, None] + d[None, :], mask=_in_d(real, D, WIDTH), other=0.0)
            new_peak = tl.maximum(peak, lse)
            shrink = tl.exp2(peak - new_peak)
            weight = tl.exp2(lse - new_peak)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + partial * weight[:, None]
            peak = new_peak
            lse_ptr += M * REP
            partial_ptr += M * REP * D
        at = row * tl.num_programs(1) * REP + head
        tl.store(out_ptr + (at * D)[:, None] + d[None, :], acc / total[:, None], mask=_in_d(real, D, WIDTH))


def _launch(
    q, k, v, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, members, places, scale
):  # fmt: skip
    R, Hq, D = q.shape
    A, Hkv, P, _ = prefix_k.shape
    M, rep = members.shape[1], Hq // Hkv
    if D > 256:
        raise ValueError(f"want D up to 256; got {D}")
    WIDTH = max(next_power_of_2(D), 16)
    BLOCK_M = min(max(next_power_of_2(M * rep), 16), MOST_QUERIES[q.dtype])
    BLOCK_N = min(max(KEY_BYTES // (WIDTH * q.element_size()), 16), 64)
    tiles = cdiv(M * rep, BLOCK_M)
    split_keys = max(cdiv(P, cdiv(PROGRAMS, A * tiles * Hkv)), LEAST_KEYS)
    split_keys = cdiv(split_keys, BLOCK_N) * BLOCK_N
    splits = cdiv(P, split_keys)
    partial = torch.empty((A, Hkv, splits, M * rep, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((A, Hkv, splits, M * rep), dtype=torch.float32, device=q.device)
    out = torch.empty((R, Hq, D), dtype=q.dtype, device=q.device)
    rate = scale * 1.4426950408889634  # exp(x) = 2 ** (x log2 e)
    _prefix_kernel[(A * tiles, Hkv, splits)](
        q, prefix_k, prefix_v, prefix_lengths, members, partial, lse,
        q.stride(), prefix_k.stride(), prefix_v.stride(), M, tiles, splits, split_keys, rate,
        REP=rep, D=D, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=8 if BLOCK_M * WIDTH >= 8192 else 4
    )  # fmt: skip
    _suffix_kernel[(R, Hkv)](
        q, k, v, suffix_k, suffix_v, suffix_lengths, places, prefix_lengths, partial, lse, out,
        q.stride(), k.stride(), v.stride(), suffix_k.stride(), suffix_v.stride(),
        suffix_k.shape[2], M, splits, split_keys, rate,
        REP=rep, D=D, WIDTH=WIDTH, HEADS=max(next_power_of_2(rep), 16), BLOCK_N=BLOCK_N, num_warps=4
    )  # fmt: skip
    return out


def _attend(q, k, v, lengths, least, most):
    """softmax(q k.T) v over the first lengths [B] of the keys [B, Hkv, L, D], and the log-sum-exp of q k.T."""
    most = max(most, 1)
    k, v = k[:, :, :most].float(), v[:, :, :most].float()
    scores = q @ k.mT
    if least < most:
        unused = (torch.arange(most, device=q.device) >= lengths[:, None])[:, None, None]
        scores.masked_fill_(unused, torch.finfo(torch.float32).min)
    p = scores.softmax(-1)
    out = p @ v
    if least < most and not out.isfinite().all():
        # 0 * NaN is NaN: only now, since it copies the values
        out = p @ v.masked_fill(unused.mT, 0.0)
    return out, scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


def _decode_torch(
    q, k, v, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, members, places, scale
):  # fmt: skip
    R, Hq, D = q.shape
    A, Hkv, P, _ = prefix_k.shape
    C = suffix_k.shape[2]
    M, rep = members.shape[1], Hq // Hkv
    used = (suffix_lengths + 1) * (suffix_lengths < C)
    least, most = map(int, used.aminmax())
    if least == most > 0:
        suffix_k[:, :, most - 1], suffix_v[:, :, most - 1] = k, v
    else:
        rows = used.nonzero()[:, 0]
        last = used[rows] - 1
        suffix_k[rows, :, last], suffix_v[rows, :, last] = k[rows], v[rows]
    q = q.float() * scale
    suffix, suffix_lse = _attend(q.view(R, Hkv, rep, D), suffix_k, suffix_v, used, least, most)
    least, most = map(int, prefix_lengths.aminmax())
    if most > P:
        raise ValueError(f"want prefix_lengths up to P = {P}; got {most}")
    # -1 takes the last row's queries, and no row the result
    grid = q[members].view(A, M, Hkv, rep, D).transpose(1, 2).reshape(A, Hkv, M * rep, D)
    prefix, prefix_lse = (
        part.view(A, Hkv, M, rep, -1).transpose(1, 2).reshape(A * M, Hkv, rep, -1)[places]
        for part in _attend(grid, prefix_k, prefix_v, prefix_lengths, least, most)
    )
    out = suffix.lerp(prefix, (prefix_lse - suffix_lse).sigmoid_())
    return out.reshape(R, Hq, D).to(k.dtype)


@torch.no_grad()
def prefix_decode(
    q: Tensor, k: Tensor, v: Tensor, *, prefix_k: Tensor, prefix_v: Tensor, prefix_lengths: Tensor, suffix_k: Tensor,
    suffix_v: Tensor, suffix_lengths: Tensor, members: Tensor, places: Tensor, scale: float | None = None
) -> Tensor:  # fmt: skip
    """Attend to the prefix of each row's group, the row's own tokens and its new one, which is written into the cache.

    Waits for no GPU, and its launches depend on shapes alone, so that a CUDA graph may hold it; it has no gradient.

    Args:
        q: [R, Hq, D], float32, bfloat16 or float16, queries of each row's new token, after rotation. On CUDA,
            D is at most 256; best a power of two.
        k: [R, Hkv, D], its keys; Hq is a multiple of Hkv, and rep = Hq / Hkv heads in a row ask the same keys.
        v: [R, Hkv, D], its values.
        prefix_k: [A, Hkv, P, D], keys of A groups' prefixes.
        prefix_v: [A, Hkv, P, D], their values.
        prefix_lengths: [A], int32, how many of the P are real, 0 .. P.
        suffix_k: [R, Hkv, C, D], keys of each row's own earlier tokens; `k` is written behind them.
        suffix_v: [R, Hkv, C, D], their values; `v` is written behind them.
        suffix_lengths: [R], int32, how many tokens those are, at least 0; not changed. A row that has C or more
            is idle: nothing is written, and its result is undefined.
        members: [A, M], int64, the rows of each group; -1 where there are fewer.
        places: [R], int64, where each row stands in members.flatten(); anything below A * M for an idle row.
        scale: of the scores; None for D**-0.5.

    Tensors have one dtype (of q) and unit stride in D; the caches may be views of larger ones, and what lies in them
    behind a length is never used, NaN or not. Lengths, members and places are contiguous.

    Returns:
        [R, Hq, D], of q's dtype; scores, softmax and sums are float32.

    Raises:
        ValueError: an input is not as above. Of what lengths, members and places hold, only prefix_lengths are
            looked at, and on a CPU alone (on a GPU that would wait for it).
    """
    tensors = (q, k, v, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, members, places)
    _check(*tensors)
    if not len(q):
        return torch.empty_like(q)
    decode = _launch if runs_triton(q) else _decode_torch
    return decode(*tensors, q.shape[2] ** -0.5 if scale is None else scale)


def _check(q, k, v, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths, members, places):
    values = (q, k, v, prefix_k, prefix_v, suffix_k, suffix_v)
    lengths, indices = (prefix_lengths, suffix_lengths), (members, places)
    got = [tuple(t.shape) for t in values + lengths + indices]
    if list(map(len, got)) != [3, 3, 3, 4, 4, 4, 4, 1, 1, 2, 1]:
        raise ValueError(f"{_WANTED}; got {got}")
    (R, Hq, D), (_, Hkv, _), (A, _, P, _), C, M = got[0], got[1], got[3], got[5][2], got[9][1]
    own, prefix, suffix = (R, Hkv, D), (A, Hkv, P, D), (R, Hkv, C, D)
    want = [(R, Hq, D), own, own, prefix, prefix, suffix, suffix, (A,), (R,), (A, M), (R,)]
    if got != want or 0 in (Hq, Hkv, D, A, P, C, M) or Hq % Hkv:
        raise ValueError(f"{_WANTED}; got {got}")
    if q.dtype not in MOST_QUERIES or any(t.dtype != q.dtype for t in values):
        raise ValueError(f"want float32, bfloat16 or float16, all alike; got {[t.dtype for t in values]}")
    if any(t.dtype != torch.int32 for t in lengths) or any(t.dtype != torch.int64 for t in indices):
        raise ValueError(f"want lengths int32, members, places int64; got {[t.dtype for t in lengths + indices]}")
    if D > 1 and any(t.stride(-1) != 1 for t in values):
        raise ValueError(f"want unit stride in D; got {[t.stride() for t in values]}")
    if not all(t.is_contiguous() for t in lengths + indices):
        raise ValueError("want contiguous lengths, members and places")
    if len({t.device for t in values + lengths + indices}) > 1:
        check_devices(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, suffix_k=suffix_k, suffix_v=suffix_v)
        check_devices(q=q, prefix_lengths=prefix_lengths, suffix_lengths=suffix_lengths, members=members, places=places)
