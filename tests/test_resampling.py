"""Spare records of a step: others than its own, each once, the same whenever they are asked for."""

from itertools import islice

from test_data_order import examples

from medground.data_order import DataOrder
from medground.resampling import spare_questions


def test_spare_questions():
    order = DataOrder([examples(9)], seed=3)
    step = [order[position].id for position in range(8, 12)]  # across two epochs
    found = [question.example.id for question in spare_questions(order, 2, 4, 5)]
    assert sorted(found + list(set(step))) == sorted({e.id for e in examples(9)})
    assert [q.example.id for q in islice(spare_questions(order, 2, 4, 5), 3)] == found[:3]
    assert [q.example.id for q in spare_questions(order, 3, 4, 5)] != found
    assert all(q.position >= 1 << 40 and order[q.position] is q.example for q in spare_questions(order, 2, 4, 5))


def test_a_step_that_has_every_record_leaves_none():
    assert list(spare_questions(DataOrder([examples(3)], seed=0), 0, 4, 2)) == []
