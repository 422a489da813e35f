"""The best one-to-one matching of two small sets, on the CPU (Kuhn 1955; with potentials, O(n^2 m))."""

from collections.abc import Sequence


def best_total(scores: Sequence[Sequence[float]]) -> float:
    """Largest sum of scores over the one-to-one matchings of rows to columns that match the smaller side whole."""
    if not scores or not scores[0]:
        return 0.0
    if len(scores) > len(scores[0]):
        scores = list(zip(*scores, strict=True))
    n, m = len(scores), len(scores[0])
    row_price, column_price = [0.0] * n, [0.0] * (m + 1)
    owner = [-1] * (m + 1)  # the row that a column is matched to; column m is where a new row comes in
    for row in range(n):
        owner[m], at = row, m
        least, before, reached = [float("inf")] * m, [m] * m, [False] * (m + 1)
        while owner[at] >= 0:
            reached[at] = True
            holder = owner[at]
            for column in range(m):
                if not reached[column]:
                    reduced = -scores[holder][column] - row_price[holder] - column_price[column]
                    if reduced < least[column]:
                        least[column], before[column] = reduced, at
            at = min((column for column in range(m) if not reached[column]), key=least.__getitem__)
            step = least[at]
            for column in range(m + 1):
                if reached[column]:
                    row_price[owner[column]] += step
                    column_price[column] -= step
                elif column < m:
                    least[column] -= step
        while at != m:
            owner[at] = owner[before[at]]
            at = before[at]
    return sum(scores[owner[column]][column] for column in range(m) if owner[column] >= 0)
