"""How a model was asked when it was trained: medground.json in its folder, which prediction and evaluation go by."""

from __future__ import annotations

import json
import sys
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from medground.config import Config, DataConfig, RolloutConfig, Template

NAME = "medground.json"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The question's wording, the image's size, the answer's length and the precision.

    Attributes:
        template: a key of prompts.TEMPLATES.
        min_pixels: smaller images are enlarged to this many pixels.
        max_pixels: larger images are reduced to this many.
        max_new_tokens: longest completion, in tokens.
        precision: of the computation: auto, float32 or bfloat16.
        family: model_type of the model's configuration; "" where it is not told.
    """

    template: Template = "patient-side"
    min_pixels: int = DataConfig.min_pixels
    max_pixels: int = DataConfig.max_pixels
    max_new_tokens: int = RolloutConfig.max_new_tokens
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    family: str = ""

    def __post_init__(self) -> None:
        known = typing.get_args(Template)
        if self.template not in known:
            raise ValueError(f"template: want one of {', '.join(known)}; got {self.template!r}")
        for name in ("min_pixels", "max_pixels", "max_new_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: want a whole number >= 1; got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: want <= max_pixels, {self.max_pixels}; got {self.min_pixels}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision: want auto, float32 or bfloat16; got {self.precision!r}")
        if not isinstance(self.family, str):
            raise ValueError(f"family: want a model_type; got {self.family!r}")

    def write(self, folder: Path) -> None:
        """Write medground.json into a model folder."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def asking_of(config: Config, family: str) -> Asking:
    """How a run asks its model.

    Args:
        config: of the run.
        family: model_type of its model.
    """
    return Asking(
        template=config.prompt.template,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        max_new_tokens=config.rollout.max_new_tokens,
        precision=config.model.precision,
        family=family,
    )


def asking_for(folder: Path, family: str, changes: dict[str, Any], *, tell: bool = True) -> Asking:
    """How to ask a model: as its folder says, or else as by default, which standard error is told.

    Args:
        folder: of the model.
        family: model_type of its configuration.
        changes: fields of `Asking` that the user named; None for those that were left open.
        tell: whether to tell.

    Raises:
        ValueError: medground.json is damaged or of another family, or a field cannot be.
    """
    known = read_asking(folder)
    if known and known.family not in ("", family):
        raise ValueError(f"{folder / NAME}: family: want {family}, of config.json; got {known.family!r}")
    asking = replace(known or Asking(), **{name: value for name, value in changes.items() if value is not None})
    if tell and known is None:
        print(
            f"medground: {folder} has no {NAME}, which says how the model was asked in training; asking with "
            f"template {asking.template}, {asking.min_pixels} to {asking.max_pixels} pixels",
            file=sys.stderr,
        )
    return asking


def read_asking(folder: Path) -> Asking | None:
    """medground.json of a model folder; None where it has none.

    Raises:
        ValueError: it is damaged, or has a value that cannot be; names the file and the field.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: want a JSON object; got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: want a JSON object; got {type(found).__name__}")
    names = [field.name for field in fields(Asking)]
    if unknown := sorted(found.keys() - set(names)):
        raise ValueError(f"{file}: want the fields {', '.join(names)}; got {unknown[0]!r}")
    try:
        return Asking(**found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
