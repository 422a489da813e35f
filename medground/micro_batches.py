"""Who trains on which groups together: micro-batches within a token budget, as many on every rank.

The loss is normalised over all ranks and micro-batches, so how groups are dealt out changes time and memory, and of
the result the order of float sums alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_WORTH_MOVING = 0.02  # of a rank's mean cost; less is not worth sending a group and its images


class Load(NamedTuple):
    """What a group takes: tokens of the stream, and the work, in tokens too, its image's included."""

    tokens: int
    cost: float


class Place(NamedTuple):
    """A group: the rank that sampled it, and which of its groups it is."""

    home: int
    number: int


def deal(loads: Sequence[Sequence[Load]], budget: int) -> list[list[list[Place]]]:
    """Deal groups out to ranks and cut each rank's into micro-batches; every rank that asks gets the same answer.

    Args:
        loads: of each rank's groups, one or more a rank.
        budget: most tokens in a micro-batch.

    Returns:
        For each rank, equally many micro-batches; costly ones first, so that ranks work on alike ones at a time. One
        may be empty where a rank has too few groups.

    Raises:
        ValueError: a group is larger than the budget.
    """
    load_of = {Place(r, i): load for r, mine in enumerate(loads) for i, load in enumerate(mine)}
    for place, load in load_of.items():
        if load.tokens > budget:
            raise ValueError(f"group {place.number} of rank {place.home}: {load.tokens} tokens, budget {budget}")
    owned = [[Place(r, i) for i in range(len(mine))] for r, mine in enumerate(loads)]
    _even_out(owned, load_of)
    fewest = [_first_fit(places, load_of, budget) for places in owned]
    count = max(len(bins) for bins in fewest)
    return [
        sorted(
            _spread(places, load_of, budget, count) or bins + [[] for _ in range(count - len(bins))],
            key=lambda places: -sum(load_of[p].cost for p in places),
        )
        for places, bins in zip(owned, fewest, strict=True)
    ]


def _even_out(owned: list[list[Place]], load_of: dict[Place, Load]) -> None:
    """Move groups, one at a time, from the busiest rank to the idlest while that saves time."""
    costs = [sum(load_of[p].cost for p in places) for places in owned]
    least = _WORTH_MOVING * sum(costs) / len(costs)
    while True:
        busiest, idlest = max(range(len(costs)), key=costs.__getitem__), min(range(len(costs)), key=costs.__getitem__)
        gap = costs[busiest] - costs[idlest]
        best = min(owned[busiest], key=lambda p: abs(load_of[p].cost - gap / 2), default=None)
        if best is None or min(load_of[best].cost, gap - load_of[best].cost) <= least:
            return
        owned[busiest].remove(best)
        owned[idlest].append(best)
        costs[busiest] -= load_of[best].cost
        costs[idlest] += load_of[best].cost


def _first_fit(places: list[Place], load_of: dict[Place, Load], budget: int) -> list[list[Place]]:
    """Few micro-batches: each group, largest first, into the first that has room."""
    bins: list[list[Place]] = []
    left: list[int] = []
    for place in sorted(places, key=lambda p: -load_of[p].tokens):
        tokens = load_of[place].tokens
        at = next((i for i, room in enumerate(left) if room >= tokens), len(bins))
        if at == len(bins):
            bins.append([])
            left.append(budget)
        bins[at].append(place)
        left[at] -= tokens
    return bins


def _spread(places: list[Place], load_of: dict[Place, Load], budget: int, count: int) -> list[list[Place]] | None:
    """`count` micro-batches of even cost: each group, costliest first, into the cheapest that has room for it."""
    bins: list[list[Place]] = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for place in sorted(places, key=lambda p: -load_of[p].cost):
        fitting = [i for i in range(count) if tokens[i] + load_of[place].tokens <= budget]
        if not fitting:
            return None
        at = min(fitting, key=costs.__getitem__)
        bins[at].append(place)
        tokens[at] += load_of[place].tokens
        costs[at] += load_of[place].cost
    return bins
