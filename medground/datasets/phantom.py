"""Phantom chest films: a data set without patients, drawn from a seed, for the demo, tests and benchmarks.

A film is a function of (seed, index, size) alone, whatever else is drawn and by how many processes. Two of three
films belong to patients with two films; both show the same build, in another pose.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from medground.datasets.films import image_row
from medground.datasets.inventory import IMAGES, Counts, command_line, write_images, write_manifest
from medground.datasets.manifest import RECORDS, write_records
from medground.datasets.phantom_dicom import require_pydicom, write_dicom
from medground.datasets.phantom_film import Pixels, draw_anatomy, expose, lung_boxes, sample_chest
from medground.datasets.phantom_findings import HEART, Finding, paint, plan_findings
from medground.datasets.phantom_phrases import statements
from medground.datasets.workers import map_in_order
from medground.records import Box, Example

VERSION = 1  # of the drawing: another number for films that differ
_PARAMETERS = "phantom.json"


@dataclass(frozen=True, kw_only=True)
class PhantomConfig:
    """Draw a data set of phantom chest films."""

    out: str
    """Folder to write records.jsonl, manifest.json and images/ into; must not hold another data set."""
    count: int = 2000
    """Films in all; each has one or two records."""
    seed: int = 0
    """Seed of everything drawn."""
    size: int = 112
    """Width and height of a film, in pixels."""
    val: int = 64
    """Films of the split `val`."""
    test: int = 256
    """Films of the split `test`; the rest is `train`. A patient is in one split only."""
    bits: Literal[8, 16] = 8
    """Bits a pixel of the PNG files."""
    dicom: bool = False
    """Write 12-bit DICOM files (needs pydicom) instead of PNG."""

    def __post_init__(self) -> None:
        _want(bool(self.out), "out", "a folder name", self.out)
        _want(self.count >= 1, "count", ">= 1", self.count)
        _want(0 <= self.seed < 2**31, "seed", "0 <= seed < 2**31", self.seed)
        _want(56 <= self.size <= 4096, "size", "56 to 4096 pixels", self.size)
        _want(self.val >= 0, "val", ">= 0", self.val)
        _want(self.test >= 0, "test", ">= 0", self.test)
        _want(
            self.val + self.test < self.count,
            "count",
            f"more films than val + test, {self.val} + {self.test}",
            self.count,
        )
        _want(self.bits in (8, 16), "bits", "8 or 16", self.bits)
        _want(not self.dicom or self.bits == 8, "bits", "its default with dicom, whose films have 12 bits", self.bits)


_Job = tuple[PhantomConfig, int, str]  # what _write_film needs: the film's index and split


@dataclass(frozen=True)
class Film:
    """A drawn film: pixels [size, size], float32, 0 to 1, what it shows, and boxes around the left and right lung."""

    pixels: Pixels
    findings: tuple[Finding, ...]
    lungs: tuple[Box, Box]


def draw_film(seed: int, index: int, size: int) -> Film:
    """Draw film `index` of a seed.

    Args:
        seed: of the data set, >= 0.
        index: of the film, >= 0.
        size: width and height in pixels.

    Returns:
        The film and its findings, boxes in its pixels.
    """
    attempts = (_draw(seed, index, size, attempt) for attempt in itertools.count())
    return next(film for film in attempts if film is not None)


def _draw(seed: int, index: int, size: int, attempt: int) -> Film | None:
    # streams of their own: what a film shows does not change the body it is shown in
    person = np.random.default_rng([seed, _patient(index), 1])
    film = np.random.default_rng([seed, index, attempt, 2])
    rng = np.random.default_rng([seed, index, attempt, 3])
    plans = plan_findings(rng)
    chest = sample_chest(person, film, enlarged_heart=any(plan.category == HEART for plan in plans))
    canvas = draw_anatomy(chest, film, size)
    left, right = lung_boxes(canvas)
    findings = tuple(found for plan in plans if (found := paint(canvas, plan, rng)) is not None)
    if len(findings) < len(plans):  # one lies beyond the film's edge: a pose to draw again
        return None
    return Film(expose(canvas, film), findings, (left, right))


def film_examples(film: Film, seed: int, index: int, split: str = "train") -> list[Example]:
    """The records of a film: one or two phrases, each with its boxes; `image` names a PNG."""
    size = len(film.pixels)
    said = statements(film.findings, np.random.default_rng([seed, index, 4]))
    return [
        Example(
            id=f"phantom-{seed}-{index:06d}-{number}",
            image=f"images/{index:06d}.png",
            width=size,
            height=size,
            phrase=statement.phrase,
            boxes=statement.boxes,
            category=statement.category,
            patient=f"phantom-{seed}-p{_patient(index):05d}",
            study=f"phantom-{seed}-s{index:06d}",
            source="phantom",
            split=split,
        )
        for number, statement in enumerate(said)
    ]


def phantom_examples(seed: int, index: int, size: int) -> tuple[NDArray[np.uint8], list[Example]]:
    """A film as its 8-bit PNG has it, [size, size] uint8, and its records, without a file.

    Args: as `draw_film`.
    """
    film = draw_film(seed, index, size)
    return eight_bit(film), film_examples(film, seed, index)


def eight_bit(film: Film) -> NDArray[np.uint8]:
    """The pixels that an 8-bit PNG of the film has: [size, size]."""
    return _quantised(film.pixels, 255).astype(np.uint8)


def write_phantom(config: PhantomConfig, workers: int | None = None) -> None:
    """Write a phantom data set; at once done when `config.out` holds this very one already.

    Args:
        config: what to draw and where to.
        workers: processes that draw; None for one a CPU. The files do not depend on it.

    Raises:
        ValueError: the folder holds another data set, pydicom is missing, or count is too small to hold out
            whole patients.
    """
    out = Path(config.out)
    if config.dicom:
        require_pydicom()
    splits = _splits(config)
    if _is_there(config, out):
        print(f"{out}: {config.count} phantom films, already there")
        return
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / _PARAMETERS).write_text(json.dumps(_parameters(config), indent=2) + "\n")
    jobs = [(config, index, splits[index]) for index in range(config.count)]
    counts = Counts()
    images: list[dict[str, object]] = []
    with tqdm(total=config.count, desc="phantom films", unit="film") as bar:

        def examples() -> Iterator[Example]:
            for some, image in map_in_order(_write_film, jobs, workers or os.cpu_count() or 1):
                images.append(image)
                for example in some:
                    counts.add(example)
                    yield example
                bar.update()

        write_records(out, examples())
    write_images(out, images)
    options = {name: value for name, value in _parameters(config).items() if name != "version"}
    write_manifest(
        out,
        (RECORDS, IMAGES),
        counts,
        source="phantom",
        command=command_line("medground data phantom", options),
        licence="drawn from a seed, without patients: free of rights of others",
        settings=_parameters(config),
    )


def _write_film(job: _Job) -> tuple[list[Example], dict[str, object]]:
    """Writes a film; its records and its line of images.jsonl."""
    config, index, split = job
    film = draw_film(config.seed, index, config.size)
    examples = film_examples(film, config.seed, index, split)
    path = Path(config.out) / examples[0].image
    if config.dicom:
        path = path.with_suffix(".dcm")
        write_dicom(film.pixels, path, config.seed, examples[0])
        examples = [dataclasses.replace(example, image=f"images/{path.name}") for example in examples]
    else:
        pixels = _quantised(film.pixels, 2**config.bits - 1)
        Image.fromarray(pixels.astype(np.uint8 if config.bits == 8 else np.uint16)).save(path, compress_level=1)
    size = (config.size, config.size)
    return examples, image_row(Path(config.out), examples[0].image, size, f"phantom film {index}", size)


def _quantised(pixels: Pixels, white: int) -> Pixels:
    return np.rint(pixels * np.float32(white))


def _patient(index: int) -> int:
    # films 0 | 1 2 | 3 | 4 5 | ...: every other patient has two films
    return index // 3 * 2 + (index % 3 > 0)


def _splits(config: PhantomConfig) -> list[str]:
    """The split of each film: whole patients, in an order drawn from the seed, until `test` and `val` are full."""
    films: dict[int, list[int]] = {}
    for index in range(config.count):
        films.setdefault(_patient(index), []).append(index)
    splits = ["train"] * config.count
    free = {"test": config.test, "val": config.val}
    for patient in np.random.default_rng([config.seed, config.count, 5]).permutation(len(films)):
        own = films[int(patient)]
        for split in free:
            if len(own) <= free[split]:
                free[split] -= len(own)
                for index in own:
                    splits[index] = split
                break
    if any(free.values()):
        wanted = f"more films to hold out {config.val} + {config.test} of whole patients"
        raise ValueError(f"count: want {wanted}; got {config.count}")
    return splits


def _parameters(config: PhantomConfig) -> dict[str, object]:
    values = dataclasses.asdict(config)
    del values["out"]
    return {"version": VERSION, **values}


def _is_there(config: PhantomConfig, out: Path) -> bool:
    """Whether `out` holds this very data set, whole; False when it holds nothing, or a part of it.

    Raises:
        ValueError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: want a folder; got the file {out}")
    parameters, images = out / _PARAMETERS, out / "images"
    if not parameters.exists():
        if (out / RECORDS).exists() or (images.exists() and any(images.iterdir())):
            raise ValueError(f"out: want a folder without records; got {out}, which holds another data set")
        return False
    try:
        theirs = json.loads(parameters.read_text())
    except ValueError:
        theirs = None
    theirs = theirs if isinstance(theirs, dict) else {}
    ours = _parameters(config)
    if theirs != ours:
        differ = [f"{name} {theirs.get(name)!r}" for name in ours if theirs.get(name) != ours[name]]
        raise ValueError(f"out: want a folder without records; got {out}, phantom films of {', '.join(differ)}")
    return (out / RECORDS).exists() and sum(1 for _ in images.glob("*")) == config.count


def _want(condition: bool, name: str, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: want {wanted}; got {got!r}")
