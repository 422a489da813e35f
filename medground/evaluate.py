"""Greedy answers of a policy to held-out records, with the true images or with other patients'."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from medground.config import Config
from medground.datasets.images import read_image
from medground.policy import Policy
from medground.prompts import Processor, make_prompt, parse_answer, to_original
from medground.records import Answer, Example, Group, Prompt
from medground.rollout import roll_out
from medground.scoring import Prediction
from medground.sharding import Ranks, gathered


@dataclass(frozen=True)
class Asker:
    """A policy with what it takes to ask it: processor, data folder, wording, limits."""

    policy: Policy
    processor: Processor
    config: Config
    ranks: Ranks

    def prompt(self, example: Example, image: str | None = None) -> Prompt:
        """The question about an example, on its own image or on another one of the data folder."""
        picture = read_image(Path(self.config.data.path) / (image or example.image))
        return make_prompt(example, picture, self.processor, self.config.prompt.template)


def evaluate(asker: Asker, examples: Sequence[Example], *, shuffled: bool = False, title: str = "") -> list[Prediction]:
    """Ask about every example; every rank must call it, each does its share.

    Args:
        asker: the policy and how it is asked.
        examples: the records.
        shuffled: show each phrase with another patient's image, a control of whether the model looks.
        title: of the progress bar.

    Returns:
        A prediction per example, in their order, on every rank.
    """
    ranks, size = asker.ranks, asker.config.evaluation.batch_size
    shown = _other_images(examples) if shuffled else [example.image for example in examples]
    mine = list(zip(examples, shown, strict=True))[ranks.rank :: ranks.size]
    predictions = []
    with gathered(asker.policy), tqdm(total=len(mine), desc=title, disable=not ranks.is_first, leave=False) as bar:
        for start in range(0, len(mine), size):
            prompts = [asker.prompt(example, image) for example, image in mine[start : start + size]]
            groups = roll_out(
                asker.policy,
                asker.processor.tokenizer,
                prompts,
                copies=1,
                max_new_tokens=asker.config.rollout.max_new_tokens,
                temperature=0.0,
            )
            predictions += [_prediction(group, image) for group, (_, image) in zip(groups, mine[start:], strict=False)]
            bar.update(len(prompts))
    shares = ranks.gather(predictions)
    return [shares[i % ranks.size][i // ranks.size] for i in range(len(examples))]


def read_answer(text: str, prompt: Prompt) -> Answer:
    """A completion's answer, its boxes in original pixels."""
    answer = parse_answer(text)
    if answer.boxes is None:
        return answer
    return Answer(tuple(to_original(box, prompt) for box in answer.boxes), answer.well_formed)


def _prediction(group: Group, image: str) -> Prediction:
    example, rollout = group.prompt.example, group.rollouts[0]
    return Prediction(
        id=example.id,
        image=image,
        width=example.width,
        height=example.height,
        phrase=example.phrase,
        category=example.category,
        patient=example.patient,
        truth=example.boxes,
        boxes=read_answer(rollout.text, group.prompt).boxes,
        completion=rollout.text,
        logp=float(rollout.logp.sum()),
    )


def _other_images(examples: Sequence[Example]) -> list[str]:
    n = len(examples)
    others = []
    for i, example in enumerate(examples):
        # half the list away: neighbours may share a film
        candidates = (examples[(i + n // 2 + k) % n] for k in range(n))
        other = next((c for c in candidates if c.patient != example.patient), None)
        if other is None:
            raise ValueError(f"shuffled images: want records of two patients or more; got only {example.patient}")
        others.append(other.image)
    return others
