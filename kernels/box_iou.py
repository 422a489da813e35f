"""Overlap of boxes, and of sets of boxes; boxes are xyxy in continuous coordinates.

    iou  = |a & b| / |a | b|
    giou = iou - (|c| - |a | b|) / |c|                      c: the smallest box around a and b
    diou = iou - (distance of the centres / diagonal of c)^2
    ciou = diou - v^2 / (1 - iou + v),    v = (2 / pi * (atan(w_a / h_a) - atan(w_b / h_b)))^2

    matched_iou = largest sum of iou over one-to-one matchings / boxes in the larger set

GIoU: Rezatofighi et al. 2019, arXiv:1902.09630. DIoU and CIoU: Zheng et al. 2020, arXiv:1911.08287. A
box too many costs as much as a box missed; two empty sets agree: 1.

The matching is the best one at any size: each predicted box in turn takes the shortest augmenting path to
a free true box under reduced costs (Jonker & Volgenant 1987, doi:10.1007/BF02278710), O(n^3). A program
matches one pair of sets; it holds vectors over the true boxes and computes rows of the IoU matrix as it
needs them. Arithmetic is float64: the area of a box with sides of 1e20 pixels passes float32.
"""

from __future__ import annotations

from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from medground_kernels.backend import cdiv, jit, next_power_of_2, runs_triton, tl

Kind = Literal["iou", "giou", "diou", "ciou"]
WORST = {"iou": 0.0, "giou": -1.0, "diou": -1.0, "ciou": -1.5}  # greatest lower bound over boxes that are boxes
BLOCK, NUM_WARPS = 128, 4  # not measured yet


def box_iou_reference(pred: Tensor, truth: Tensor, *, kind: Kind = "iou") -> Tensor:
    """The definition, in the dtype of the boxes; float64 boxes give the truth."""
    a, b = pred.unsqueeze(-2), truth.unsqueeze(-3)
    side_a, side_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    valid = ((side_a > 0) & (side_a < torch.inf) & (side_b > 0) & (side_b < torch.inf)).all(-1)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = side_a.prod(-1) + side_b.prod(-1) - shared
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    result = iou = shared / union
    if kind == "giou":
        result = iou - (around.prod(-1) - union) / around.prod(-1)
    if kind in ("diou", "ciou"):
        apart = (a[..., 2:] + a[..., :2] - b[..., 2:] - b[..., :2]) / 2
        result = iou - apart.square().sum(-1) / around.square().sum(-1)
    if kind == "ciou":
        angle = torch.atan2(side_a[..., 0], side_a[..., 1]) - torch.atan2(side_b[..., 0], side_b[..., 1])
        v = (angle * 2 / torch.pi).square()
        result = result - v.square() / (1 - iou + v + 1e-30)
    return result.masked_fill(~valid, WORST[kind])


def matched_iou_reference(pred: Tensor, pred_count: Tensor, truth: Tensor, truth_count: Tensor) -> Tensor:
    """The definition, by trial of every matching, in the dtype of the boxes: for a handful of boxes."""
    result = pred.new_empty(pred_count.numel())
    sets = (pred.flatten(0, -3), pred_count.flatten(), truth.flatten(0, -3), truth_count.flatten())
    for i, (a, n, b, m) in enumerate(zip(*sets, strict=True)):
        iou = box_iou_reference(a[:n], b[:m])
        few, many = sorted((int(n), int(m)))
        totals = [sum((iou if n <= m else iou.T)[range(few), p]) for p in permutations(range(many), few)]
        result[i] = max(totals) / many if many else 1.0
    return result.view(pred_count.shape)


@jit
def _load_boxes(ptr, here):
    """Corners x1, y1, x2, y2 in float64; NaN throughout where they make no box."""
    x1 = tl.load(ptr, mask=here, other=0.0).to(tl.float64)
    y1 = tl.load(ptr + 1, mask=here, other=0.0).to(tl.float64)
    x2 = tl.load(ptr + 2, mask=here, other=0.0).to(tl.float64)
    y2 = tl.load(ptr + 3, mask=here, other=0.0).to(tl.float64)
    nan, inf = float("nan"), float("inf")
    # no comparison with NaN is true, and infinite corners have infinite sides, or NaN
    valid = (x2 - x1 > 0) & (x2 - x1 < inf) & (y2 - y1 > 0) & (y2 - y1 < inf)
    return tl.where(valid, x1, nan), tl.where(valid, y1, nan), tl.where(valid, x2, nan), tl.where(valid, y2, nan)


