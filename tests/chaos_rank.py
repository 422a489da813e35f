"""A rank that is to die: `medground train`, after planting the next fault of a plan.

    CHAOS=FOLDER torchrun .. tests/chaos_rank.py PRESET [OPTIONS]

FOLDER/plan.json is a list of faults, which strike one after another, each in one process, whatever the number of
restarts: FOLDER/struck-N says that the N-th has. Where a fault says to signal the agent, torchrun gets the signal.
"""

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medground import checkpoint, checkpoint_folder, evaluate, export, policy, train
from medground.cli import main


def plant(fault: dict[str, Any], marker: Path) -> None:
    """See that a fault strikes at its moment, the `count`-th time that it comes."""
    left = fault["count"]

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            marker.touch()
            handle = os.open(marker.parent, os.O_RDONLY)
            os.fsync(handle)
            os.kill(os.getppid() if fault.get("agent") else os.getpid(), getattr(signal, fault["signal"]))

    MOMENTS[fault["moment"]](strike)


def _after(module: Any, name: str) -> Callable[[Callable[[], None]], None]:
    def wrap(strike: Callable[[], None]) -> None:
        inner = getattr(module, name)

        @functools.wraps(inner)
        def wrapped(*args: Any, **options: Any) -> Any:
            out = inner(*args, **options)
            strike()
            return out

        setattr(module, name, wrapped)

    return wrap


def _in_backward(strike: Callable[[], None]) -> None:
    inner = policy.linear_grpo

    def wrapped(*args: Any, **options: Any) -> Any:
        out = inner(*args, **options)
        out.loss.register_hook(lambda gradient: strike())
        return out

    policy.linear_grpo = wrapped


def _while_writing(strike: Callable[[], None]) -> None:
    """Within the write of a checkpoint's data, before it is on the disk."""
    inner = os.fsync

    def wrapped(handle: Any) -> None:
        if threading.current_thread().name.startswith("checkpoint"):
            strike()
        inner(handle)

    os.fsync = wrapped


def _at_any_time(strike: Callable[[], None]) -> None:
    """Milliseconds after the steps begin."""
    inner = train._steps

    def wrapped(*args: Any, **options: Any) -> bool:
        def wait() -> None:
            for _ in range(20_000):
                ended.wait(0.001)
                strike()

        ended = threading.Event()
        threading.Thread(target=wait, daemon=True).start()
        return inner(*args, **options)

    train._steps = wrapped


MOMENTS = {
    "decode": _after(evaluate.Asker, "stop"),
    "backward": _in_backward,
    "optimizer": _after(train.torch.nn.utils, "clip_grad_norm_"),
    "writing": _while_writing,
    "hashing": _after(checkpoint, "describe"),
    "before the rename": _after(checkpoint_folder, "_write_through"),
    "after the rename": _after(checkpoint_folder.os, "rename"),
    "tidying": _after(checkpoint_folder, "remove"),
    "export": _after(export, "_save_whole"),
    "any": _at_any_time,
}


if __name__ == "__main__":
    folder = Path(os.environ["CHAOS"])
    plan = json.loads((folder / "plan.json").read_text())
    struck = len(list(folder.glob("struck-*")))
    if struck < len(plan) and plan[struck]["rank"] == int(os.environ["RANK"]):
        plant(plan[struck], folder / f"struck-{struck:02d}")
    sys.exit(main(["train", *sys.argv[1:]]))
