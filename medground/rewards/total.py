"""The reward of a completion: the weighted sum of its rewards, each kept by itself as well.

    total = sum over kinds of weight * reward

Format and spatial reward are always computed, whatever they weigh, since they are told in every step's metrics; the
others where they weigh something.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medground.config import RewardConfig, Template
from medground.records import Answer, Example, Group
from medground.rewards.batch import Batch, batch_of
from medground.rewards.curriculum import Curriculum
from medground.rewards.custom import custom_reward, load_custom
from medground.rewards.encoders import Encoder, load_encoder
from medground.rewards.format import format_reward
from medground.rewards.length import length_reward
from medground.rewards.semantic import prior_of, semantic_reward
from medground.rewards.spatial import answer_giou, answer_iou, spatial_reward


class Rewards(NamedTuple):
    """What B groups of G completions earned; all [B, G], float32, on the CPU.

    Attributes:
        total: the weighted sum.
        parts: each reward before its weight, by name.
        weights: of each part, by name.
        iou: of each answer, whatever the rewards.
    """

    total: Tensor
    parts: dict[str, Tensor]
    weights: dict[str, float]
    iou: Tensor

    @property
    def spread(self) -> Tensor:
        """[B], whether the completions of a group earned different totals: by a mean, nobody could tell."""
        return self.total.amax(1) > self.total.amin(1)

    def and_of(self, more: "Rewards") -> "Rewards":
        """These and those of further groups of the same step."""
        parts = {name: torch.cat([part, more.parts[name]]) for name, part in self.parts.items()}
        return Rewards(torch.cat([self.total, more.total]), parts, self.weights, torch.cat([self.iou, more.iou]))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The parts that weigh something, [B, G, K], and their weights [K]."""
        names = [name for name, weight in self.weights.items() if weight]
        return torch.stack([self.parts[name] for name in names], -1), torch.tensor([self.weights[n] for n in names])


class Scorer:
    """Scores a step's completions; holds what outlasts a step: the curriculum, the encoder, a user's function."""

    def __init__(
        self,
        config: RewardConfig,
        template: Template,
        max_new_tokens: int,
        device: torch.device | str = "cpu",
        examples: Sequence[Example] = (),
        encoder: Encoder | None = None,
    ) -> None:
        """Set it up.

        Args:
            config: weights and kinds.
            template: that completions answer to.
            max_new_tokens: the token limit of completions.
            device: where boxes are compared and crops encoded.
            examples: the training records, from which the semantic reward knows its categories.
            encoder: the configuration's, where it is loaded already.

        Raises:
            ValueError: the user's function or the encoder cannot be loaded.
        """
        self._config, self._template, self._limit, self._device = config, template, max_new_tokens, device
        self._curriculum = Curriculum(config)
        self._custom = load_custom(config.custom) if config.custom else None
        self._encoder = (encoder or load_encoder(config.encoder, device)) if config.semantic_weight else None
        self._prior = prior_of(examples)

    def __call__(self, groups: Sequence[Group], answers: Sequence[Sequence[Answer]]) -> Rewards:
        """Score groups of this rank.

        Args:
            groups: B prompts with G completions each.
            answers: what they say, boxes in original pixels.
        """
        batch, c = batch_of(groups, answers), self._config
        iou = answer_iou(answers, batch.truths, self._device)
        overlap = answer_giou(answers, batch.truths, self._device) if c.spatial == "giou" else iou
        parts = {
            "format": format_reward(answers, self._template),
            "spatial": spatial_reward(overlap, c, self._curriculum.threshold).cpu(),
        }
        parts |= self._others(batch)
        weights = {name: getattr(c, f"{name}_weight") for name in parts}
        total = sum((weights[name] * part for name, part in parts.items()), torch.zeros(batch.shape))
        return Rewards(total, parts, weights, iou.cpu())

    def _others(self, batch: Batch) -> dict[str, Tensor]:
        parts = {}
        if self._encoder:
            parts["semantic"] = semantic_reward(batch, self._encoder, self._config, self._prior)
        if self._config.length_weight:
            parts["length"] = length_reward(batch.lengths, self._limit, self._config.length_buffer)
        if self._custom:
            parts["custom"] = custom_reward(self._config.custom, self._custom, batch)
        return parts

    @property
    def threshold(self) -> float | None:
        """The curriculum's threshold; None without one."""
        return self._curriculum.threshold if self._config.spatial == "curriculum" else None

    def observe(self, groups: Sequence[tuple[float, float]]) -> None:
        """Let the curriculum see a step's groups of all ranks: mean spatial reward and mean IoU of each."""
        if self.threshold is not None:
            self._curriculum.observe(groups)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, as JSON values; empty without a curriculum."""
        return {} if self.threshold is None else {"curriculum": self._curriculum.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; other values are passed over."""
        if self.threshold is not None and "curriculum" in state:
            self._curriculum.load(state["curriculum"])


def group_means(rewards: Rewards) -> list[tuple[float, float]]:
    """Mean spatial reward and mean IoU of each group, for `Scorer.observe`."""
    pairs = torch.stack([rewards.parts["spatial"].double().mean(1), rewards.iou.double().mean(1)], 1)
    return [(reward, iou) for reward, iou in pairs.tolist()]
