"""`manifest.json` and `images.jsonl`: what a data folder holds and where it came from (docs/data/records.md).

    images.jsonl    a line an image: name, SHA-256, bytes, size, and the file and size that it was made from
    manifest.json   schema, source, command, licence, versions, hashes of the files above, counts

A folder without them is a data set all the same; one that has them says more.
"""

import hashlib
import importlib.metadata
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from medground import __version__
from medground.records import Example

MANIFEST, IMAGES = "manifest.json", "images.jsonl"
SCHEMA = 1  # of records.jsonl, images.jsonl and manifest.json; another number where a reader of this one would err
_LIBRARIES = ("numpy", "pillow", "pydicom", "nibabel")


class Counts:
    """Records, boxes, images and patients of each split and category, counted as they pass."""

    def __init__(self) -> None:
        self.images: set[str] = set()
        self._patients: dict[str, set[str]] = {}
        self._images: dict[str, set[str]] = {}
        self._numbers: dict[str, Counter[str]] = {}
        self._categories: dict[str, dict[str, Counter[str]]] = {}

    def add(self, example: Example) -> None:
        """Count one record."""
        split, boxes = example.split, len(example.boxes)
        self.images.add(example.image)
        self._images.setdefault(split, set()).add(example.image)
        self._patients.setdefault(split, set()).add(example.patient)
        self._numbers.setdefault(split, Counter()).update(records=1, boxes=boxes, without_box=int(not boxes))
        category = self._categories.setdefault(split, {}).setdefault(example.category, Counter())
        category.update(records=1, boxes=boxes)

    def as_json(self) -> dict[str, Any]:
        """{split: {records, boxes, without_box, images, patients, categories: {name: {records, boxes}}}}."""
        return {
            split: {
                **self._numbers[split],
                "images": len(self._images[split]),
                "patients": len(self._patients[split]),
                "categories": {name: dict(c) for name, c in sorted(self._categories[split].items())},
            }
            for split in sorted(self._numbers)
        }


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name when it is complete, or not at all."""
    temporary = path.with_name(f".{path.name}.part")  # one name: what a killed process left is written over
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_line(value: Mapping[str, Any]) -> str:
    """`value` as a line of a JSONL file."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def write_images(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write images.jsonl, all of it or nothing."""
    with written_whole(folder / IMAGES) as file:
        file.writelines(json_line(row) for row in rows)


def write_manifest(folder: Path, files: Iterable[str], counts: Counts, **facts: Any) -> None:
    """Write manifest.json, which says that the folder is complete.

    Args:
        folder: of the data set.
        files: of it whose SHA-256 is noted: records.jsonl, images.jsonl, ...
        counts: of its records.
        facts: source, command, licence, ...
    """
    value = {
        "schema": SCHEMA,
        **facts,
        "versions": {"medground": __version__, **_versions()},
        "files": {name: file_hash(folder / name) for name in files},
        "counts": counts.as_json(),
    }
    with written_whole(folder / MANIFEST) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """manifest.json, None where there is none.

    Raises:
        ValueError: it is damaged, or of another schema.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: want a JSON object; got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want a JSON object; got {type(value).__name__}")
    if value.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema: want {SCHEMA}, which this version reads; got {value.get('schema')!r}")
    return value


def read_images(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of images.jsonl by image; empty where there is no such file.

    Raises:
        ValueError: it is damaged; names the line.
    """
    path = folder / IMAGES
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                found[row["image"]] = {"sha256": str(row["sha256"]), "bytes": int(row["bytes"])}
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{path}:{number}: want an object with image, sha256 and bytes; got {line[:60]!r}"
                ) from None
    return found


def command_line(program: str, settings: Mapping[str, Any]) -> str:
    """The command that asks for these settings, as one types it."""
    words = [program]
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] * value
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [option, *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
