"""Theory of a curve: what its growth should be, and whether what was measured grows faster.

    seconds = calls * overhead + operations / rate,    overhead >= 0, rate > 0

fitted by least squares of the relative errors. Growth is the slope of log seconds over log size, on the upper half of
an axis, where overhead counts least; theory's is that of the operations, which overhead can only make flatter. The
measured one comes with an interval, from rounds drawn with replacement.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

TOLERANCE = 0.1
"""Of a slope: a size that doubles may cost 7 % more than theory says before it counts as faster growth."""
TELLING = 1.2
"""Operations of a call differ at least so many times where overhead can be told from them; it is 0 where they don't."""
DRAWS = 1000


class Fit(NamedTuple):
    """Seconds of a call beside its operations, and operations a second (infinite where they do not show)."""

    overhead: float
    rate: float

    def seconds(self, calls: ArrayLike, operations: ArrayLike) -> NDArray:
        return np.asarray(calls) * self.overhead + np.asarray(operations) / self.rate


class Growth(NamedTuple):
    """Slopes: measured, with the interval that holds it in 95 % of draws, and theory's."""

    measured: float
    low: float
    high: float
    theory: float

    @property
    def is_faster(self) -> bool:
        """Whether it is beyond theory's by more than tolerance and chance."""
        return self.low > self.theory + TOLERANCE


def steady(samples: ArrayLike) -> NDArray:
    """Samples [points, rounds] as they would be had the machine been as fast in every round as it mostly was.

    How slow a round was is the median over points of its samples over each point's own median: all points share it.
    """
    samples = np.asarray(samples, float)
    return samples / np.median(samples / np.median(samples, axis=1, keepdims=True), axis=0)


def fit_costs(seconds: ArrayLike, calls: ArrayLike, operations: ArrayLike) -> Fit:
    """Overhead and rate of [points] measurements."""
    seconds, calls, operations = (np.asarray(x, float) for x in (seconds, calls, operations))
    per_call = operations / calls
    if per_call.max() < TELLING * per_call.min():
        return Fit(0.0, one_rate(seconds, operations))
    columns = np.stack([calls, operations / operations.max()], 1) / seconds[:, None]
    ones = np.ones(len(seconds))
    both = np.linalg.lstsq(columns, ones)[0]
    alone = [np.eye(2)[i] * columns[:, i].sum() / np.square(columns[:, i]).sum() for i in range(2)]
    # where the best has a negative part, the best of those that have none lacks that part
    allowed = [both] if (both >= 0).all() else alone
    overhead, most = min(allowed, key=lambda x: np.square(columns @ x - 1).sum())
    return Fit(float(overhead), float(operations.max() / most) if most else float("inf"))


def one_rate(seconds: ArrayLike, operations: ArrayLike) -> float:
    """Operations a second, were there no overhead."""
    share = np.asarray(operations, float) / np.asarray(seconds, float)
    return float(np.square(share).sum() / share.sum())


def slope(values: ArrayLike, costs: ArrayLike) -> NDArray:
    """Growth of costs [..., points] over the upper half of the values [points], two or more."""
    points = len(np.asarray(values))
    upper = min(points // 2, points - 2)
    x, y = np.log(np.asarray(values, float))[upper:], np.log(np.asarray(costs, float))[..., upper:]
    x = x - x.mean()
    return y @ x / (x @ x)


def compare_growth(values: Sequence[int], samples: ArrayLike, operations: Sequence[float]) -> Growth:
    """Of the medians over rounds of samples [points, rounds]."""
    samples = np.asarray(samples, float)
    rounds = samples.shape[1]
    drawn = np.random.default_rng(0).integers(rounds, size=(DRAWS, rounds))
    slopes = slope(values, np.median(samples[:, drawn], axis=2).T)
    low, high = np.quantile(slopes, (0.025, 0.975))
    measured = slope(values, np.median(samples, axis=1))
    return Growth(float(measured), float(low), float(high), float(slope(values, operations)))


def judge(points: Sequence[dict[str, Any]], phase: str) -> dict[str, Any]:
    """A phase over an axis, as JSON has it: steady samples, medians, fit, the point farthest from it, growth."""
    values = [point["value"] for point in points]
    samples = steady([point["seconds"][phase] for point in points])
    calls, operations = ([point[name][phase] for point in points] for name in ("calls", "operations"))
    seconds = np.median(samples, axis=1)
    fit = fit_costs(seconds, calls, operations)
    fitted = fit.seconds(calls, operations)
    worst = int(np.abs(np.log(seconds / fitted)).argmax())
    growth = compare_growth(values, samples, operations)
    return {
        "seconds": seconds.tolist(),
        "samples": samples.tolist(),
        "fitted": fitted.tolist(),
        "overhead": fit.overhead,
        "rate": None if np.isinf(fit.rate) else fit.rate,
        "worst": {"value": values[worst], "ratio": float(seconds[worst] / fitted[worst])},
        "growth": growth._asdict() | {"is_faster": growth.is_faster},
    }
