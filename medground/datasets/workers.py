"""A function over many items in several processes: results in order, few items under way at once."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_AHEAD = 8  # items per worker that wait or are done: memory does not grow with the data


def map_in_order(function: Callable[[_In], _Out], items: Iterable[_In], workers: int) -> Iterator[_Out]:
    """`map`, by `workers` processes; one works in this process.

    Args:
        function: of a module, since the processes import it.
        items: that can be pickled; taken as they are needed.
        workers: >= 1.

    Raises:
        ValueError: a process died.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # spawned: forking a process that has threads can hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker) as pool:
        waiting: deque[Future[_Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= workers * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError("workers: want processes that stay alive; one was killed (out of memory?)") from None
        finally:
            for future in waiting:
                future.cancel()


def begin_worker() -> None:
    """In a new worker: leave Ctrl-C to the main process, and end with it even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # or it would go on writing files that a new run writes too
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
