"""Signals that ask a run to end: SIGTERM and SIGUSR1, as schedulers send before they take a machine back.

The signal only sets a flag. Ranks look at it together, where the weights are those of a whole number of steps: after a
roll-out, which then stops early and is thrown away, and after an update. Then all end alike, whichever of them got it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medground.sharding import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class InterruptedRun(Exception):  # noqa: N818  it is no error
    """Every rank is to save its state and end."""


class Interruption:
    """Listens for the signals while it is entered."""

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that this rank got."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python allows no other to listen
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agree(self, ranks: Ranks) -> None:
        """See whether any rank was asked to end; every rank must call it.

        Raises:
            InterruptedRun: one was; on every rank.
        """
        if ranks.any(self.requested is not None):
            names = [name for name in ranks.gather(self.requested) if name]
            raise InterruptedRun(names[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
