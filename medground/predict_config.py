"""Options of `medground predict`; apart from what it does, which imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from medground.config import Template


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Say where on an image a model finds what phrases name: boxes in pixels of the image file."""

    image: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGE")]
    """PNG, JPEG, DICOM, or a NIfTI volume (with --slice)."""
    phrases: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PHRASE...")]
    """What to find, one or more, each in quotes: "small left apical pneumothorax"."""
    model: str
    """Model folder: the export/ of a run, or any Qwen2.5-VL."""
    out: str = ""
    """PNG to write: the image with the boxes on it, the phrases below."""
    json: bool = False
    """Print JSON, and nothing else, on standard output."""
    slice: int | None = None
    """Slice of a NIfTI volume, 0 for the lowest."""
    window: Literal["lung", "soft-tissue", "bone", "auto"] = "auto"
    """Grey levels of a NIfTI volume; auto: percentiles of the volume."""
    template: Template | None = None
    """Wording of the question; None for that of the model's medground.json, or patient-side without one."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels; None for medground.json, or 3136."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; None for medground.json, or 1003520."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; None for medground.json, or 512."""

    def __post_init__(self) -> None:
        if not self.phrases:
            raise ValueError("phrases: want one or more after the image; got none")
        for number, phrase in enumerate(self.phrases, 1):
            if not phrase.strip():
                raise ValueError(f"phrases: want words to find; number {number} is empty")
        out = Path(self.out)
        if self.out and out.suffix.lower() != ".png":
            raise ValueError(f"out: want a name that ends in .png; got {self.out!r}")
        if self.out and not out.parent.is_dir():
            raise ValueError(f"out: want a folder that is there; got {str(out.parent)!r}")
        if self.out and out.exists() and Path(self.image).exists() and out.samefile(self.image):
            raise ValueError(f"out: want another file than the image; got {self.out!r}")
