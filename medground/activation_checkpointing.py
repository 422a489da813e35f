"""What the backward pass of a decoder layer or vision block computes again instead of keeping it.

    none        nothing
    selective   all but the results of attention and of matrix products, adapters' second ones aside
    full        all of it, from the layer's input

A layer's matrix products are nearly all of its work and about half of what it would keep: norms, rotations, casts, the
gate's product and adapters' casts of their input keep the other half, and are done again in no time. `full` keeps a
tensor a layer and runs its forward pass twice. Figures are in docs/log.md.

What is done again gives the same numbers, so gradients are the same bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch._functorch.config as compiler
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from transformers import PreTrainedModel

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def checkpoint_activations(
    model: PreTrainedModel, kind: Literal["none", "selective", "full"], *, compiled: bool = False
) -> None:
    """Have a model's layers compute activations again, in training mode.

    Args:
        model: of transformers.
        kind: what is computed again.
        compiled: whether its layers are compiled. The compiler then decides, within each graph, what `selective`
            comes to, by the same rule: from outside, a graph is one operation that can only be run again whole.
            That is a setting of the process: models compiled later have it too.
    """
    compiler.aggressive_recomputation = compiled and kind == "selective"
    if kind == "none" or compiler.aggressive_recomputation:
        model.gradient_checkpointing_disable()
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(options)
    # transformers has the inputs of all layers ask for gradients, which only reentrant checkpoints need: gradients
    # would go all the way through a frozen vision tower
    model.disable_input_require_grads()


def _policy(_context: Any, operation: OpOverload, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = operation._schema.name
    if name in _PRODUCTS:
        left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
        # an adapter's second product is as large as what it is added to, but next to no work
        kept = 8 * left.shape[-1] >= right.shape[-1]
    else:
        # FlashAttention's own operations and SDPA's are named in many ways, but after what they do
        kept = "attn" in name or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
