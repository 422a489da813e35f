"""How near a kernel must come to the truth, and how many matrix products it may take."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16_ULP = 2.0**-7  # the interpreter truncates where the GPU rounds
FP16_ULP = 2.0**-10


def value_and_grads(fn: Callable[..., Mapping[str, Tensor]], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every output of fn(**leaves), and the gradient of each leaf under a fixed upstream gradient a output."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    outputs = fn(**leaves)
    loss = sum(
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
        for out in outputs.values()
        if out.requires_grad
    )
    if isinstance(loss, Tensor):
        loss.backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: out.detach() for name, out in outputs.items()} | grads


def assert_as_close_as_pytorch(
    ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor], *, slack: float = 2e-6
) -> None:
    """Our error against the float64 truth is at most twice PyTorch's in the same dtype, plus a slack.

    The slack is relative to the largest number of the output where that is above 1; a 16-bit output may be off by
    its own rounding too.
    """
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        got = ours[name]
        assert got.shape == true.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(true.shape)}"
        if not true.numel():
            continue
        assert got.isfinite().all() or not true.isfinite().all(), f"{name}: not finite"
        rounding = {torch.bfloat16: BF16_ULP, torch.float16: FP16_ULP}.get(got.dtype, 0.0)
        error = (got.double() - true).abs()
        theirs = (plain[name].double() - true).abs().max()
        allowed = 2 * theirs + slack * max(1.0, true.abs().max().item()) + rounding * true.abs()
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (
            f"{name}: error {error.flatten()[worst]:.1e}, allowed {allowed.flatten()[worst]:.1e}; "
            f"{got.flatten()[worst]} instead of {true.flatten()[worst]}"
        )


class Products(TorchDispatchMode):
    """The matrix products made within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