@jit
def _overlap(a, b):
    """IoU, 0 where one is no box, and the area of the union, which is NaN there."""
    w = tl.minimum(a[2], b[2]) - tl.maximum(a[0], b[0])
    h = tl.minimum(a[3], b[3]) - tl.maximum(a[1], b[1])
    shared = tl.maximum(w, 0.0) * tl.maximum(h, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return tl.where(union > 0, shared / union, 0.0), union


@jit
def _angle(y, x):
    """atan(y / x) of y >= 0, x > 0, to 2e-8 (Abramowitz & Stegun 1964, 4.4.49)."""
    t = tl.minimum(x, y) / tl.maximum(x, y)
    z = t * t
    p = ((0.0028662257 * z - 0.0161657367) * z + 0.0429096138) * z - 0.0752896400
    p = (((p * z + 0.1065626393) * z - 0.1420889944) * z + 0.1999355085) * z - 0.3333314528
    angle = t + t * z * p
    return tl.where(y > x, 1.5707963267948966 - angle, angle)


@jit(do_not_specialize=["total", "P", "M"])
def _pair_kernel(pred_ptr, truth_ptr, out_ptr, total, P, M, worst, KIND: tl.constexpr, BLOCK: tl.constexpr):
    # int64: a step's pairs of boxes may pass 2**31
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = pair < total
    row = pair // M
    a = _load_boxes(pred_ptr + row * 4, here)
    b = _load_boxes(truth_ptr + (row // P * M + pair % M) * 4, here)
    iou, union = _overlap(a, b)
    result = iou
    around_w = tl.maximum(a[2], b[2]) - tl.minimum(a[0], b[0])
    around_h = tl.maximum(a[3], b[3]) - tl.minimum(a[1], b[1])
    if KIND == "giou":
        area = around_w * around_h
        result = iou - (area - union) / area
    if KIND == "diou" or KIND == "ciou":
        dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
        result = iou - (dx * dx + dy * dy) / (around_w * around_w + around_h * around_h)
    if KIND == "ciou":
        aw, ah, bw, bh = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
        # atan p - atan q = atan((p - q) / (1 + p q))
        angle = _angle(tl.abs(aw * bh - bw * ah), ah * bh + aw * bw) * 0.6366197723675814
        v = angle * angle
        result -= v * v / (1 - iou + v + 1e-30)
    tl.store(out_ptr + pair, tl.where(union > 0, result, worst), mask=here)


@jit
def _at(cols, col, values):
    """values[col]; the sum of one number and zeros is that number."""
    return tl.sum(tl.where(cols == col, values, tl.zeros_like(values)), 0)


@jit
def _row_cost(pred_ptr, row, price, b):
    """What row `row` loses by each column, less the column's price: float64 [BLOCK]."""
    iou, union = _overlap(_load_boxes(pred_ptr + row * 4, row >= 0), b)
    return -iou - price


@jit
def _nearest(cols, distance, reached, owner, BLOCK: tl.constexpr):
    """The least distance of a column not reached, and that column (free ones first), + BLOCK if it has an owner."""
    left = tl.where(reached, float("inf"), distance)
    least = tl.min(left, 0)
    return least, tl.min(tl.where(left == least, cols + tl.where(owner < 0, 0, BLOCK), 2 * BLOCK), 0)


@jit(do_not_specialize=["P", "M"])
def _matched_kernel(pred_ptr, pred_count_ptr, truth_ptr, truth_count_ptr, out_ptr, P, M, BLOCK: tl.constexpr):
    # columns past the true boxes overlap nothing: to be matched with one is to stay unmatched
    pair = tl.program_id(0).to(tl.int64)
    n, m = tl.load(pred_count_ptr + pair), tl.load(truth_count_ptr + pair)
    pred_ptr += pair * P * 4
    result = tl.full([], float("nan"), tl.float64)
    if (n >= 0) & (n <= P) & (m >= 0) & (m <= M):
        cols = tl.arange(0, BLOCK)
        b = _load_boxes(truth_ptr + (pair * M + cols) * 4, cols < m)
        price = tl.zeros([BLOCK], tl.float64)
        owner = tl.full([BLOCK], -1, tl.int32)  # the row that holds a column
        for row in range(0, n.to(tl.int32)):
            # Dijkstra from the row to the nearest free column
            distance = _row_cost(pred_ptr, row, price, b)
            before = tl.full([BLOCK], -1, tl.int32)  # the column that the path came from; -1: the row itself
            reached = cols < 0
            least, col = _nearest(cols, distance, reached, owner, BLOCK)
            while col >= BLOCK:
                col -= BLOCK
                reached = reached | (cols == col)
                beyond = _row_cost(pred_ptr, _at(cols, col, owner), price, b)
                beyond = beyond - _at(cols, col, beyond) + least
                shorter = (beyond < distance) & (reached == 0)
                distance = tl.where(shorter, beyond, distance)
                before = tl.where(shorter, col, before)
                least, col = _nearest(cols, distance, reached, owner, BLOCK)
            price += tl.where(reached, distance - least, 0.0)
            # each column of the path goes to the owner of the one before it
            source = _at(cols, col, before)
            while source >= 0:
                owner = tl.where(cols == col, _at(cols, source, owner), owner)
                col = source
                source = _at(cols, col, before)
            owner = tl.where(cols == col, row, owner)
        iou, union = _overlap(_load_boxes(pred_ptr + owner * 4, owner >= 0), b)
        larger = tl.maximum(n, m)
        result = tl.where(larger > 0, tl.sum(iou, 0) / tl.maximum(larger, 1).to(tl.float64), 1.0)
    tl.store(out_ptr + pair, result)


def _matched_torch(pred: Tensor, pred_count: Tensor, truth: Tensor, truth_count: Tensor) -> Tensor:
    """The kernel's search, all L pairs of sets at once; one whose search is over waits for the others."""
    L, P, M = len(pred), pred.shape[1], truth.shape[1]
    if P > M:  # a path for each of the fewer: one answer of 50 boxes would make all wait for 50
        return _matched_torch(truth, truth_count, pred, pred_count)
    C = max(M, 1)
    rows, cols, every = (torch.arange(n, device=pred.device) for n in (max(P, 1), C, L))
    iou = pred.new_zeros(L, len(rows), C, dtype=torch.float64)
    iou[:, :P, :M] = box_iou_reference(pred.double(), truth.double())
    iou.masked_fill_((rows >= pred_count[:, None])[:, :, None] | (cols >= truth_count[:, None])[:, None], 0.0)
    price, owner = iou.new_zeros(L, C), cols.new_full((L, C), -1)
    for row in range(P):
        distance = -iou[:, row] - price
        before, reached = torch.full_like(owner, -1), torch.zeros_like(owner, dtype=torch.bool)
        while True:
            least, col = distance.masked_fill(reached, torch.inf).min(-1)
            holder = owner[every, col]
            walking = (holder >= 0)[:, None]
            if not walking.any():
                break
            reached |= walking & (cols == col[:, None])
            beyond = -iou[every, holder] - price
            beyond += (least - beyond[every, col])[:, None]
            shorter = walking & (beyond < distance) & ~reached
            distance = torch.where(shorter, beyond, distance)
            before = torch.where(shorter, col[:, None], before)
        price += (distance - least[:, None]).masked_fill(~reached, 0.0)
        while (before[every, col] >= 0).any():
            source = torch.where(before[every, col] >= 0, before[every, col], col)
            owner[every, col] = owner[every, source]
            col = source
        owner[every, col] = row
    total = iou.gather(1, owner.clamp(min=0)[:, None])[:, 0].masked_fill(owner < 0, 0.0).sum(-1)
    larger = torch.maximum(pred_count, truth_count)
    return torch.where(larger > 0, total / larger.clamp(min=1), 1.0).float()


def _launch_matched(pred: Tensor, pred_count: Tensor, truth: Tensor, truth_count: Tensor) -> Tensor:
    P, M = pred.shape[1], truth.shape[1]
    out = torch.empty(len(pred), dtype=torch.float32, device=pred.device)
    block = max(next_power_of_2(max(P, M, 1)), 16)
    warps = min(max(block // 64, 1), 16)
    if len(pred):
        _matched_kernel[out.shape](pred, pred_count, truth, truth_count, out, P, M, BLOCK=block, num_warps=warps)
    return out


def _check_boxes(pred: Tensor, truth: Tensor) -> None:
    shapes = tuple(pred.shape), tuple(truth.shape)
    if any(len(shape) < 2 or shape[-1] != 4 for shape in shapes) or shapes[0][:-2] != shapes[1][:-2]:
        raise ValueError(f"want pred [..., P, 4], truth [..., M, 4]; got {shapes[0]}, {shapes[1]}")
    if not {pred.dtype, truth.dtype} <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"want float32, bfloat16 or float16 boxes; got {pred.dtype}, {truth.dtype}")


def box_iou(pred: Tensor, truth: Tensor, *, kind: Kind = "iou") -> Tensor:
    """Overlap of every pair of boxes.

    Args:
        pred: [..., P, 4], float32, bfloat16 or float16, xyxy, any unit, any strides.
        truth: [..., M, 4], the same unit and leading shape.
        kind: iou in 0..1, giou or diou in -1..1, ciou in -1.5..1.

    Returns:
        [..., P, M], float32, not differentiable (a reward). A box that is empty, inverted, NaN or infinite
        has the lowest value of its kind with every other: 0, -1, -1 and -1.5.

    Raises:
        ValueError: an input is not as above.
    """
    _check_boxes(pred, truth)
    if kind not in WORST:
        raise ValueError(f"want kind iou, giou, diou or ciou; got {kind!r}")
    pred, truth = pred.detach().contiguous(), truth.detach().contiguous()
    if not runs_triton(pred):
        return box_iou_reference(pred.double(), truth.double(), kind=kind).float()
    P, M = pred.shape[-2], truth.shape[-2]
    out = torch.empty((*pred.shape[:-1], M), dtype=torch.float32, device=pred.device)
    if out.numel():
        _pair_kernel[(cdiv(out.numel(), BLOCK),)](
            pred, truth, out, out.numel(), P, M, WORST[kind], KIND=kind, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out


def matched_iou(pred: Tensor, pred_count: Tensor, truth: Tensor, truth_count: Tensor) -> Tensor:
    """IoU of sets of boxes under their best one-to-one matching, in one launch.

    Args:
        pred: [..., P, 4], float32, bfloat16 or float16, xyxy, any strides; boxes past the count are ignored.
        pred_count: [...], int64, boxes predicted, 0..P.
        truth: [..., M, 4], the same unit.
        truth_count: [...], int64, true boxes, 0..M.

    Returns:
        [...], float32 in 0..1, not differentiable (a reward). A box that is empty, inverted, NaN or infinite
        overlaps nothing but counts as a box.

    Raises:
        ValueError: an input is not as above. Counts out of range are seen on a CPU alone (to look would wait
            for the GPU); on CUDA their result is NaN.
    """
    _check_boxes(pred, truth)
    lead, counts = pred.shape[:-2], (pred_count, truth_count)
    if any(count.shape != lead or count.dtype != torch.int64 for count in counts):
        got = ", ".join(f"{tuple(count.shape)} {count.dtype}" for count in counts)
        raise ValueError(f"want counts {tuple(lead)} int64, the boxes' leading shape; got {got}")
    for count, size in zip(counts, (pred.shape[-2], truth.shape[-2]), strict=True):
        if not count.is_cuda and count.numel() and (count.min() < 0 or count.max() > size):
            raise ValueError(f"want counts in 0..{size}, the boxes given; got {count.min()}..{count.max()}")
    a, b = (boxes.detach().reshape(lead.numel(), *boxes.shape[-2:]).contiguous() for boxes in (pred, truth))
    n, m = (count.reshape(-1).contiguous() for count in counts)
    return (_launch_matched if runs_triton(pred) else _matched_torch)(a, n, b, m).view(lead)
