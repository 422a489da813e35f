"""A small encoder for phantom films: four convolutions, and a bag of words; trained by contrast in seconds.

It stands in for a medical encoder where there is none, in the demo and in tests. Crops of true boxes are drawn to their
phrases and away from those of other films; crops of random places are further negatives for every phrase.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from medground.rewards.encoders import Encoder, need_file, scale_of

SIZE, D, MEAN, STD = 32, 64, 0.45, 0.25
_HOW = "medground encoders build --data DIR --out FOLDER makes one from phantom films."
_WEIGHTS, _WORDS = "phantom_encoder.safetensors", "words.json"


class _Network(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.GELU()]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (SIZE // 16) ** 2, D))
        self.words = nn.EmbeddingBag(words + 1, D, mode="mean")  # the last is for words never seen
        self.text = nn.Sequential(nn.GELU(), nn.Linear(D, D))
        self.logit_scale = nn.Parameter(torch.tensor(2.3))


class PhantomEncoder(Encoder):
    """The network with the words that it knows."""

    def __init__(self, words: Sequence[str], device: torch.device | str) -> None:
        """A network of random weights."""
        super().__init__([MEAN], [STD], device)
        self.channels, self.size, self.words = 1, SIZE, list(words)
        self.network = _Network(len(words)).to(device, self.dtype)
        self._rows = {word: row for row, word in enumerate(self.words)}

    def frozen(self) -> PhantomEncoder:
        """Itself, trained."""
        self.network.eval()
        self.scale = scale_of(self.network.logit_scale.item())
        return self

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As `Encoder` says."""
        return self.network.image(pixels[:, :1])

    def encode_texts(self, texts: list[str]) -> Tensor:
        """As `Encoder` says."""
        bags = [
            [self._rows.get(word, len(self.words)) for word in words_of(text)] or [len(self.words)] for text in texts
        ]
        flat = torch.tensor([row for bag in bags for row in bag], device=self.device)
        starts = torch.tensor([0, *(len(bag) for bag in bags[:-1])], device=self.device).cumsum(0)
        return self.network.text(self.network.words(flat, starts))

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.float().state_dict(), folder / _WEIGHTS)
        (folder / _WORDS).write_text(json.dumps(self.words))


def words_of(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"[a-z0-9]+", text.lower())


def train_encoder(crops: Tensor, phrases: Sequence[str], elsewhere: Tensor, *, steps: int, seed: int) -> PhantomEncoder:
    """Train one on the CPU.

    Args:
        crops: [n, 3, SIZE, SIZE], 0..1, of true boxes.
        phrases: what each shows.
        elsewhere: [m, 3, SIZE, SIZE], of random places.
        steps: of batches of 64 pairs.
        seed: of weights and batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = PhantomEncoder(sorted({word for phrase in phrases for word in words_of(phrase)}), "cpu")
        optimizer = torch.optim.AdamW(encoder.network.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randperm(len(crops))[:64].tolist()
            others = torch.randint(len(elsewhere), (len(rows),))
            pixels = torch.cat([crops[rows], elsewhere[others]])
            images = normalize(encoder.encode_images((pixels - MEAN) / STD), dim=-1)
            said = [phrases[row] for row in rows]
            texts = normalize(encoder.encode_texts(said), dim=-1)
            logits = encoder.network.logit_scale.exp().clamp(max=100) * texts @ images.T  # [phrases, crops]
            same = torch.tensor([[a == b for b in said] for a in said])
            same.fill_diagonal_(False)  # another film's crop of the same phrase is no negative
            ours = logits[:, : len(rows)].masked_fill(same, -torch.inf)
            label = torch.arange(len(rows))
            loss = cross_entropy(torch.cat([ours, logits[:, len(rows) :]], 1), label) + cross_entropy(ours.T, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.frozen()


def load(place: str, device: torch.device | str) -> PhantomEncoder:
    """Read it from a folder.

    Raises:
        ValueError: a file is missing; says how to make one.
    """
    weights = load_file(need_file(place, _WEIGHTS, _HOW))
    encoder = PhantomEncoder(json.loads(need_file(place, _WORDS, _HOW).read_text()), device)
    encoder.network.load_state_dict(weights)
    return encoder.frozen()
