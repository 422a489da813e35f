"""Greedy answers of a policy to held-out records, with the true images or with other patients'."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from medground.answers import parse_answer
from medground.augmentation import mirror_box
from medground.config import Config
from medground.controls import questions
from medground.job.interruption import Interruption
from medground.loading import Loader, Question
from medground.policy import Policy
from medground.prompts import to_original
from medground.records import Answer, Example, Group, Prompt
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine
from medground.scoring import Prediction
from medground.sharding import Ranks, WholeCopy


@dataclass(frozen=True)
class Asker:
    """A policy with what it takes to ask it: weights to decode with, an engine, and what makes prompts.

    `interruption` may end a roll-out early; whoever asked has to see whether it did (`Interruption.agree`).
    """

    policy: Policy
    whole: WholeCopy
    engine: Engine
    loader: Loader
    config: Config
    ranks: Ranks
    interruption: Interruption = field(default_factory=Interruption)

    def stop(self) -> bool:
        """Whether a roll-out is to end; says that it moves, too."""
        self.ranks.progress.tick()
        return self.interruption.requested is not None


def evaluate(asker: Asker, examples: Sequence[Example], *, shuffled: bool = False, title: str = "") -> list[Prediction]:
    """Ask about every example; every rank must call it, each does its share.

    Args:
        asker: the policy and how it is asked.
        examples: the records.
        shuffled: show each phrase with another patient's image, a control of whether the model looks.
        title: of the progress bar.

    Returns:
        A prediction per example, in their order, on every rank.

    Raises:
        InterruptedRun: a signal asked some rank to end.
    """
    ranks = asker.ranks
    ranks.progress.now("evaluation", f"{len(examples)} records, {title}")
    mine = questions(examples, "shuffled" if shuffled else "true")[ranks.rank :: ranks.size]
    predictions: list[Prediction | None] = [None] * len(mine)
    asker.whole.refresh()
    with (
        tqdm(total=len(mine), desc=title, disable=not ranks.is_first, leave=False) as bar,
        closing(asker.loader(mine)) as prompts,
    ):
        sampling = Sampling(0.0)
        answers = asker.engine.roll_out(prompts, count=len(mine), copies=1, sampling=sampling, bar=bar, stop=asker.stop)
        for number, group in answers:
            [predictions[number]] = predictions_of(mine[number], group)
    asker.interruption.agree(ranks)
    shares = ranks.gather(predictions)
    return [shares[i % ranks.size][i // ranks.size] for i in range(len(examples))]


def predictions_of(question: Question, group: Group) -> list[Prediction]:
    """One for each completion; of a mirrored film, boxes are where they are on the film itself."""
    example, found = question.example, []
    for number, rollout in enumerate(group.rollouts):
        answer = read_answer(rollout.text, group.prompt)
        if question.change == "flipped":
            answer = _mirrored(answer, example.width)
        found.append(
            Prediction(
                id=example.id,
                image=question.image or example.image,
                width=example.width,
                height=example.height,
                phrase=example.phrase,
                category=example.category,
                patient=example.patient,
                truth=example.boxes,
                boxes=answer.boxes,
                completion=rollout.text,
                logp=float(rollout.logp.sum()),
                thought_boxes=answer.thought_boxes,
                sample=number if len(group.rollouts) > 1 else None,
            )
        )
    return found


def read_answer(text: str, prompt: Prompt) -> Answer:
    """A completion's answer, its boxes in original pixels."""
    answer = parse_answer(text)
    boxes = None if answer.boxes is None else tuple(to_original(box, prompt) for box in answer.boxes)
    thoughts = tuple(to_original(box, prompt) for box in answer.thought_boxes)
    return replace(answer, boxes=boxes, thought_boxes=thoughts)


def _mirrored(answer: Answer, width: int) -> Answer:
    boxes = None if answer.boxes is None else tuple(mirror_box(box, width) for box in answer.boxes)
    return replace(answer, boxes=boxes, thought_boxes=tuple(mirror_box(box, width) for box in answer.thought_boxes))
