"""Semantic reward: whether the crop of a predicted box looks like its phrase to a frozen medical image-text encoder.

    cosine     max(0, cos(crop, phrase))
    contrast   a(box) (1 + q(crop) - q(whole image)) / 2,
               q(x) = softmax over phrase, other phrases, "no " + phrase of  scale * cos(x, .), at the phrase
               a(box) = min(1, area / low, high / area)

cosine is MedGround-R1's (arXiv:2507.02994), a box that is none earning 0; as such a box should earn no more than any
other, negative cosines are 0 here, too. contrast asks what a cosine cannot: whether the crop fits this phrase better
than other findings', whether it says more than the whole image does (which earns 1/2 at most), and whether it is as
large as boxes of its category are: low and high are the 5 % and 95 % quantiles of the training boxes' shares of their
images. Other phrases are the commonest of each other category of the training records, the same on every rank and at
every step.

Of several boxes the reward is the mean; a box that stands in an answer twice earns nothing the second time. An answer
without a box that has an area within the image earns 0, but for a phrase that the image does not show: there no box
earns 1, any box 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from medground.config import RewardConfig
from medground.records import Box, Example
from medground.rewards.batch import Batch
from medground.rewards.crops import crops_of, images_of, squares
from medground.rewards.encoders import Encoder


class Prior(NamedTuple):
    """What the training records say of a category, by its name.

    Attributes:
        phrases: the commonest phrase.
        areas: 5 % and 95 % quantiles of the share of its image that a box takes.
    """

    phrases: dict[str, str]
    areas: dict[str, tuple[float, float]]


def prior_of(examples: Sequence[Example]) -> Prior:
    """Count the training records."""
    phrases: dict[str, Counter[str]] = {}
    shares: dict[str, list[float]] = {}
    for example in examples:
        if example.boxes:
            phrases.setdefault(example.category, Counter())[example.phrase] += 1
            image = example.width * example.height
            shares.setdefault(example.category, []).extend(_area(box) / image for box in example.boxes)
    bounds = {name: torch.tensor(s, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95]).double()).tolist()
              for name, s in shares.items()}  # fmt: skip
    # of equally common phrases the first by alphabet
    common = {name: min(count, key=lambda phrase: (-count[phrase], phrase)) for name, count in sorted(phrases.items())}
    return Prior(common, {name: (low, high) for name, (low, high) in bounds.items()})


def semantic_reward(batch: Batch, encoder: Encoder, config: RewardConfig, prior: Prior) -> Tensor:
    """Score a step's completions.

    Args:
        batch: B prompts with their images, G completions each.
        encoder: frozen, on its device.
        config: `semantic`, cosine or contrast; `crop_context`.
        prior: of the training records; contrast asks for it.

    Returns:
        [B, G], float32 in 0..1, on the CPU.
    """
    B, G = batch.shape
    crops: dict[tuple[int, Box], int] = {}  # image and box -> number of the crop: completions of a group may agree
    pairs: list[tuple[int, int]] = []  # completion, crop
    count = torch.zeros(B * G)
    for b, (example, group) in enumerate(zip(batch.examples, batch.answers, strict=True)):
        for g, answer in enumerate(group if example.boxes else ()):
            clipped = [box for box in (_inside(box, example) for box in answer.boxes or ()) if _area(box) > 0]
            pairs += [(b * G + g, crops.setdefault((b, box), len(crops))) for box in dict.fromkeys(clipped)]
            count[b * G + g] = len(clipped)
    empty = [[float(not e.boxes and a.boxes == ()) for a in group]
             for e, group in zip(batch.examples, batch.answers, strict=True)]  # fmt: skip
    rewards = torch.tensor(empty).flatten()
    if pairs:
        which = torch.tensor([b for b, _ in crops])
        scores = _scores(batch, [box for _, box in crops], which, encoder, config, prior)
        place, crop = torch.tensor(pairs).unbind(1)
        rewards += torch.zeros(B * G).index_add(0, place, scores[crop]) / count.clamp(min=1)
    return rewards.view(B, G)


def _scores(
    batch: Batch, boxes: list[Box], which: Tensor, encoder: Encoder, config: RewardConfig, prior: Prior
) -> Tensor:
    """[n], of n boxes in original pixels, within the images `which` [n]."""
    images = images_of(batch.prompts, encoder.device, encoder.channels)
    sizes = torch.tensor([[*p, *o] for p, o in zip(batch.processed_sizes, batch.original_sizes, strict=True)])
    shown = sizes[:, :2].float()  # [B, 2], pixels that the model saw
    factor = (shown / sizes[:, 2:]).repeat(1, 2)  # [B, 4], original to processed
    regions = squares(torch.tensor(boxes, dtype=torch.float32) * factor[which], config.crop_context)
    phrases = [example.phrase for example in batch.examples]
    if config.semantic == "cosine":
        seen = encoder.images(crops_of(images, which, regions, encoder.size))
        return (seen * encoder.texts(phrases)[which.to(seen.device)]).sum(-1).clamp(min=0).cpu()
    B = len(phrases)
    whole = squares(torch.cat([torch.zeros_like(shown), shown], 1), 1.0)
    every, of = torch.cat([regions, whole]), torch.cat([which, torch.arange(B)])
    seen = encoder.images(crops_of(images, of, every, encoder.size))  # [n + B, D]
    fits = _fits(seen, of.tolist(), batch.examples, encoder, prior)
    shares = [_prior(box, batch.examples[b], prior) for box, b in zip(boxes, which.tolist(), strict=True)]
    areas = torch.tensor(shares, dtype=torch.float32)
    return areas * (1 + fits[:-B] - fits[-B:][which]) / 2


def _fits(seen: Tensor, of: list[int], examples: Sequence[Example], encoder: Encoder, prior: Prior) -> Tensor:
    """q of crops [n, D] with the phrases of the records that they belong to, on the CPU."""
    rivals = [
        [e.phrase, f"no {e.phrase}", *(text for name, text in prior.phrases.items() if name != e.category)]
        for e in examples
    ]
    most = max(map(len, rivals))
    vectors = encoder.texts([text for row in rivals for text in row + row[:1] * (most - len(row))])
    texts = vectors.view(len(rivals), most, -1)[torch.tensor(of, device=vectors.device)]  # [n, K, D]
    logits = encoder.scale * (texts @ seen[..., None])[..., 0]
    here = torch.tensor([[k < len(row) for k in range(most)] for row in rivals], device=logits.device)
    return logits.masked_fill(~here[torch.tensor(of, device=logits.device)], -torch.inf).softmax(-1)[:, 0].cpu()


def _prior(box: Box, example: Example, prior: Prior) -> float:
    """How far a box is as large as its category's are; 1 for a category without training boxes."""
    low, high = prior.areas.get(example.category, (0.0, 1.0))
    share = _area(box) / (example.width * example.height)
    return min(1.0, share / low if low else 1.0, high / share)


def _inside(box: Box, example: Example) -> Box:
    x1, y1, x2, y2 = box
    w, h = example.width, example.height
    return (min(max(x1, 0), w), min(max(y1, 0), h), min(max(x2, 0), w), min(max(y2, 0), h))


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
