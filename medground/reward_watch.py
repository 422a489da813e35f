"""Whether rewards still mean what they are for, step by step: sizes of boxes, rank correlation with IoU, divergence.

Over the newest 2 WINDOW steps let dr and di be how much the mean of the second half lies above that of the first, of
the step's mean reward and of its mean IoU, and se the standard error of such a difference, from the spread of the steps
within either half. Reward and IoU part where

    dr > BOUND * se(dr)    and    di < -BOUND * se(di)

that is where the reward rises while the IoU falls, both by more than steps differ anyway. After a warning the window
starts anew, so that one turn is told once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from medground.records import Answer, Group

if TYPE_CHECKING:
    from medground.rewards.total import Rewards
    from medground.sharding import Ranks

WINDOW = 10
BOUND = 3.0
WHOLE, TINY = 0.9, 0.001
"""Shares of the image above which a box is the whole image, and below which it is tiny."""


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's: that of the ranks of two columns of equally many numbers, ties sharing their mean rank.

    Returns:
        -1..1; None where a column is constant or there are fewer than two numbers.
    """
    x, y = _ranks(np.asarray(a, np.float64)), _ranks(np.asarray(b, np.float64))
    if not len(x) or not x.std() or not y.std():
        return None
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def answer_metrics(
    groups: Sequence[Group], answers: Sequence[Sequence[Answer]], rewards: Rewards, ranks: Ranks
) -> dict[str, float | None]:
    """How large a step's boxes are and how its rewards go with IoU, over all ranks; every rank must call it.

    Args:
        groups: of this rank, as are the next two.
        answers: what they say, boxes in original pixels, within the image.
        rewards: what they earned.
        ranks: to add up over.

    Returns:
        `box_area`, `whole_boxes`, `tiny_boxes` and `reward_iou_corr` (docs/run_folder.md); None where there is no box,
        or no spread to go with.
    """
    shares = [
        max(x2 - x1, 0.0) * max(y2 - y1, 0.0) / (group.prompt.example.width * group.prompt.example.height)
        for group, said in zip(groups, answers, strict=True)
        for answer in said
        for x1, y1, x2, y2 in answer.boxes or ()
    ]
    mine = (len(shares), sum(shares), sum(s > WHOLE for s in shares), sum(s < TINY for s in shares))
    pairs = torch.stack([rewards.total, rewards.iou], -1).flatten(0, -2).tolist()
    gathered = ranks.gather((mine, pairs))
    boxes, area, whole, tiny = (sum(column) for column in zip(*(counts for counts, _ in gathered), strict=True))
    paid, iou = zip(*itertools.chain.from_iterable(found for _, found in gathered), strict=True)
    return {
        "box_area": float(area / boxes) if boxes else None,
        "whole_boxes": whole / boxes if boxes else None,
        "tiny_boxes": tiny / boxes if boxes else None,
        "reward_iou_corr": rank_correlation(paid, iou),
    }


class RewardWatch:
    """Looks back over steps; the same on every rank, which all see the same means."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, float]] = []  # mean reward and mean IoU, the newest last

    def observe(self, reward: float, iou: float) -> str:
        """Take in a step's means of all ranks.

        Returns:
            A warning, or "".
        """
        self._steps = [*self._steps, (reward, iou)][-2 * WINDOW :]
        if len(self._steps) < 2 * WINDOW:
            return ""
        (rose, noise), (gained, blur) = (_change(column) for column in zip(*self._steps, strict=True))
        if not (rose > BOUND * noise and gained < -BOUND * blur):
            return ""
        self._steps = []
        return (
            f"the reward rises while the IoU falls: over {2 * WINDOW} steps {rose:+.3f} +- {noise:.3f} and "
            f"{gained:+.3f} +- {blur:.3f}; see this step's samples for what earns it"
        )

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON values."""
        return {"reward_watch": [list(pair) for pair in self._steps]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; other values are passed over."""
        self._steps = [(reward, iou) for reward, iou in state.get("reward_watch", ())]


def _change(column: Sequence[float]) -> tuple[float, float]:
    """How far the second half's mean lies above the first's, and its standard error."""
    first, second = column[:WINDOW], column[WINDOW:]
    return fmean(second) - fmean(first), math.sqrt((variance(first) + variance(second)) / WINDOW)
