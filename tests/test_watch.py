"""Who hangs is named: the verdict on made-up signs, then threads that watch a rank."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from medground.job import watch as module
from medground.job.store import Place
from medground.job.watch import _ENDED, Progress, Sign, verdict, watch


def sign(order=5, still=0.0, doing="update of step 3", host="a", where="train.py:7", beat=1) -> Sign:
    return Sign(host, doing, order, still, where, beat)


def test_a_run_that_moves():
    assert verdict({0: (sign(still=50), 0.0), 1: (sign(still=3), 1.0)}, 2, 10.0) is None
    assert verdict({0: (sign(still=50), 0.0)}, 2, 10.0) is None, "the other has not come yet"
    assert verdict({0: (sign(still=50), 0.0), 1: (sign(order=_ENDED, still=99), 99.0)}, 2, 60.0) is None


def test_a_rank_without_a_sign_is_named():
    signs = {0: (sign(still=60), 0.0), 1: (sign(host="b", doing="rollout of step 4"), 11.0), 2: (sign(still=50), 1.0)}
    assert verdict(signs, 3, 10.0) == "no sign of life for 11 s from rank 1 on b (rollout of step 4)"
    cut_off = {0: (sign(still=11), 0.1), 1: (sign(host="b", still=2), 9.0)}
    assert verdict(cut_off, 2, 10.0) == "no sign of life for 9 s from rank 1 on b (update of step 3)"
    assert verdict({0: (sign(still=9), 0.1), 1: (sign(host="b", still=2), 9.0)}, 2, 10.0) is None


def test_the_one_behind_is_named_and_where_it_is():
    signs = {
        0: (sign(order=9, still=11), 0.5),
        1: (sign(order=8, still=12, host="b", doing="reward of step 4", where="spatial.py:3 > socket.py:1"), 0.1),
        2: (sign(order=9, still=11), 0.5),
    }
    said = verdict(signs, 3, 10.0)
    assert said == (
        "nothing moved for 10 s; stuck: rank 1 on b (reward of step 4), at spatial.py:3 > socket.py:1; 2 others wait"
    )


def test_all_are_named_where_none_is_behind():
    signs = {rank: (sign(still=20), 0.0) for rank in range(10)}
    said = verdict(signs, 10, 10.0)
    assert said.count("rank ") == 8 and said.endswith("; and 2 more")


def test_a_rank_that_has_left_is_not_behind():
    signs = {0: (sign(order=9, still=20, doing="export"), 0.0), 1: (sign(order=_ENDED, still=30), 30.0)}
    assert verdict(signs, 2, 10.0) == "nothing moved for 10 s; stuck: rank 0 on a (export), at train.py:7"


@pytest.fixture
def deaths(monkeypatch):
    """What would have ended the process."""
    found = []

    def end(self, said):
        found.append((self._rank, said))
        self._ended.set()

    monkeypatch.setattr(module._Watcher, "_end", end)
    return found


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_alone(deaths):
    progress = Progress()
    with watch(progress, None, 0, 1, 0.5):
        progress.now("update", "step 3: a micro-batch of 7 tokens")
        for _ in range(10):
            time.sleep(0.1)
            progress.tick()
        assert not deaths
        wait_for(lambda: deaths)
    rank, said = deaths[0]
    assert rank == 0 and "(update of step 3: a micro-batch of 7 tokens), at test_watch.py" in said
    count = threading.active_count()
    with watch(progress, None, 0, 1, 60.0):
        assert threading.active_count() == count + 1
    assert threading.active_count() == count


@pytest.fixture
def place():
    """A store in this process, whose three ranks are threads."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    yield Place("localhost", server.port, "here")
    del server


def test_threads_of_three_ranks(place: Place, deaths):
    ranks = [Progress() for _ in range(3)]
    watchers = [module._Watcher(progress, place, rank, 3, 1.0) for rank, progress in enumerate(ranks)]
    for watcher in watchers:
        watcher.start()
    for order in range(12):
        for progress in ranks:
            progress.now("score", f"step {order}")
        time.sleep(0.1)
    assert not deaths
    ranks[0].now("update", "step 12")
    ranks[2].now("update", "step 12")
    wait_for(lambda: deaths)
    for watcher in watchers:
        watcher.stop()
    assert {rank for rank, _ in deaths} <= {0, 2}, "the first and the last judge"
    assert all(
        "stuck: rank 1 on " in said and "(score of step 11)" in said and "2 others wait" in said for _, said in deaths
    )


def test_a_rank_that_leaves_is_not_missed(place: Place, deaths):
    progress = [Progress(), Progress()]
    watchers = [module._Watcher(p, place, rank, 2, 0.5) for rank, p in enumerate(progress)]
    for watcher in watchers:
        watcher.start()
    time.sleep(0.3)
    watchers[1].stop()
    for _ in range(15):
        time.sleep(0.1)
        progress[0].tick()
    watchers[0].stop()
    assert not deaths


def test_a_store_that_does_not_answer(place: Place, deaths, monkeypatch):
    progress = Progress()
    gone = Place("localhost", 1, "here")  # nobody listens there
    watcher = module._Watcher(progress, gone, 1, 3, 0.5)
    monkeypatch.setattr(Place, "open", lambda self, timeout: (_ for _ in ()).throw(RuntimeError("refused")))
    progress.now("rollout", "step 2")
    watcher.start()
    wait_for(lambda: deaths)
    watcher.stop()
    assert deaths[0][1].startswith(
        "no answer for 0 s from localhost, the host that keeps the job together; this rank is in rollout"
    )


def test_nobody_is_silent_where_the_store_does_not_answer(place: Place, deaths, monkeypatch):
    """What it said last is as old as the cut, a sign in it older: it is the store's turn to be named."""
    watcher = module._Watcher(Progress(), place, 1, 2, 6.0)
    now = time.monotonic()
    watcher._signs = {rank: (sign(), now - 6.3) for rank in range(2)}
    watcher._answered = now - 5.9
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(watcher, "_ended", _Times(1))
    watcher._judge()
    assert not deaths
    watcher._answered, watcher._ended.left = now - 6.1, 1
    watcher._judge()
    assert deaths[0][1].startswith("no answer for 6 s from localhost")


def test_a_process_that_was_stopped_blames_nobody(place: Place, deaths, monkeypatch):
    """Its clocks have run on: the others only seem to be silent."""
    watcher = module._Watcher(Progress(), place, 0, 2, 0.5)
    watcher._note(0, sign())
    watcher._note(1, sign())
    now = time.monotonic()
    ticks = iter([now, now + 100, now + 100.1, now + 100.2])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks, now + 100.2))
    monkeypatch.setattr(watcher, "_ended", _Times(3))
    watcher._judge()
    assert not deaths


class _Times:
    """An event that is set after so many waits."""

    def __init__(self, count: int):
        self.left = count

    def wait(self, seconds: float) -> bool:
        self.left -= 1
        return self.left < 0

    def set(self) -> None:
        self.left = 0


def test_the_end_is_an_end(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    module._Watcher(Progress(), None, 3, 4, 1.0)._end("it hangs")
    assert codes == [1] and capsys.readouterr().err.startswith("medground: error: rank 3 on ")


def test_where_names_our_line():
    found = module._Watcher(Progress(), None, 0, 1, 1.0)._where()
    assert found.startswith("watch.py:") or Path(__file__).name in found
