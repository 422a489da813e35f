"""A step's completions as rewards see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from medground.records import Answer, Box, Example, Group, Prompt


class Batch(NamedTuple):
    """B prompts with G completions each.

    Attributes:
        prompts: [B], what was asked; `example` is the record, `pixel_values` the image as the model saw it.
        texts: [B][G], the completions, without the stop token.
        answers: [B][G], what they say, boxes in original pixels.
        lengths: [B][G], tokens, the stop token included.
        finished: [B][G], False where a completion was cut at the token limit.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[Sequence[str]]
    answers: Sequence[Sequence[Answer]]
    lengths: Sequence[Sequence[int]]
    finished: Sequence[Sequence[bool]]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, G)."""
        return len(self.answers), len(self.answers[0])

    @property
    def examples(self) -> list[Example]:
        """[B], the records."""
        return [prompt.example for prompt in self.prompts]

    @property
    def truths(self) -> list[tuple[Box, ...]]:
        """[B], the true boxes in original pixels; none where the image does not show the phrase."""
        return [prompt.example.boxes for prompt in self.prompts]

    @property
    def original_sizes(self) -> list[tuple[int, int]]:
        """[B], (width, height) of the image files."""
        return [(prompt.example.width, prompt.example.height) for prompt in self.prompts]

    @property
    def processed_sizes(self) -> list[tuple[int, int]]:
        """[B], (width, height) of the images as the model saw them."""
        return [(prompt.processed_width, prompt.processed_height) for prompt in self.prompts]


def batch_of(groups: Sequence[Group], answers: Sequence[Sequence[Answer]]) -> Batch:
    """A step's groups and what they answered, boxes in original pixels."""
    return Batch(
        prompts=[group.prompt for group in groups],
        texts=[[rollout.text for rollout in group.rollouts] for group in groups],
        answers=answers,
        lengths=[[len(rollout.tokens) for rollout in group.rollouts] for group in groups],
        finished=[[rollout.finished for rollout in group.rollouts] for group in groups],
    )
