"""One image of an original data set, with all that is said about it -> an image file and records of the data folder.

Every converter from films makes `Film`s out of its annotations; the rest is the same for all of them.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medground.datasets.faults import complaint
from medground.datasets.images import read_image
from medground.datasets.inventory import file_hash
from medground.records import Box, Example

SLACK = 1.0  # pixels that an original box may stick out, by rounding at its source; it is clipped, and counted
CLIPPED = "boxes clipped that stuck out by up to a pixel"


@dataclass(frozen=True)
class Statement:
    """A phrase, its boxes in pixels of the original image, and the rows (file:line) that say so."""

    phrase: str
    category: str
    boxes: tuple[Box, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Film:
    """An original image and its statements.

    Attributes:
        key: of the film in its data set; ids of records begin with it.
        path: of the original file.
        name: of the original file for people, relative to the folder of images.
        image: path in the data folder, without its suffix.
        size: (width, height) that the annotations claim for the original; None where they claim none.
        longest_side: of the image that is written, in pixels; 0 keeps the size.
    """

    key: str
    path: str
    name: str
    image: str
    size: tuple[int, int] | None
    patient: str
    study: str
    source: str
    split: str
    statements: tuple[Statement, ...]
    longest_side: int

    @property
    def rows(self) -> tuple[str, ...]:
        """All rows about this film."""
        return tuple(row for statement in self.statements for row in statement.rows)


def convert_film(film: Film, out: Path) -> dict[str, Any]:
    """Write the film's image into `out`.

    Returns:
        {"images": rows of images.jsonl, "records": [{"rows", "example"}], "faults": [{"rows", "why"}], "notes"}, JSON.
    """
    try:
        picture = read_image(film.path)
    except ValueError as error:
        return _faulty([{"rows": list(film.rows), "why": f"{film.rows[0]}: image: {error}"}])
    if film.size is not None and film.size != picture.size:
        wanted = f"the size of {film.path}, {picture.width}x{picture.height}"
        why = complaint(film.rows[0], "image size", wanted, "{}x{}".format(*film.size))
        return _faulty([{"rows": list(film.rows), "why": why}])
    size = shown_size(picture.size, film.longest_side)
    boxes, faults, clipped = _boxes(film, picture.size, size)
    if not boxes:
        return _faulty(faults)
    image = _write(film, picture, size, out)
    examples = [
        Example(
            id=f"{film.key}-{index}",
            image=image,
            width=size[0],
            height=size[1],
            phrase=statement.phrase,
            boxes=boxes[index],
            category=statement.category,
            patient=film.patient,
            study=film.study,
            source=film.source,
            split=film.split,
        )
        for index, statement in enumerate(film.statements)
        if index in boxes
    ]
    rows = [list(film.statements[index].rows) for index in boxes]
    return {
        "images": [image_row(out, image, size, film.name, picture.size)],
        "records": [{"rows": r, "example": asdict(e)} for r, e in zip(rows, examples, strict=True)],
        "faults": faults,
        "notes": {CLIPPED: clipped} if clipped else {},
    }


def image_row(
    out: Path, image: str, size: tuple[int, int], original: str, original_size: tuple[int, int]
) -> dict[str, Any]:
    """A line of images.jsonl; `original` names what it was made from, `original_size` in that file's pixels."""
    path = out / image
    return {
        "image": image,
        "sha256": file_hash(path),
        "bytes": path.stat().st_size,
        "width": size[0],
        "height": size[1],
        "original": original,
        "original_width": original_size[0],
        "original_height": original_size[1],
    }


def shown_size(size: tuple[int, int], longest_side: int) -> tuple[int, int]:
    """(width, height) with the longest side at most `longest_side`; 0 for no limit."""
    scale = longest_side / max(size)
    if not longest_side or scale >= 1:
        return size
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def scaled(box: Box, size: tuple[int, int], to: tuple[int, int]) -> Box:
    """A box in pixels of an image of `size` -> pixels of the same image resized `to`; each axis has its own factor."""
    (w, h), (to_w, to_h) = size, to
    x1, y1, x2, y2 = box
    return (x1 * to_w / w, y1 * to_h / h, x2 * to_w / w, y2 * to_h / h)  # the far edge stays the far edge, exactly


def write_png(picture: Image.Image, path: Path) -> None:
    """Write an RGB picture as PNG, grey where it is grey, under its name only when it is complete."""
    pixels = np.asarray(picture)
    if (pixels == pixels[..., :1]).all():  # a third of the bytes
        picture = picture.convert("L")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    picture.save(part, "PNG")
    os.replace(part, path)


def _write(film: Film, picture: Image.Image, size: tuple[int, int], out: Path) -> str:
    """The image's name in the data folder."""
    original = Path(film.path)
    if size == picture.size and _is_plain(original):  # the very bytes: nothing is lost or grows
        image = film.image + original.suffix.lower()
        path = out / image
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        shutil.copyfile(original, part)
        os.replace(part, path)
        return image
    image = film.image + ".png"
    write_png(picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS), out / image)
    return image


def _is_plain(path: Path) -> bool:
    """Whether the file is PNG or JPEG of 8 bits, under its own suffix."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return False
    with path.open("rb") as file:
        if file.read(132)[128:] == b"DICM":
            return False
        file.seek(0)
        with Image.open(file) as image:
            right = {"PNG": ".png", "JPEG": ".jpg"}.get(str(image.format))
            return image.mode in ("L", "RGB") and right == path.suffix.lower().replace(".jpeg", ".jpg")


def _boxes(
    film: Film, size: tuple[int, int], to: tuple[int, int]
) -> tuple[dict[int, tuple[Box, ...]], list[dict[str, Any]], int]:
    """Boxes of the image that is written, by statement, where all are right; faults; how many were clipped."""
    good: dict[int, tuple[Box, ...]] = {}
    faults = []
    clipped = 0
    width, height = size
    for index, statement in enumerate(film.statements):
        kept, wrong = [], 0
        for number, box in enumerate(statement.boxes):
            x1, y1, x2, y2 = box
            inside = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
            out_by = max(abs(a - b) for a, b in zip(box, inside, strict=True))
            if out_by > SLACK or not (inside[0] < inside[2] and inside[1] < inside[3]):
                row = statement.rows[min(number, len(statement.rows) - 1)]
                wanted = f"a box with an area inside the image of {width}x{height}"
                faults.append({"rows": [], "why": complaint(row, "box", wanted, list(box))})
                wrong += 1
                continue
            clipped += out_by > 0
            kept.append(scaled(inside, size, to))
        if wrong:
            faults[-1]["rows"] = list(statement.rows)  # a statement stands or falls as a whole
        else:
            good[index] = tuple(kept)
    return good, faults, clipped


def _faulty(faults: list[dict[str, Any]]) -> dict[str, Any]:
    return {"images": [], "records": [], "faults": faults, "notes": {}}
