"""The order of training records: whole epochs, shares of data sets, exact at any position."""

import random
from collections import Counter

import pytest

from medground.data_order import DataOrder
from medground.records import Example


def examples(n: int, name: str = "r") -> list[Example]:
    return [Example(f"{name}{i}", f"{i}.png", 10, 10, "x", (), "c", "p", "s", "t", "train") for i in range(n)]


def ids(order: DataOrder, first: int, end: int) -> list[str]:
    return [order[p].id for p in range(first, end)]


def test_every_epoch_has_every_record_once():
    order, names = DataOrder([examples(17)], seed=3), sorted(e.id for e in examples(17))
    epochs = [ids(order, start, start + 17) for start in (0, 17, 34)]
    assert all(sorted(epoch) == names for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert ids(DataOrder([examples(17)], seed=4), 0, 17) != epochs[0]


def test_a_position_needs_none_before_it():
    parts = [examples(7, "a"), examples(4, "b"), examples(2, "c")]
    stream = ids(DataOrder(parts, 3, [0.5, 0.2, 0.3]), 0, 60)
    again = DataOrder(parts, 3, [0.5, 0.2, 0.3])
    assert [again[p].id for p in (59, 0, 31)] == [stream[59], stream[0], stream[31]]
    assert ids(again, 10**12, 10**12 + 3), "as far out as you like"


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (0.1, 0.9), (1, 2, 3), (0.01, 0.98, 0.01), (5, 0.333, 2, 1)])
def test_any_window_has_each_data_set_in_its_share(weights):
    parts = [examples(3 + i, "abcd"[i]) for i in range(len(weights))]
    sources = [name[0] for name in ids(DataOrder(parts, 1, weights), 0, 4000)]
    rng = random.Random(0)
    for length in (1, 2, 7, 32, 100, 1000, 3000):
        for first in (0, *(rng.randrange(4000 - length + 1) for _ in range(30))):
            counts = Counter(sources[first : first + length])
            for i, weight in enumerate(weights):
                assert abs(counts["abcd"[i]] - length * weight / sum(weights)) < len(weights), (first, length)


def test_each_data_set_goes_through_whole_epochs_of_its_own():
    parts = [examples(5, "a"), examples(3, "b")]
    stream = ids(DataOrder(parts, 1, (2, 1)), 0, 90)
    for name, n in (("a", 5), ("b", 3)):
        own = [found for found in stream if found[0] == name]
        epochs = [own[i : i + n] for i in range(0, len(own) - n + 1, n)]
        assert all(len(set(epoch)) == n for epoch in epochs) and len(set(map(tuple, epochs))) > 2
    same = DataOrder([examples(5, "a"), examples(5, "b")], 1, (1, 1))
    a, b = ([n[1:] for n in ids(same, 0, 10) if n[0] == name] for name in "ab")
    assert a != b, "data sets of one size are not shuffled alike"
