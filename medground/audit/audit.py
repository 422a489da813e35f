"""`medground data audit`: checks a data folder, names every error, counts warnings, measures the blind prior.

The errors of records are those that every training refuses (`load_records`); reading all images whole comes on top.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from medground.audit import suspicions
from medground.audit.page import write_page
from medground.audit.pictures import Picture, errors_of_pictures, read_pictures, same_pictures
from medground.audit.result import Audit, summary
from medground.audit.suspicions import Suspicion
from medground.datasets.faults import Faults
from medground.datasets.inventory import Counts, file_hash, read_manifest, written_whole
from medground.datasets.manifest import RECORDS, check_records
from medground.records import Example
from medground.scoring import blind_baseline


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Check a data folder."""

    folder: tyro.conf.Positional[str]
    """The data folder."""
    json: str = ""
    """File to write everything into, as JSON."""
    html: str = ""
    """File to write a page with a contact sheet into."""
    headers_only: bool = False
    """Read of each image its header alone: no damaged pixels, no pictures under two names."""
    sides: bool = True
    """Compare side words with the boxes' sides: right for frontal films and axial slices."""
    workers: int = 0
    """Processes that read images; 0 for one a CPU."""


def run_audit(config: AuditConfig) -> None:
    """Audit a folder, print a summary, write what was asked for.

    Raises:
        ValueError: there are errors, all of which are listed in the JSON file, 20 here; or there is no data set.
    """
    for option, name in (("json", config.json), ("html", config.html)):
        if name and not Path(name).parent.is_dir():
            raise ValueError(f"{option}: want a file in a folder that exists; got {name}")
    audit = audit_folder(config)
    if config.json:
        with written_whole(Path(config.json)) as file:
            file.write(json.dumps(audit.as_json(), ensure_ascii=False, indent=2) + "\n")
    if config.html:
        write_page(audit, Path(config.html))
    print(summary(audit))
    faults = Faults()
    for error in audit.errors:
        faults.say(error)
    faults.raise_if_any(audit.folder, "--json FILE lists all")


def audit_folder(config: AuditConfig) -> Audit:
    """Audit a folder.

    Raises:
        ValueError: there is no data set, or manifest.json or images.jsonl is damaged.
    """
    folder = Path(config.folder)
    examples, faults = check_records(folder)
    manifest = read_manifest(folder)
    pictures: list[Picture] = []
    errors = list(faults.lines)
    if not config.headers_only:
        pictures = read_pictures(folder, examples, config.workers or os.cpu_count() or 1)
        errors += errors_of_pictures(folder, pictures, examples)
    unreadable = {picture.image for picture in pictures if picture.fault}
    examples = [example for example in examples if example.image not in unreadable]
    warnings = [
        *suspicions.repeated_pairs(examples),
        *(suspicions.wrong_sides(examples) if config.sides else ()),
        *suspicions.unbalanced_classes(examples),
        *(Suspicion(suspicions.PICTURE, a, f"the picture of {b}") for a, b in same_pictures(pictures, examples)),
        *_edited(folder, manifest),
    ]
    counts = Counts()
    for example in examples:
        counts.add(example)
    return Audit(folder, errors, warnings, counts.as_json(), _blind(examples), manifest, examples)


def _blind(examples: list[Example]) -> dict[str, Any] | None:
    train, test = ([example for example in examples if example.split == split] for split in ("train", "test"))
    if not test or not any(example.boxes for example in train):
        return None
    return blind_baseline(train, test)


def _edited(folder: Path, manifest: dict[str, Any] | None) -> list[Suspicion]:
    """Files that are no longer those of manifest.json."""
    noted = (manifest or {}).get("files")
    if not isinstance(noted, dict) or noted.get(RECORDS) in (None, file_hash(folder / RECORDS)):
        return []
    return [Suspicion(suspicions.EDITED, RECORDS, "is not the file that manifest.json speaks of")]
