"""AdamW with moments in float32 or in 8 bits, and its state as plain tensors.

float32 is torch's own, one launch for many parameters. 8 bits is torchao's (Dettmers et al. 2021, arXiv:2110.02861):
each block of 256 numbers has a scale and 8-bit codes of a table that is finer near zero, so that a weight's two moments
take 2.03 bytes instead of 8. The step itself is computed in float32 either way.

torchao quantises what a rank holds of a parameter, if that is a whole number of blocks, so that blocks depend on how
many ranks there are. Ours lie within a row, and rows are what is sharded: the same blocks on any number of ranks, so
that a checkpoint goes on elsewhere exactly. Rows that no block of 64 or more divides keep float32.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from medground.config import OptimizerConfig

_SMALLEST = 4096  # numbers of a parameter that is quantised, as in bitsandbytes
_BLOCKS = (256, 128, 64)


def need_torchao() -> None:
    """See that torchao can be imported.

    Raises:
        ValueError: it cannot.
    """
    # its compiled libraries, of which the optimizer needs none, are made for certain versions of torch
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it would warn that they are left out
    try:
        importlib.import_module("torchao.optim")
    except ImportError as error:
        wanted = "adamw-8bit wants torchao: pip install medground[8bit]"
        raise ValueError(f"optimizer.kind: {wanted}; got {error}") from None


def adamw(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for.

    Raises:
        ValueError: it takes a package that is not installed.
    """
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, fused=True, **options)
    need_torchao()
    return _rowwise_adamw_8bit()(parameters, lr=config.lr, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step, of all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's step and moments as plain tensors by name, in place: what fills them is the optimizer's state.

    An 8-bit moment is two, `exp_avg.codes` and `exp_avg.scale`, whose rows are sharded as the parameter's. Before the
    first step all are zeros.
    """
    state = optimizer.state[parameter]
    new = getattr(optimizer, "_new_buffer", None)  # torchao's
    if not state:
        state["step"] = torch.zeros((), device="cpu" if new else parameter.device)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state[name] = new(parameter, signed) if new else torch.zeros_like(parameter)
    found: dict[str, Tensor] = {}
    block = _block(parameter) if new else 0
    for name, value in state.items():
        if name == "step" or not block:
            found[name] = value
            continue
        local: Any = value.to_local() if isinstance(value, DTensor) else value
        codes = local.codes if len(local) else local.byte()
        scale = local.scale if len(local) else local.flatten()
        blocks = torch.Size([len(parameter), _row(parameter) // block])
        found[f"{name}.codes"] = _sharded_as(parameter, codes, parameter.shape)
        found[f"{name}.scale"] = _sharded_as(parameter, scale.view(len(local), blocks[1]), blocks)
    return found


def _block(parameter: Tensor) -> int:
    """Numbers that share a scale; 0 where moments keep float32."""
    if parameter.numel() < _SMALLEST:
        return 0
    return next((block for block in _BLOCKS if _row(parameter) % block == 0), 0)


def _row(parameter: Tensor) -> int:
    return parameter.numel() // len(parameter)


def _sharded_as(parameter: Tensor, local: Tensor, shape: torch.Size) -> Tensor:
    """What the ranks hold of a tensor whose rows are sharded as a parameter's are."""
    if not isinstance(parameter, DTensor):
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _rowwise_adamw_8bit() -> Any:
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    class RowwiseAdamW8bit(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            local = p.to_local() if isinstance(p, DTensor) else p
            if not _block(p) or not len(local):
                return torch.zeros_like(p)
            zeros = OptimState8bit.zeros(local.shape, signed, _block(p), local.device, dtype=p.dtype)
            # a DTensor moves to the mesh's device, which is not where shards are under CPU offload
            return _sharded_as(p, zeros, p.shape).to(p.device)

    return RowwiseAdamW8bit
