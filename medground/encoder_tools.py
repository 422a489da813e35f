"""`medground encoders`: whether an encoder can tell true crops from others, before training; the phantom encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medground.records import Example

if TYPE_CHECKING:
    from torch import Tensor  # a second to import, for which --help need not wait


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Zero-shot score of an encoder on your records: true crops against shuffled ones."""

    data: str
    """Folder that holds records.jsonl."""
    split: str = "val"
    """Split that is looked at."""
    records: int = 500
    """Most records, the first of the split."""
    context: float = 1.2
    """Sides of a crop, in those of the box."""
    device: str = "auto"
    """auto: the GPU where there is one."""

    def __post_init__(self) -> None:
        if self.records < 2 or not self.context >= 1:
            raise ValueError(f"want records >= 2, context >= 1; got {self.records}, {self.context}")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Train the small encoder for phantom films."""

    data: str
    """Folder of phantom films."""
    out: str
    """New folder for the encoder."""
    split: str = "train"
    """Split that it learns from."""
    records: int = 4000
    """Most records, the first of the split."""
    steps: int = 300
    """Of training."""
    seed: int = 0
    """Of weights and batches."""

    def __post_init__(self) -> None:
        if self.records < 2 or self.steps < 1:
            raise ValueError(f"want records >= 2, steps >= 1; got {self.records}, {self.steps}")


def check_encoder(name: str, config: CheckConfig) -> dict[str, float]:
    """Print and return its AUC: how often a phrase agrees better with its own crop than with another's.

    Other crops are those of the next record of another phrase, and of a random place of the same film as large as the
    true box.

    Raises:
        ValueError: the encoder or the data cannot be used.
    """
    import torch

    from medground.rewards.encoders import load_encoder

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    encoder = load_encoder(name, device)
    examples = _shown(config.data, config.split, config.records)
    crops, elsewhere = _crops(examples, config.data, encoder.size, config.context, 0, device)
    images, others = encoder.images(crops), encoder.images(elsewhere)
    texts = encoder.texts([example.phrase for example in examples])
    n = len(examples)
    shuffled = []
    for i, example in enumerate(examples):
        rivals = (j % n for j in range(i + n // 2, i + n // 2 + n) if examples[j % n].phrase != example.phrase)
        shuffled.append(next(rivals, None))
    if None in shuffled:
        raise ValueError(f"{config.data}: want two phrases or more in split {config.split!r}; got one")
    true = (images * texts).sum(-1)
    found = {
        "auc": area_under_curve(true, (images[shuffled] * texts).sum(-1)),
        "auc_elsewhere": area_under_curve(true, (others * texts).sum(-1)),
        "cosine_true": true.mean().item(),
        "records": n,
    }
    print(
        f"{name}: {n} records of {config.split}, crops {config.context:g} times the box\n"
        f"  AUC, true crops against other phrases' crops   {found['auc']:.3f}\n"
        f"  AUC, true crops against other places           {found['auc_elsewhere']:.3f}\n"
        f"  mean cosine of true crops                      {found['cosine_true']:.3f}\n"
        "0.5 is chance: below about 0.6 the semantic reward is mostly noise."
    )
    return found


def build_encoder(config: BuildConfig) -> None:
    """Train the phantom encoder and save it.

    Raises:
        ValueError: the data cannot be used, or `out` holds something.
    """
    from medground.rewards.encoder_phantom import SIZE, train_encoder

    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: want a new or empty folder; it holds something")
    examples = _shown(config.data, config.split, config.records)
    crops, elsewhere = _crops(examples, config.data, SIZE, 1.2, config.seed, "cpu")
    phrases = [example.phrase for example in examples]
    train_encoder(crops, phrases, elsewhere, steps=config.steps, seed=config.seed).save(out)
    print(f"{out}: an encoder; --reward.encoder phantom:{out}")


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a positive score is above a negative one, ties half: scores [n], [m]."""
    difference = positive[:, None].double() - negative.double()
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def _shown(data: str, split: str, most: int) -> list[Example]:
    from medground.datasets.manifest import load_records, select

    examples = [example for example in select(load_records(data), split, data) if example.boxes][:most]
    if len(examples) < 2:
        raise ValueError(f"{data}: want two records with a box in split {split!r}; got {len(examples)}")
    return examples


def _crops(
    examples: Sequence[Example], data: str, size: int, context: float, seed: int, device: str
) -> tuple[Tensor, Tensor]:
    """Crops of the first box of each record, and of a random place as large on the same film: [n, 3, size, size]."""
    import numpy as np
    import torch

    from medground.datasets.images import read_image
    from medground.rewards.crops import crops_of, squares

    draw = torch.Generator().manual_seed(seed)
    true, elsewhere = [], []
    for example in examples:
        pixels = np.asarray(read_image(Path(data) / example.image)).transpose(2, 0, 1)
        image = torch.tensor(pixels, device=device).float()[None] / 255
        box = torch.tensor(example.boxes[0])
        sides = box[2:] - box[:2]
        corner = torch.rand(2, generator=draw) * (torch.tensor([example.width, example.height]) - sides)
        regions = squares(torch.stack([box, torch.cat([corner, corner + sides])]), context)
        cut = crops_of(image, torch.zeros(2, dtype=torch.int64), regions, size)
        true.append(cut[0])
        elsewhere.append(cut[1])
    return torch.stack(true), torch.stack(elsewhere)
