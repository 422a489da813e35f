"""Connected parts of a mask -> their boxes, without a library of image processing."""

import numpy as np
from numpy.typing import NDArray


def component_boxes(mask: NDArray[np.bool_]) -> list[tuple[tuple[int, int, int, int], int]]:
    """The 8-connected components of a mask.

    Args:
        mask: [rows, columns].

    Returns:
        (x1, y1, x2, y2) in pixel edges (a single pixel is 1 wide) and the number of pixels of each component, largest
        first, equals from the top and the left.
    """
    runs = _runs(mask)
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first = 0  # of the runs that may touch the one at hand: those of the row above, and of its own
    for i, (row, start, _) in enumerate(runs):
        while runs[first][0] < row - 1:
            first += 1
        for j in range(first, i):
            above, left, right = runs[j]
            if above == row or left > runs[i][2]:
                break
            if right >= start:  # ends are exclusive: touching at a corner counts
                parent[root(j)] = root(i)
    found: dict[int, tuple[tuple[int, int, int, int], int]] = {}
    for i, (row, start, end) in enumerate(runs):
        (x1, y1, x2, y2), pixels = found.get(root(i), ((start, row, end, row + 1), 0))
        found[root(i)] = (min(x1, start), min(y1, row), max(x2, end), max(y2, row + 1)), pixels + end - start
    return sorted(found.values(), key=lambda one: (-one[1], one[0][1], one[0][0]))


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(row, first column, column after the last) of each run of set pixels, row by row."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
