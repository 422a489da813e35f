"""Options of the small base model; apart from its making, which imports torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Build the small base model of the demo."""

    out: str
    """Folder of the model."""
    template: Literal["brief", "brief-chain"] = "brief"
    """Question that it is taught to answer; under brief-chain with boxes in its thought, as chain-of-box wants them."""
    seed: int = 1_000_003
    """Seed of its weights and of its films, which are not those of the demo's data."""
    films: int = 6000
    """Phantom films to learn from."""
    size: int = 112
    """Width and height of the films, in pixels."""
    steps: int = 600
    """Supervised steps: the first two thirds on good answers, the rest on faulty ones."""
    batch_size: int = 32
    """Answers a step."""
    lr: float = 3e-3
    """Highest learning rate; it rises over 20 steps and falls linearly to a tenth."""
    vocab_size: int = 410
    """Tokens, those of Qwen's chat format included."""

    def __post_init__(self) -> None:
        for name in ("films", "steps", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: want > 0; got {getattr(self, name)!r}")
        if self.vocab_size < 340:
            raise ValueError(f"vocab_size: want >= 340 (bytes, chat tokens, JSON pieces); got {self.vocab_size}")
