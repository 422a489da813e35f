"""A user's own reward: a Python function named as module:function.

    def reward(batch) -> [B, G] numbers

`batch` is a `Batch` (batch.py): completions, parsed answers, records with their true boxes, both image sizes. The
module is looked for as any import, from the folder where the run starts.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medground.rewards.batch import Batch

Custom = Callable[[Batch], Any]


def load_custom(name: str) -> Custom:
    """The function.

    Raises:
        ValueError: no such module or function, or the module cannot be imported; says why.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"reward.custom: want module:function; got {name!r}")
    if os.getcwd() not in sys.path:  # as `python -m` has it, but the command `medground` has not
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module does
        raise ValueError(
            f"reward.custom: {module} cannot be imported from {os.getcwd()}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"reward.custom: want a function {function} in module {module}; got {found!r}")
    return found


def custom_reward(name: str, function: Custom, batch: Batch) -> Tensor:
    """What it gives: [B, G], float32.

    Raises:
        ValueError: it raised an error, or its result is not B x G finite numbers.
    """
    try:
        given = function(batch)
        scores = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
    except Exception as error:
        raise ValueError(f"reward.custom: {name} failed: {type(error).__name__}: {error}") from error
    if scores.shape != batch.shape:
        raise ValueError(f"reward.custom: {name}: want [B, G] = {list(batch.shape)} numbers; got {list(scores.shape)}")
    if not scores.isfinite().all():
        b, g = (~scores.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"reward.custom: {name}: want finite numbers; got {scores[b, g].item()} for completion {g} of record "
            f"{batch.examples[b].id}"
        )
    return scores
