"""Every image of a data folder, read whole: damage, changed files, one picture under two names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medground.datasets.images import read_image
from medground.datasets.inventory import IMAGES, file_hash, read_images
from medground.datasets.workers import map_in_order
from medground.records import Example


@dataclass(frozen=True)
class Picture:
    """What reading an image told: hashes of its file and pixels ("" where it cannot be read), or what is wrong."""

    image: str
    file: str
    pixels: str
    fault: str


def read_pictures(folder: Path, examples: Sequence[Example], workers: int) -> list[Picture]:
    """Read each image once, in the order of the records."""
    names = list(dict.fromkeys(example.image for example in examples))
    with tqdm(total=len(names), desc="images", unit="image") as bar:
        found = []
        for picture in map_in_order(partial(_read, folder), names, workers if len(names) > 1 else 1):
            found.append(picture)
            bar.update()
    return found


def errors_of_pictures(folder: Path, pictures: Sequence[Picture], examples: Sequence[Example]) -> list[str]:
    """Images that cannot be read, that are not those of images.jsonl, or whose pixels are in two splits."""
    listed = read_images(folder)
    splits = {example.image: example.split for example in examples}
    first: dict[str, str] = {}  # pixels -> the first image that has them
    errors = []
    for picture in pictures:
        if picture.fault:
            errors.append(picture.fault)
            continue
        row = listed.get(picture.image)
        if row and row["sha256"] != picture.file:
            errors.append(f"{folder / picture.image}: SHA-256: want {row['sha256']} as {IMAGES}; got {picture.file}")
        other = first.setdefault(picture.pixels, picture.image)
        if splits[other] != splits[picture.image]:
            errors.append(
                f"{folder / picture.image}: pixels: want a picture in one split only; got that of {other} "
                f"({splits[other]!r}) in {splits[picture.image]!r}"
            )
    return errors


def same_pictures(pictures: Sequence[Picture], examples: Sequence[Example]) -> list[tuple[str, str]]:
    """(image, an earlier one with the same pixels) within one split."""
    splits = {example.image: example.split for example in examples}
    first: dict[tuple[str, str], str] = {}
    pairs = []
    for picture in pictures:
        if not picture.fault:
            other = first.setdefault((splits[picture.image], picture.pixels), picture.image)
            if other != picture.image:
                pairs.append((picture.image, other))
    return pairs


def _read(folder: Path, name: str) -> Picture:
    try:
        image = read_image(folder / name)
    except ValueError as error:
        return Picture(name, "", "", str(error))
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(np.asarray(image).data)
    return Picture(name, file_hash(folder / name), digest.hexdigest(), "")
