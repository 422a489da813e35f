"""An image and phrases -> boxes, as the evaluation would get them.

    grounder = Grounder.load("runs/mine/export")
    for location in grounder.locate("film.dcm", ["small left apical pneumothorax", "cardiomegaly"]):
        print(location.phrase, location.status, location.boxes, location.side)

Image reading, question, engine and reading of the answer are those of training and evaluation; decoding is greedy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from medground.asking import Asking, asking_for
from medground.datasets.images import picture_of, read_image
from medground.datasets.volumes import Window, is_volume
from medground.evaluate import read_answer
from medground.overlay import draw_overlay
from medground.policy import check_model, empty_policy
from medground.predict_config import PredictConfig
from medground.prompts import Processor, check_phrase, load_processor, make_prompt
from medground.records import Box, Example, Group, Prompt
from medground.rollout.cache import Sampling
from medground.rollout.engine import Engine, Limits
from medground.sharding import dtype_on, own_rows
from medground.weight_files import check_weights, read_weights

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from medground.policy import Policy

    Picture = str | Path | Image.Image | np.ndarray

Side = Literal["left", "right", "midline", "both"]

_MOST_ROWS, _CACHE_BYTES, _PREFILL_TOKENS = 32, 8e9, 8192  # answers at once, and memory, as a run has them
_ROOM = 256  # prompts may grow by this many tokens before the cache is made anew


@dataclass(frozen=True)
class Location:
    """Where a phrase is, as the model says.

    Attributes:
        phrase: that was asked about.
        boxes: xyxy in pixels of the image file, clipped to it.
        status: `found`: there are boxes; `nothing`: the model says that there is nothing; `unreadable`: its answer has
            no form that can be read, so that nothing is known.
        side: the patient's half that the boxes' centres lie on, if the image shows the patient's left on its right;
            `both` for boxes on different ones, `midline` for a centre on neither; None without boxes.
        completion: what the model said.
        logp: log-probability of the completion, in nats, summed over its tokens.
        finished: False where the completion was cut at the limit of tokens.
    """

    phrase: str
    boxes: tuple[Box, ...]
    status: Literal["found", "nothing", "unreadable"]
    side: Side | None
    completion: str
    logp: float
    finished: bool


class Grounder:
    """A model that says where phrases are on images."""

    def __init__(self, policy: Policy, processor: Processor, asking: Asking):
        self.policy, self.processor, self.asking = policy, processor, asking
        self._engine: Engine | None = None

    @classmethod
    def load(cls, folder: str | Path, **changes: Any) -> Grounder:
        """Load a model folder, onto the GPU where there is one.

        Args:
            folder: a run's export, or any Qwen2.5-VL with weights as safetensors.
            changes: fields of `Asking`, in place of what the folder's medground.json says; None for as it says.

        Raises:
            ValueError: the folder is not one, its weights or its medground.json are not usable, or a field cannot be.
        """
        folder = Path(folder)
        config = _config_of(folder)
        asking = asking_for(folder, config.model_type, changes)
        processor = load_processor(folder, asking.min_pixels, asking.max_pixels)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype_on(device, asking.precision)
        empty = empty_policy(folder, dtype)
        stored = check_weights(empty.vlm, folder)
        policy = empty.empty_copy(dtype, device, {})
        read_weights(policy.vlm, stored, own_rows)
        return cls(policy.to(device), processor, asking)

    def locate(
        self,
        image: Picture,
        phrase: str | Sequence[str],
        *,
        slice_index: int | None = None,
        window: Window = "auto",
    ) -> list[Location]:
        """Ask about one or several phrases on an image, together.

        Args:
            image: a file as `read_image` reads it, or a picture as `picture_of` takes it.
            phrase: one, or several.
            slice_index: of a NIfTI volume, 0 for the lowest.
            window: of a NIfTI volume.

        Returns:
            A location a phrase, in their order.

        Raises:
            ValueError: the image cannot be read, a phrase is empty, or the prompt is too long; says which.
        """
        phrases = [phrase] if isinstance(phrase, str) else list(phrase)
        _check_phrases(phrases)
        return self.locate_in(*_read(image, slice_index, window), phrases)

    def locate_in(self, name: str, picture: Image.Image, phrases: Sequence[str]) -> list[Location]:
        """The same of a picture, RGB, that has been read, and that errors call by a name."""
        names = [f"{name}, phrase {number}" for number in range(1, len(phrases) + 1)]
        try:
            prompts = [self._prompt(*pair, picture) for pair in zip(names, phrases, strict=True)]
            longest = max(len(prompt.input_ids) for prompt in prompts)
            found = self._engine_for(longest).roll_out(prompts, count=len(prompts), copies=1, sampling=Sampling(0.0))
            groups = sorted(found, key=lambda pair: pair[0])
        except ValueError as error:  # which says record, as of a data set
            raise ValueError(str(error).removeprefix("record ")) from None
        return [_location(group) for _, group in groups]

    def _prompt(self, name: str, phrase: str, picture: Image.Image) -> Prompt:
        width, height = picture.size
        example = Example(name, "", width, height, phrase, (), "", "", "", "", "")
        check_phrase(example, self.processor)
        try:
            return make_prompt(example, picture, self.processor, self.asking.template)
        except ValueError as error:  # a shape that the processor refuses
            raise ValueError(f"{name}: {error}") from None

    def _engine_for(self, longest: int) -> Engine:
        if self._engine is None or self._engine.limits.longest_prompt < longest:
            P = -(-longest // _ROOM) * _ROOM
            limits = Limits(P, self.asking.max_new_tokens, _MOST_ROWS, _CACHE_BYTES, _PREFILL_TOKENS)
            self._engine = Engine(self.policy, self.processor.tokenizer, limits)
        return self._engine


def patient_side(boxes: Sequence[Box], width: float) -> Side | None:
    """The patient's half that boxes' centres lie on, where the image has the patient's left on its right.

    Args:
        boxes: xyxy.
        width: of the image, in the boxes' pixels.
    """
    middles = [(box[0] + box[2]) / 2 for box in boxes]
    found: set[Side] = {"midline" if x == width / 2 else "left" if x > width / 2 else "right" for x in middles}
    return None if not found else found.pop() if len(found) == 1 else "both"


def run_predict(config: PredictConfig) -> None:
    """Print where the phrases are, and draw it where that is asked for.

    Raises:
        ValueError: as `Grounder.load` and `Grounder.locate`.
    """
    name, picture = _read(config.image, config.slice, config.window)  # before seconds of loading
    names = ("template", "min_pixels", "max_pixels", "max_new_tokens")
    grounder = Grounder.load(config.model, **{name: getattr(config, name) for name in names})
    locations = grounder.locate_in(name, picture, config.phrases)
    volume = is_volume(Path(config.image))
    if config.json:
        print(json.dumps(_as_json(config, grounder, picture, locations, volume), indent=2))
    else:
        print("\n".join(_lines(name, picture, grounder, locations, volume)))
    if config.out:
        drawn = draw_overlay(picture, [(found.phrase, found.boxes, _words(found)) for found in locations])
        try:
            drawn.save(config.out)
        except OSError as error:
            raise ValueError(f"out: want a file that can be written; got {config.out!r}: {error.strerror}") from None
        if not config.json:
            print(f"\ndrawn: {config.out}")


_SHOWN = {
    True: "an axial slice is shown with the patient's left on the image's right, as the file orients it",
    False: "assumed: the image shows the patient's left on its right, as frontal films do",
}
_PLACES: dict[Side, str] = {
    "left": "the patient's left half, the image's right",
    "right": "the patient's right half, the image's left",
    "midline": "the midline",
    "both": "both halves",
}


def _lines(
    name: str, picture: Image.Image, grounder: Grounder, locations: list[Location], volume: bool
) -> Iterator[str]:
    yield f"{name}: {picture.width} x {picture.height} pixels, template {grounder.asking.template}"
    for number, location in enumerate(locations, 1):
        yield f"\n{number}. {location.phrase}: {_words(location)}"
        for box in location.boxes:
            place = patient_side([box], picture.width)
            assert place
            empty = "" if box[0] < box[2] and box[1] < box[3] else "; it has no area"
            yield f"   [{', '.join(f'{v:.1f}' for v in box)}]  on {_PLACES[place]}{empty}"
        if location.status == "unreadable":
            cut = "" if location.finished else f" (cut after {grounder.asking.max_new_tokens} tokens)"
            yield f"   it said{cut}: {location.completion!r}"
    yield f"\nBoxes are [x1, y1, x2, y2] in pixels of the image. Sides: {_SHOWN[volume]}. Research only, no diagnosis."


def _words(location: Location) -> str:
    count = len(location.boxes)
    words = {"nothing": "nothing found", "unreadable": "the answer cannot be read"}
    return words.get(location.status) or f"{count} box{'es' * (count > 1)}"


def _as_json(
    config: PredictConfig, grounder: Grounder, picture: Image.Image, locations: list[Location], volume: bool
) -> dict[str, Any]:
    rows = [asdict(location) for location in locations]
    for row in rows:
        row["logp"] = row["logp"] if math.isfinite(row["logp"]) else None
    return {
        "image": config.image,
        "slice": config.slice,
        "width": picture.width,
        "height": picture.height,
        "model": config.model,
        "asking": asdict(grounder.asking),
        "sides": _SHOWN[volume],
        "locations": rows,
    }


def _config_of(folder: Path) -> Any:
    if not folder.is_dir():
        raise ValueError(f"{folder}: want a model folder; there is none")
    if not (folder / "config.json").is_file() or (folder / "environment.json").is_file():  # a run's own is no model's
        inside = folder / "export"
        if inside.is_dir():
            raise ValueError(f"{folder}: want a model folder; this is a run's, its model is in {inside}")
    try:
        return check_model(folder)
    except (OSError, KeyError) as error:
        raise ValueError(f"{folder}: want a model folder; its configuration cannot be read: {error}") from None


def _check_phrases(phrases: Sequence[str]) -> None:
    if not phrases:
        raise ValueError("phrase: want one or more; got none")
    for phrase in phrases:
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"phrase: want words to find; got {phrase!r}")


def _read(image: Picture, slice_index: int | None, window: Window) -> tuple[str, Image.Image]:
    """The picture, RGB, and what to call it."""
    if not isinstance(image, str | Path):
        if slice_index is not None or window != "auto":
            raise ValueError("slice, window: want none for a picture in memory, since they are a volume's")
        return "the image", picture_of(image)
    if window != "auto" and not is_volume(Path(image)):
        raise ValueError(f"{image}: window: want none, since it is no volume; got {window!r}")
    return str(image), read_image(image, slice_index, window)


def _location(group: Group) -> Location:
    prompt, rollout = group.prompt, group.rollouts[0]
    answer = read_answer(rollout.text, prompt).boxes
    boxes = tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in answer or ())
    return Location(
        phrase=prompt.example.phrase,
        boxes=boxes,
        status="unreadable" if answer is None else "found" if boxes else "nothing",
        side=patient_side(boxes, prompt.example.width),
        completion=rollout.text,
        logp=float(rollout.logp.sum()),
        finished=rollout.finished,
    )
