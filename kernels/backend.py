"""Where an op runs: its Triton kernels on a CUDA device and under Triton's interpreter, plain torch elsewhere."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    # Triton has wheels for Linux alone; elsewhere there is no CUDA either, and every op runs in plain torch
    if platform.system() == "Linux":
        raise
    triton = tl = None


def jit(kernel: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, with or without its options, where Triton exists."""
    if kernel is None:
        return lambda kernel: jit(kernel, **options)
    return triton.jit(kernel, **options) if triton else kernel


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor run their Triton kernels: a CUDA tensor, or TRITON_INTERPRET=1.

    Raises:
        ValueError: the tensor lies on another CUDA device than the current one, where a kernel would start.
    """
    index = tensor.device.index
    if tensor.is_cuda and index is not None and index != torch.cuda.current_device():
        raise ValueError(f"want tensors on the current device, cuda:{torch.cuda.current_device()}; got cuda:{index}")
    return tensor.is_cuda or (triton is not None and triton.knobs.runtime.interpret)


def check_devices(**tensors: Tensor | None) -> None:
    """See that tensors lie together; None lies anywhere.

    Raises:
        ValueError: they do not.
    """
    places = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(places.values())) > 1:
        raise ValueError(f"want all tensors on one device; got {places}")


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n >= 1: what `tl.arange` takes."""
    return 1 << (n - 1).bit_length()
