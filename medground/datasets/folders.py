"""Several data folders as one: ids and images are told apart by their folder's name, and no patient is in two splits.

One folder's records stay as they are. Of several, `images/1.png` of `data/ms-cxr` is `ms-cxr/images/1.png`.
Patients and studies keep their names, since one patient may be in two data sets made from the same films.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medground.datasets.faults import Faults
from medground.datasets.inventory import MANIFEST, file_hash, read_images
from medground.datasets.manifest import load_records, records_hash
from medground.records import Example


def load_folders(folders: Sequence[str]) -> list[list[Example]]:
    """Read and check the records of data folders, each by itself (`load_records`) and all together.

    Returns:
        A list a folder, in their order.

    Raises:
        ValueError: a folder's records have faults; two folders have one name; a patient, a study or an image's content
            (where images.jsonl tells) is in one split here and in another there.
    """
    if len(folders) == 1:
        return [load_records(folders[0])]
    names = [folder_name(folder) for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"data.path: want folders of different names; got {twice[0]!r} twice")
    parts = [load_records(folder) for folder in folders]
    _check_splits(folders, parts)
    return [
        [replace(e, id=f"{name}/{e.id}", image=f"{name}/{e.image}") for e in part]
        for name, part in zip(names, parts, strict=True)
    ]


def image_path(folders: Sequence[str], image: str) -> Path:
    """The file of an image that a record of `load_folders` names."""
    if len(folders) == 1:
        return Path(folders[0]) / image
    name, _, inside = image.partition("/")
    for folder in folders:
        if folder_name(folder) == name:
            return Path(folder) / inside
    raise ValueError(f"{image}: want an image of one of the folders {', '.join(folders)}")


def folder_name(folder: str) -> str:
    """The last part of its path."""
    return Path(folder).resolve().name


def folders_hash(folders: Sequence[str]) -> str:
    """SHA-256, in hexadecimal: of the records of one folder, of several that of their hashes and names in order."""
    if len(folders) == 1:
        return records_hash(folders[0])
    lines = [f"{records_hash(folder)} {folder_name(folder)}\n" for folder in folders]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_hashes(folders: Sequence[str]) -> dict[str, str]:
    """SHA-256, in hexadecimal, of the manifest.json of each folder that has one, by the folder's name."""
    files = {folder_name(folder): Path(folder) / MANIFEST for folder in folders}
    return {name: file_hash(file) for name, file in files.items() if file.is_file()}


def _check_splits(folders: Sequence[str], parts: Sequence[Sequence[Example]]) -> None:
    """What `load_records` sees to within a folder."""
    faults = Faults()
    places: dict[tuple[str, str], tuple[str, str]] = {}  # (field, value) -> split, folder
    for folder, part in zip(folders, parts, strict=True):
        hashes = {name: row["sha256"] for name, row in read_images(Path(folder)).items()}
        told = set()
        for e in part:
            for field, value in (("patient", e.patient), ("study", e.study), ("image content", hashes.get(e.image))):
                if value is None:
                    continue
                split, where = places.setdefault((field, value), (e.split, folder))
                if split != e.split and (field, value) not in told:
                    told.add((field, value))
                    shown = repr(value) if field != "image content" else f"that of {e.image!r}"
                    wanted = f"one that is in one split only ({shown} is in {split!r} of {where})"
                    faults.add(f"{folder}: record {e.id}", field, wanted, e.split)
    faults.raise_if_any(", ".join(folders), "a patient's name means the same patient in all folders")
