"""The head's matrix products, a chunk of rows at a time: logits, and the gradients of hidden, weight and bias.

    logits = hidden @ weight.T + bias        dhidden = dlogits @ weight
                                             dweight = dlogits.T @ hidden,   dbias = dlogits.sum(0)

The products are cuBLAS's, in the inputs' dtype with float32 sums inside (but for partial sums of a split product, which
torch.backends.cuda.matmul lets it reduce in bfloat16 by default). The weight's gradient is added up over the chunks in
float32: in bfloat16 a chunk's share would be rounded away. Each chunk reads and writes that gradient once (2.2 GB for a
head of 152064 x 3584), so few large chunks are fast and many small ones save memory. With one chunk the product writes
the gradient in its own dtype and no float32 copy exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medground_kernels.backend import cdiv, check_devices, jit, runs_triton, tl

CUDA_BUDGET = 1_250_000_000  # bytes: 4096 rows of a 152k vocabulary in bfloat16; not measured yet
CPU_BUDGET = 32 << 20  # bytes: larger chunks were not faster (docs/log.md)
_SCALE_BLOCK = 1 << 14


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and strides of the head and its input."""
    shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        raise ValueError(f"want hidden [N, H], weight [V, H]; got {shapes}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"want bias [V] of the weight's dtype; got {shapes}, {bias.dtype}")
    check_devices(hidden=hidden, weight=weight, bias=bias)
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16):
        # float16 would lose the gradients of a loss that is divided by thousands of tokens
        raise ValueError(f"want float32 or bfloat16 hidden and weight alike; got {hidden.dtype}, {weight.dtype}")


def row_chunks(N: int, weight: Tensor, memory_budget: int | None) -> list[slice]:
    """Chunks of rows, as even as can be, whose logits fit the budget in bytes."""
    row = len(weight) * weight.element_size()
    if memory_budget is None:
        memory_budget = max(CUDA_BUDGET if weight.is_cuda else CPU_BUDGET, row)
    if memory_budget < row:
        raise ValueError(f"want memory_budget >= {row} bytes, one row of logits; got {memory_budget}")
    most = int(memory_budget // row)
    if most >= N:
        return [slice(0, N)] if N else []
    if most >= 128:
        most = most // 128 * 128  # whole tiles of the matrix products, aligned slices of the tokens
    rows = cdiv(N, cdiv(N, most))
    rows = min(cdiv(rows, 128) * 128, most)
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Logits [n, V] of a chunk of hidden [n, H], written into the first rows of `buffer`."""
    logits = buffer[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


class HeadGradients:
    """Gradients of hidden, weight and bias, chunk by chunk; None where not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...], chunks: int):
        self._hidden, self._weight = hidden, weight
        need_hidden, need_weight, need_bias = needed
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        dtype = weight.dtype if chunks == 1 else torch.float32
        make = torch.empty if chunks else torch.zeros
        self.weight = make(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        self.bias = None
        if need_bias and bias is not None:
            self.bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        self._chunk_bytes = cdiv(len(hidden), max(chunks, 1)) * len(weight) * weight.element_size()

    def add(self, rows: slice, dlogits: Tensor) -> None:
        """Add a chunk's share."""
        if self.hidden is not None:
            torch.mm(dlogits, self._weight, out=self.hidden[rows])
        if self.weight is not None:
            _add_product(self.weight, dlogits.t(), self._hidden[rows], beta=0 if rows.start == 0 else 1)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the dtypes of what they belong to; the logits' buffer must be free by now."""
        weight, dtype = self.weight, self._weight.dtype
        if weight is not None and weight.dtype != dtype:
            # beside the sums where a chunk of logits was, or else in their own memory
            room = weight.numel() * dtype.itemsize
            weight = weight.to(dtype) if room <= self._chunk_bytes else _narrow(weight, dtype)
        return self.hidden, weight, self.bias if self.bias is None else self.bias.to(self._weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """total = beta * total + a @ b, summed in float32; with beta 0 the old numbers are never looked at."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _narrow(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in 16 bits, in the first half of their own memory.

    The loss is where a step's memory is at its peak: a copy beside the float32 sums would raise it by half of them.
    """
    wide = total.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    done = min(len(wide), 1 << 20)
    narrow[:done] = wide[:done].to(dtype)
    while done < len(wide):
        # element i goes from bytes 4i to bytes 2i: those from `done` to twice that lie apart from where they go
        upto = min(2 * done, len(wide))
        narrow[done:upto] = wide[done:upto]
        done = upto
    return narrow.view(total.shape)


@jit
def _scale_kernel(values_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < n, other=0.0)
        tl.store(values_ptr + at, values.to(tl.float32) * factor, mask=at < n)


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a scalar that lies on the device, in place; by 1, which is usual, without touching the memory."""
    n = values.numel()
    if not runs_triton(values):
        return values if factor == 1 else values.mul_(factor)
    if n:
        _scale_kernel[(cdiv(n, _SCALE_BLOCK),)](values, factor, n, BLOCK=_SCALE_BLOCK, num_warps=8)
    return values
