"""Who trains on which groups: everything once, within the budget, evenly, and the same count on every rank."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medground.micro_batches import Load, Place, deal

ranks_of_loads = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=9), min_size=1, max_size=4
).map(lambda ranks: [[Load(tokens, tokens + 0.5 * patches) for tokens, patches in mine] for mine in ranks])


def cost(places: list[Place], loads: list[list[Load]]) -> float:
    return sum(loads[p.home][p.number].cost for p in places)


@settings(max_examples=200, deadline=None)
@given(ranks_of_loads, st.integers(60, 200))
def test_each_group_once_within_the_budget_equally_often(loads, budget):
    dealt = deal(loads, budget)
    assert len(dealt) == len(loads)
    assert len({len(cuts) for cuts in dealt}) == 1
    everything = sorted(place for cuts in dealt for places in cuts for place in places)
    assert everything == [Place(r, i) for r, mine in enumerate(loads) for i in range(len(mine))]
    for cuts in dealt:
        assert any(cuts)
        assert all(sum(loads[p.home][p.number].tokens for p in places) <= budget for places in cuts)
        costs = [cost(places, loads) for places in cuts]
        assert costs == sorted(costs, reverse=True)


@settings(max_examples=100, deadline=None)
@given(ranks_of_loads)
def test_the_busiest_rank_is_never_busier_than_before(loads):
    before = max(sum(load.cost for load in mine) for mine in loads)
    dealt = deal(loads, 10_000)
    assert max(cost([p for places in cuts for p in places], loads) for cuts in dealt) <= before + 1e-9


def test_work_moves_to_idle_ranks_but_not_for_nothing():
    large, small = Load(100, 100.0), Load(20, 20.0)
    dealt = deal([[large, large, large], [small]], 1000)
    costs = [cost([p for places in cuts for p in places], [[large] * 3, [small]]) for cuts in dealt]
    assert sorted(costs) == [120.0, 200.0]
    alike = [[Load(50, 50.0), Load(51, 51.0)], [Load(50, 50.2), Load(51, 51.3)]]
    assert all(p.home == rank for rank, cuts in enumerate(deal(alike, 1000)) for places in cuts for p in places)


def test_few_micro_batches_of_even_cost():
    loads = [[Load(n, float(n)) for n in (50, 40, 30, 30, 20, 20, 10)]]
    (cuts,) = deal(loads, 100)
    assert sorted(cost(places, loads) for places in cuts) == [100.0, 100.0]
    # evenly by cost does not fit here, tightly does
    tight = [[Load(6, 1.0), Load(6, 1.0), Load(4, 9.0), Load(4, 9.0)]]
    (cuts,) = deal(tight, 10)
    assert [sum(tight[0][p.number].tokens for p in places) for places in cuts] == [10, 10]


def test_a_rank_with_too_few_groups_runs_along():
    dealt = deal([[Load(100, 100.0)], [Load(60, 35.0), Load(60, 34.0), Load(60, 33.0)]], 100)
    assert [len(cuts) for cuts in dealt] == [3, 3]
    assert [[len(places) for places in cuts] for cuts in dealt] == [[1, 0, 0], [1, 1, 1]]


def test_every_rank_gets_the_same_answer():
    loads = [[Load(10, 10.0)] * 5, [Load(10, 10.0)] * 3]
    assert deal(loads, 20) == deal([list(mine) for mine in loads], 20)


def test_a_group_beyond_the_budget_is_named():
    with pytest.raises(ValueError, match="group 1 of rank 0: 11 tokens, budget 10"):
        deal([[Load(5, 5.0), Load(11, 11.0)]], 10)
