"""The options of `medground eval`; without torch, so that --help answers at once."""

import math
from dataclasses import dataclass
from typing import Literal

from medground.config import Template

Control = Literal["shuffled", "blank", "flipped", "blind", "whole", "centre"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Ask a model about every record of a split: answers, metrics with intervals, controls (docs/evaluating.md).

    Started again in the same folder with the same options, it goes on where it was stopped. On several GPUs:
    torchrun --nproc-per-node N -m medground eval ...
    """

    model: str
    """Model folder (an export, or any Qwen2.5-VL), or a name on the Hugging Face hub."""
    data: tuple[str, ...]
    """Folder that holds records.jsonl; several are one data set."""
    split: Literal["train", "val", "test"] = "test"
    """Whose records are asked about."""
    template: Template | None = None
    """Wording of the question; None for the one that the model was trained with, as its medground.json says."""
    controls: tuple[Control, ...] = ()
    """What to hold the result against. Asked of the model: shuffled (another patient's image), blank (a grey image),
    flipped (mirrored, sides swapped in the phrase). Without it: blind (best constant box per phrase of the records in
    `train_split`), whole (the whole image), centre (its middle half)."""
    train_split: Literal["train", "val", "test"] = "train"
    """Whose records the control blind chooses its boxes from."""
    samples: int = 1
    """Completions of each record; more than one needs a temperature, and gives the mean and the best of them."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    seed: int = 0
    """Of the sampling."""
    max_new_tokens: int | None = None
    """Longest completion, in tokens; None as in training."""
    out: str = ""
    """Folder of the results; empty for runs/eval/ and a name made of model, split and options."""
    json: bool = False
    """Print eval.json in place of the table."""
    piece: int = 64
    """Records decoded together: lost when the evaluation is killed. More are faster on a GPU. Another number may
    change the last bits of log-probabilities."""
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    """Of the computation; None as in training. auto: bfloat16 on a GPU, float32 on a CPU."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels; None as in training."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; None as in training."""
    cache_gb: float = 8.0
    """Memory for keys and values, per rank, in 10^9 bytes."""
    workers: int = 0
    """Processes of each rank that make prompts; 0 for a thread. Changes nothing of the results."""
    timeout_minutes: float = 30.0
    """An evaluation that does not move for so long ends, and names the rank that hangs."""

    def __post_init__(self) -> None:
        wanted = (
            ("model", bool(self.model), "a model folder or a name on the hub", self.model),
            ("data", bool(self.data) and all(self.data), "the name of a folder, or of several", self.data),
            ("controls", len(set(self.controls)) == len(self.controls), "each control once", self.controls),
            ("samples", 1 <= self.samples <= 1024, "1 to 1024", self.samples),
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf, "0, or a number >= 1e-6",
             self.temperature),
            ("temperature", self.samples == 1 or self.temperature > 0,
             f"a number > 0 with {self.samples} samples, which would all be the same", self.temperature),
            ("seed", 0 <= self.seed < 2**31, "0 <= seed < 2**31", self.seed),
            ("piece", self.piece >= 1, ">= 1", self.piece),
            ("cache_gb", 0 < self.cache_gb < math.inf, "a number > 0", self.cache_gb),
            ("workers", 0 <= self.workers <= 64, "0 to 64", self.workers),
            ("timeout_minutes", 0 < self.timeout_minutes < math.inf, "a number > 0", self.timeout_minutes),
        )  # fmt: skip
        for name, fine, want, got in wanted:
            if not fine:
                raise ValueError(f"{name}: want {want}; got {got!r}")
