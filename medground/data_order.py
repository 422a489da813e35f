"""The endless order in which training asks about its records: an exact function of (seed, position).

Position p of step s is s * B + p: so a step's number is all that a checkpoint has to hold, and neither ranks nor
workers change the order. Each epoch is a permutation of its own; no record is left out. Where an epoch ends within a
step, a record may stand twice in it, and draws the same completions twice.

Data sets with weights go through epochs of their own. Which of them a position belongs to is decided between the first
and all others, then between the second and those after it, and so on: of n positions, floor(n * share) are the first's
(a Beatty sequence), so that any window has every data set in its share, to within a record for each decision.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from medground.records import Example


class DataOrder:
    """`order[position]` is the record that is asked about there."""

    def __init__(self, parts: Sequence[Sequence[Example]], seed: int, weights: Sequence[float] = ()):
        """Lay the order out.

        Args:
            parts: the training records of each data set.
            seed: of the run.
            weights: > 0, of each data set: its share of the positions, over their sum; one alone needs none.
        """
        exact = [Fraction(str(weight)) for weight in weights or [1]]
        assert all(parts) and len(exact) == len(parts) and min(exact) > 0
        self._parts, self._seed = parts, seed
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]

    def __len__(self) -> int:
        """How many records there are."""
        return sum(map(len, self._parts))

    def __getitem__(self, position: int) -> Example:
        source, index = self._source(position)
        part = self._parts[source]
        epoch, place = divmod(index, len(part))
        return part[int(_permutation(len(part), self._seed, source, epoch)[place])]

    def _source(self, position: int) -> tuple[int, int]:
        """Whose a position is, and which of its records, counted from 0."""
        for source, share in enumerate(self._shares):
            before = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > before:
                return source, before
            position -= before
        raise AssertionError("the last share is 1")


@lru_cache(maxsize=64)  # a step may lie in two epochs of each data set
def _permutation(n: int, *seeds: int) -> NDArray[np.int64]:
    return np.random.default_rng(seeds).permutation(n)
