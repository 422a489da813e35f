"""The store through which the ranks of a job find each other.

torchrun restarts ranks, but not always its TCPStore: addresses of ranks that have died stay in it, and the new ones
try them in vain (torch 2.13, `--max-restarts` with the c10d rendezvous, gloo). So the first rank draws a name for this
attempt, under which everything is stored, and sees that every rank which is alive has it.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

_POLL = 0.05
_NAME = "medground/attempt"


class Place(NamedTuple):
    """A store, by its address and the prefix of this attempt's keys."""

    host: str
    port: int
    attempt: str

    def open(self, timeout: float) -> dist.Store:
        """Connect to it; a request may take `timeout` seconds."""
        store = dist.TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=timeout))
        return dist.PrefixStore(self.attempt, store)


def meet(rank: int, size: int, timeout: float) -> tuple[dist.Store, Place]:
    """Meet the other ranks that torchrun started, as its environment variables say.

    Args:
        rank: this one.
        size: how many there are.
        timeout: seconds to wait for the others, and that later requests may take.

    Returns:
        The store, and how another thread connects to it.

    Raises:
        TimeoutError: some did not come.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    mine = not kept_by_torchrun and rank == 0
    store = dist.TCPStore(host, port, is_master=mine, timeout=timedelta(seconds=timeout), multi_tenant=True)
    end = time.monotonic() + timeout
    attempt = _lead(store, size, end) if rank == 0 else _follow(store, rank, end)
    return dist.PrefixStore(attempt, store), Place(host, port, attempt)


def _lead(store: dist.Store, size: int, end: float) -> str:
    attempt = f"medground/{secrets.token_hex(8)}"
    store.set(_NAME, attempt)
    waiting = set(range(1, size))
    while waiting:
        for rank in [rank for rank in waiting if store.check([f"{attempt}/came/{rank}"])]:
            store.set(f"{attempt}/welcome/{rank}", store.get(f"{attempt}/came/{rank}").decode())
            waiting.discard(rank)
        if waiting:
            _wait(end, f"ranks {', '.join(map(str, sorted(waiting)))} to come")
    return attempt


def _follow(store: dist.Store, rank: int, end: float) -> str:
    """The name may be an old one's still: only who leads now answers with what this rank has just drawn."""
    own, told = secrets.token_hex(8), ""
    while True:
        if store.check([_NAME]):
            attempt = store.get(_NAME).decode()
            if attempt != told:
                store.set(f"{attempt}/came/{rank}", own)
                told = attempt
            answer = f"{attempt}/welcome/{rank}"
            if store.check([answer]) and store.get(answer).decode() == own:
                return attempt
        _wait(end, "rank 0 to lead")


def _wait(end: float, what: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"waited in vain for {what}")
    time.sleep(_POLL)
