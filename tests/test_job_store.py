"""Ranks meet in a store that may hold what ranks of an earlier attempt left."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from medground.job.store import _NAME, Place, meet


@pytest.fixture
def store(monkeypatch):
    """torchrun's store, kept from attempt to attempt."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return server


def meet_all(size: int, order: list[int]) -> list[Place]:
    with ThreadPoolExecutor(size) as pool:
        futures = {rank: pool.submit(meet, rank, size, 20.0) for rank in order}
        return [futures[rank].result()[1] for rank in range(size)]


def test_all_get_one_name_and_another_one_next_time(store):
    first, second = meet_all(3, [0, 1, 2]), meet_all(3, [2, 1, 0])
    assert len(set(first)) == len(set(second)) == 1
    assert first[0].attempt != second[0].attempt


def test_what_dead_ranks_left_leads_nobody_astray(store):
    old = "medground/old"
    store.set(_NAME, old)
    for rank in (1, 2):
        store.set(f"{old}/came/{rank}", "their word")
        store.set(f"{old}/welcome/{rank}", "their word")
    store.set(f"{old}/key", "an address of the dead")
    places = meet_all(3, [1, 2, 0])
    assert len(set(places)) == 1 and places[0].attempt != old
    assert not places[0].open(5.0).check(["key"])


def test_keys_are_the_attempts_own(store):
    with ThreadPoolExecutor(2) as pool:
        follower = pool.submit(meet, 1, 2, 20.0)
        leader = pool.submit(meet, 0, 2, 20.0)
        ours, place = leader.result()
        theirs, _ = follower.result()
    ours.set("key", "value")
    assert theirs.get("key") == b"value" == place.open(5.0).get("key")
    assert not store.check(["key"])


def test_who_does_not_come_is_named(store):
    with pytest.raises(TimeoutError, match="in vain for ranks 1, 2 to come"):
        meet(0, 3, 0.3)
    with pytest.raises(TimeoutError, match="in vain for rank 0 to lead"):
        meet(1, 3, 0.3)
