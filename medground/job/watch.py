"""Who hangs, and in what: ranks tell one another what they do, and where none moves any more the run ends with a name.

A rank that waits for others stands still as much as the one they wait for. What tells them apart: all ranks go through
the same work in the same order, so the one that is behind is at fault; and a rank that is stopped, dead or cut off
gives no sign of life at all. Two threads a rank: one exchanges signs over the job's TCPStore every few seconds, one
looks at clocks alone, since a store whose host is gone does not answer. The first and the last rank judge, so that the
others' work does not grow with the number of ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from medground.job.store import Place

_HERE = str(Path(__file__).parents[1])
_ENDED = 1 << 60  # order of a rank that has left


class Progress:
    """What this rank does, told by its main thread."""

    def __init__(self) -> None:
        self.phase, self.doing = "start", "start"
        self.order = 0
        """How many pieces of work it has begun; all ranks begin the same ones."""
        self.moved = time.monotonic()

    def now(self, phase: str, detail: str = "") -> None:
        """Begin a piece of work of a phase."""
        self.phase, self.doing = phase, f"{phase} of {detail}" if detail else phase
        self.order, self.moved = self.order + 1, time.monotonic()

    def tick(self) -> None:
        """It moves."""
        self.moved = time.monotonic()


class Sign(NamedTuple):
    """What a rank says of itself.

    Attributes:
        host: its machine.
        doing: its work.
        order: pieces of work begun.
        still: seconds since it last moved.
        where: the lines its main thread is at.
        beat: number of the sign.
    """

    host: str
    doing: str
    order: int
    still: float
    where: str
    beat: int


@contextmanager
def watch(progress: Progress, place: Place | None, rank: int, size: int, timeout: float) -> Iterator[None]:
    """End the process where the run does not move for `timeout` seconds.

    Args:
        progress: of this rank.
        place: the ranks' store; None for one that is alone.
        rank: which it is.
        size: ranks of the run.
        timeout: seconds; it takes up to a quarter of it longer to notice.
    """
    watcher = _Watcher(progress, place, rank, size, timeout)
    progress.tick()
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


def verdict(signs: Mapping[int, tuple[Sign, float]], size: int, timeout: float) -> str | None:
    """What is wrong with a run, in a sentence; None where it moves.

    Args:
        signs: of each rank its newest sign, and seconds since it came.
        size: ranks of the run; one without a sign has yet to give its first.
        timeout: seconds.
    """
    here = {rank: pair for rank, pair in sorted(signs.items()) if pair[0].order != _ENDED}
    still = [sign.still + age for sign, age in here.values()]
    hangs = len(signs) == size and bool(still) and min(still) > timeout
    # where nothing moves, what came last from a rank that is cut off may be younger than its last move
    silent = {rank: age for rank, (_, age) in here.items() if age > (timeout / 2 if hangs else timeout)}
    if silent:
        told = "; ".join(_told(rank, signs[rank][0]) for rank in silent)
        return f"no sign of life for {min(silent.values()):.0f} s from {told}"
    if not hangs:
        return None
    last = min(sign.order for sign, _ in here.values())
    behind = [rank for rank, (sign, _) in here.items() if sign.order == last]
    told = "; ".join(f"{_told(rank, signs[rank][0])}, at {signs[rank][0].where}" for rank in behind[:8])
    more = f"; and {len(behind) - 8} more" if len(behind) > 8 else ""
    waiting = f"; {len(here) - len(behind)} others wait" if len(behind) < len(here) else ""
    return f"nothing moved for {timeout:.0f} s; stuck: {told}{more}{waiting}"


def _told(rank: int, sign: Sign) -> str:
    return f"rank {rank} on {sign.host} ({sign.doing})"


class _Watcher:
    def __init__(self, progress: Progress, place: Place | None, rank: int, size: int, timeout: float):
        self._progress, self._place, self._rank, self._size, self._timeout = progress, place, rank, size, timeout
        self._period = min(timeout / 10, 5.0)
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._signs: dict[int, tuple[Sign, float]] = {}  # and when it came
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=self._judge, daemon=True, name="watch")]
        if place:
            self._threads.append(threading.Thread(target=self._talk, daemon=True, name="signs of life"))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    def _sign(self, beat: int) -> Sign:
        doing, order, moved = self._progress.doing, self._progress.order, self._progress.moved
        return Sign(socket.gethostname(), doing, order, time.monotonic() - moved, self._where(), beat)

    def _where(self) -> str:
        """The innermost line of the main thread, and the innermost of ours that led there."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame else []
        ours = [line for line in stack if line.filename.startswith(_HERE)]
        lines = dict.fromkeys(f"{Path(line.filename).name}:{line.lineno}" for line in [*ours[-1:], *stack[-1:]])
        return " > ".join(lines) or "its end"

    def _talk(self) -> None:
        """Exchange signs; whatever goes wrong here, `_judge` notices that no answer comes."""
        assert self._place
        keys = [f"sign/{rank}" for rank in range(self._size)]
        store, judge, beat = None, self._rank in (0, self._size - 1), 0
        while not self._ended.wait(self._period if beat else 0):
            beat += 1
            try:
                if store is None:
                    store = self._place.open(self._timeout)  # the main thread's connection may be busy
                store.set(keys[self._rank], json.dumps(self._sign(beat)))
                known = [r for r in range(self._size) if r in self._signs] if judge else []
                new = [r for r in range(self._size) if judge and r not in self._signs and store.check([keys[r]])]
                asked = [*known, *new] or [self._rank]
                values = store.multi_get([keys[r] for r in asked])
                self._answered = time.monotonic()
            except (RuntimeError, ValueError):  # of the store: dist.DistStoreError and others
                store = None
                continue
            for r, value in zip(asked, values, strict=True):
                self._note(r, Sign(*json.loads(value)))
        if store is not None:
            with suppress(RuntimeError):
                store.set(keys[self._rank], json.dumps(self._sign(beat + 1)._replace(order=_ENDED)))

    def _note(self, rank: int, sign: Sign) -> None:
        known = self._signs.get(rank)
        if known is None or known[0].beat != sign.beat:
            self._signs[rank] = (sign, time.monotonic())

    def _judge(self) -> None:
        beat, last = 0, time.monotonic()
        while not self._ended.wait(self._period):
            now = time.monotonic()
            if now - last > self._timeout / 2:  # this process was stopped: it is not the others who were silent
                self._answered = now
                self._signs = {rank: (sign, now) for rank, (sign, _) in list(self._signs.items())}
            last = now
            if not self._place:
                beat += 1
                self._note(0, self._sign(beat))
            elif now - self._answered > self._timeout:
                host, doing = self._place.host, self._progress.doing
                self._end(
                    f"no answer for {self._timeout:.0f} s from {host}, the host that keeps the job together; this rank "
                    f"is in {doing}, at {self._where()}"
                )
            # nobody is silent where it is the store that does not answer
            heard = self._answered if self._place else now
            signs = {rank: (sign, max(heard - came, 0.0)) for rank, (sign, came) in list(self._signs.items())}
            if signs and (said := verdict(signs, self._size, self._timeout)):
                self._end(said)

    def _end(self, said: str) -> Any:
        print(f"medground: error: rank {self._rank} on {socket.gethostname()}: {said}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait for ever
