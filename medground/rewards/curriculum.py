"""The threshold of the spatial reward `curriculum`, raised as the policy improves.

After MedLoc-R1 (arXiv:2603.28120): a binary reward at an IoU threshold tau that goes from 0.3 to 0.8. Over the newest
`window` groups let r be the mean reward of each and i the mean IoU of each; tau is raised once

    mean r >= reward,    std r <= spread,    mean i - tau >= 0.10

by 0.15, then 0.10, then 0.05 every time, and the older half of the window is forgotten. Theirs, as a third party noted
it down: the range, the window of 30, the margin, the increments and the half window. How they choose the bounds on
mean and spread for each tau is not known to us; `reward` and `spread` are constants here.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from medground.config import RewardConfig

MARGIN = 0.10
RISES = (0.15, 0.10, 0.05)


class Curriculum:
    """Where the threshold is; the same on every rank, which all see the same groups."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.threshold = config.curriculum_start
        self._raised = 0
        self._window: list[tuple[float, float]] = []  # mean reward and mean IoU of groups, the newest last

    def observe(self, groups: Sequence[tuple[float, float]]) -> None:
        """Take in a step's groups, of all ranks: mean reward and mean IoU of each, scored under `threshold`."""
        c = self._config
        self._window = [*self._window, *groups][-c.curriculum_window :]
        if len(self._window) < c.curriculum_window or self.threshold >= c.curriculum_end:
            return
        rewards, ious = zip(*self._window, strict=True)
        # a mean of float32 numbers is a rounding off what it stands for
        ready = fmean(rewards) >= c.curriculum_reward - 1e-6 and pstdev(rewards) <= c.curriculum_spread + 1e-6
        if ready and fmean(ious) - self.threshold >= MARGIN - 1e-6:
            rise = RISES[min(self._raised, len(RISES) - 1)]
            self.threshold = min(round(self.threshold + rise, 6), c.curriculum_end)
            self._raised += 1
            self._window = self._window[-(c.curriculum_window // 2) :]

    def state(self) -> dict[str, Any]:
        """All there is to know, as JSON values."""
        return {"threshold": self.threshold, "raised": self._raised, "window": [list(pair) for pair in self._window]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.threshold, self._raised = state["threshold"], state["raised"]
        self._window = [(reward, iou) for reward, iou in state["window"]]
