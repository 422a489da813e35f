"""The files of checkpoints: which folders are whole, how one becomes so, which go.

A checkpoint is written aside, in `.step-NNNNNN.partial`. When every file is on the disk, `manifest.json` with each
one's size and SHA-256 is written beside them, and the folder is renamed to `step-NNNNNN`. So a folder of that name is
complete even after a power cut, and what happened to its files since shows in the hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "manifest.json"
_FORMAT = 1


def aside_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f".step-{step:06d}.partial"


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; whether they are whole still, `complaints` says."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps done when it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def describe(files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of files, as they are read back, by name."""
    found: dict[str, dict[str, int | str]] = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    return found


def publish(folder: Path, step: int, files: Mapping[str, Mapping[str, int | str]]) -> None:
    """Make what lies aside the checkpoint of `step`, at once or not at all.

    Args:
        folder: of the checkpoints.
        step: that was saved.
        files: what `describe` said of each of its files, which are on the disk already.
    """
    aside, final = aside_of(folder, step), folder / f"step-{step:06d}"
    _write_through(aside / MANIFEST, _manifest(files))
    sync_folder(aside)
    if final.exists():
        remove(final)
    os.rename(aside, final)
    sync_folder(folder)


def complaints(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, each by its name; nothing if it is whole.

    Args:
        checkpoint: its folder.
        part: this caller hashes files part, part + parts, .. of them; sizes are looked at by all.
        parts: callers that share the work.
    """
    path = checkpoint / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return [f"{path}: not as it was written"]
    except FileNotFoundError:
        return [f"{path}: missing"]
    except (ValueError, KeyError, TypeError, AttributeError):  # bad UTF-8 is a ValueError too
        return [f"{path}: not as it was written"]
    found = []
    for number, (name, wanted) in enumerate(sorted(files.items())):
        file = checkpoint / name
        if not file.is_file():
            found.append(f"{file}: missing")
        elif file.stat().st_size != wanted["bytes"]:
            found.append(f"{file}: want {wanted['bytes']} bytes; got {file.stat().st_size}")
        elif number % parts == part and describe([file])[name]["sha256"] != wanted["sha256"]:
            found.append(f"{file}: other bytes than were written (SHA-256)")
    return found


def tidy(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted runs left aside."""
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed"), *checkpoints(folder)[:-keep]]:
        remove(path)


def set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint that is not whole out of the way, to be looked at."""
    path = checkpoint.with_name(f"{checkpoint.name}.broken")
    shutil.rmtree(path, ignore_errors=True)
    os.rename(checkpoint, path)
    return path


def remove(path: Path) -> None:
    """Remove a folder; one that is half gone is no checkpoint any more."""
    hidden = path.with_name(f".{path.name.removeprefix('.').removesuffix('.removed')}.removed")
    if hidden != path:
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
    shutil.rmtree(hidden)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_through(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _manifest(files: Mapping[str, Mapping[str, int | str]]) -> str:
    content = {"format": _FORMAT, "files": dict(sorted(files.items()))}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=2) + "\n"
