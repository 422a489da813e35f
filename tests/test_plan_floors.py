"""Floors by hand, and rows that wait for slots."""

from medground.costs import Sizes
from medground.plan.floors import Decoding, Model, Rates, decode_bytes, decoding, floors

MODEL = Model(parameters=1000, refresh_bytes=6000, weights=100, itemsize=2, token_bytes=10)
GROUPS = [Sizes(5, [], [1, 4]), Sizes(2, [], [3, 2])]


def test_floors_by_hand():
    # three steps of the weights; 5 tokens of prompt in 3 steps, 2 in 2; rows' own: 0, 1 + 2 + 3, 1 + 2, 1
    assert decode_bytes(MODEL, GROUPS) == 3 * 100 * 2 + 10 * (15 + 4 + 6 + 3 + 1)
    operations = {"prefill": 10.0, "decode": 40.0, "score": 0.0, "update": 30.0}
    found = floors(MODEL, GROUPS, operations, Rates(copy=100.0, product=10.0))
    assert found == {"prefill": 1, "decode": 8.9 + 60, "score": 0, "update": 3, "optimizer": 320}
    assert floors(MODEL, GROUPS, operations, Rates(copy=100.0, product=1.0))["decode"] == 40 + 60


def test_rows_wait_for_slots():
    # of steps 0 3 2 1: with two slots the first ends at once, its slot takes the third; the fourth follows that one
    assert decoding(GROUPS) == Decoding(3, 15 + 4 + 10) == decoding(GROUPS, 4) == decoding(GROUPS, 3)
    # second row 0 to 3, third 0 to 2, fourth 2 to 3: its prompt is read in 3 steps, in place of 2
    assert decoding(GROUPS, 2) == Decoding(3, 15 + 6 + 10)
    assert decoding(GROUPS, 1) == Decoding(6, 15 + 6 + 10)
    assert decoding([Sizes(7, [], [3]), Sizes(7, [], [3])], 1) == Decoding(4, 28 + 6)
