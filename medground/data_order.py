"""The endless order in which training asks about its records: an exact function of (seed, position).

Position p of step s is s * B + p: so a step's number is all that a checkpoint has to hold, and neither ranks nor
workers change the order. Each epoch is a permutation of its own; no record is left out. Where an epoch ends within a
step, a record may stand twice in it, and draws the same completions twice.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from medground.records import Example


class DataOrder:
    """`order[position]` is the record that is asked about there."""

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples = examples
        self.seed = seed

    def __getitem__(self, position: int) -> Example:
        epoch, index = divmod(position, len(self.examples))
        return self.examples[_permutation(len(self.examples), self.seed, epoch)[index]]


@lru_cache(maxsize=8)  # a step may lie in two epochs
def _permutation(n: int, *seeds: int) -> NDArray[np.int64]:
    return np.random.default_rng(seeds).permutation(n)
