"""The order of training records: whole epochs, exact at any position."""

from medground.data_order import DataOrder
from medground.records import Example


def examples(n: int, name: str = "r") -> list[Example]:
    return [Example(f"{name}{i}", f"{i}.png", 10, 10, "x", (), "c", "p", "s", "t", "train") for i in range(n)]


def ids(order: DataOrder, first: int, end: int) -> list[str]:
    return [order[p].id for p in range(first, end)]


def test_every_epoch_has_every_record_once():
    order, names = DataOrder(examples(17), seed=3), sorted(e.id for e in examples(17))
    epochs = [ids(order, start, start + 17) for start in (0, 17, 34)]
    assert all(sorted(epoch) == names for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert ids(DataOrder(examples(17), seed=4), 0, 17) != epochs[0]


def test_a_position_needs_none_before_it():
    order = DataOrder(examples(7), seed=3)
    stream = ids(order, 0, 60)
    assert [DataOrder(examples(7), seed=3)[p].id for p in (59, 0, 31)] == [stream[59], stream[0], stream[31]]
