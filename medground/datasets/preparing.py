"""Original data set -> data folder: the frame that all converters share.

A converter reads its annotations and hands over jobs, one an image (or a volume). Workers do them; each finished job is
a line of the journal `.prepare.jsonl`, so that a preparation that was interrupted continues: a job in the journal
whose images still have their bytes is not done again. At the end records.jsonl, images.jsonl and left_out.jsonl are
written in the order of the jobs, manifest.json last, and the journal goes. The bytes depend neither on the number of
workers nor on interruptions.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from medground.datasets.faults import Faults, complaint
from medground.datasets.inventory import (
    IMAGES,
    MANIFEST,
    Counts,
    command_line,
    file_hash,
    json_line,
    read_manifest,
    write_manifest,
    written_whole,
)
from medground.datasets.journal import JOURNAL, Journal, check_settings
from medground.datasets.manifest import RECORDS
from medground.datasets.options import PrepareConfig
from medground.datasets.workers import map_in_order
from medground.records import Example

LEFT_OUT = "left_out.jsonl"


class Job(Protocol):
    """One unit of work; pickled to a worker."""

    @property
    def key(self) -> str:
        """Its name, unique in the data set."""


Convert = Callable[[Any, Path], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Original:
    """A converter's reading of an original data set.

    Attributes:
        name: of the source.
        licence: a note for manifest.json.
        settings: all that the result depends on, JSON; files of annotations are added by `annotations`.
        annotations: files whose SHA-256 is noted.
        jobs: in the order of the records.
        convert: a module's function: job, data folder -> result (`films.convert_film`).
        read: rows of the annotations.
        faults: of the annotations, each with the rows that it makes useless.
        left_out: rows that the settings leave out, and why: [{"rows", "why"}].
        notes: counts worth knowing.
    """

    name: str
    licence: str
    settings: Mapping[str, Any]
    annotations: Sequence[Path]
    jobs: Sequence[Job]
    convert: Convert
    read: int
    faults: Sequence[Mapping[str, Any]] = ()
    left_out: Sequence[Mapping[str, Any]] = ()
    notes: Mapping[str, int] = field(default_factory=dict)


def prepare(config: PrepareConfig, original: Original) -> None:
    """Write the data folder; at once done when `config.out` holds this very one already.

    Raises:
        ValueError: the folder holds something else, or rows have faults and `leave_out_faulty` is off: lists them.
    """
    if not config.leave_out_faulty:
        _refuse(original.faults, original.name)
    out = Path(config.out)
    settings = _settings(original)
    if _is_there(out, settings):
        left = read_manifest(out)["rows"]["left_out"]  # type: ignore[index]
        print(f"{out}: {original.name}, already there ({left} rows left out)")
        return
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: want a folder that can be made; got {out} ({error.strerror})") from None
    (out / MANIFEST).unlink(missing_ok=True)  # the folder is not complete from here on
    faults = list(original.faults)
    totals = _Totals()
    workers = config.workers or os.cpu_count() or 1
    with (
        Journal(out, settings) as journal,
        written_whole(out / RECORDS) as records,
        written_whole(out / IMAGES) as images,
    ):
        for result in _results(out, original, journal, workers):
            done = totals.add(result)
            faults += done["faults"]
            records.writelines(json_line(one["example"]) for one in done["records"])
            images.writelines(json_line(row) for row in done["images"])
        if not config.leave_out_faulty:
            _refuse(faults, original.name)
        totals.check(original, faults)
    _finish(out, original, settings, totals, faults)


class _Totals:
    """What is counted while results pass: nothing here grows with the images' bytes."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.rows = 0
        self.notes: Counter[str] = Counter()
        self.patients: dict[str, str] = {}
        self.pictures: dict[str, tuple[str, str]] = {}  # SHA-256 -> the split and original of the first
        self.strays: list[str] = []  # images written, but left out

    def add(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Count a result; what is left of it without pictures that another split has."""
        done = self._without_leaks(result)
        self.notes.update(done["notes"])
        for one in done["records"]:
            example = Example(**one["example"])
            # converters see to it
            assert self.patients.setdefault(example.patient, example.split) == example.split, example
            self.rows += len(one["rows"])
            self.counts.add(example)
        return done

    def _without_leaks(self, done: Mapping[str, Any]) -> Mapping[str, Any]:
        splits = {one["example"]["image"]: one["example"]["split"] for one in done["records"]}
        leaks = []
        for row in done["images"]:
            split, other = self.pictures.setdefault(row["sha256"], (splits[row["image"]], row["original"]))
            if split != splits[row["image"]]:
                leaks.append((row["image"], f"a picture of one split only (that of {other} is in {split!r})"))
        if not leaks:
            return done
        faults, images = list(done["faults"]), dict(leaks)
        for image, wanted in leaks:
            rows = [row for one in done["records"] if one["example"]["image"] == image for row in one["rows"]]
            faults.append({"rows": rows, "why": complaint(rows[0] if rows else image, "image", wanted, splits[image])})
        self.strays += images
        return {
            "images": [row for row in done["images"] if row["image"] not in images],
            "records": [one for one in done["records"] if one["example"]["image"] not in images],
            "faults": faults,
            "notes": done["notes"],
        }

    def check(self, original: Original, faults: Sequence[Mapping[str, Any]]) -> None:
        left = sum(len(one["rows"]) for one in (*faults, *original.left_out))
        assert original.read == self.rows + left, (original.read, self.rows, left)  # nothing is lost in silence
        if not self.rows:
            raise ValueError(f"{original.name}: want at least one record; got none of {original.read} rows")


def _results(out: Path, original: Original, journal: Journal, workers: int) -> Iterator[dict[str, Any]]:
    """Each job's result in order, taken from the journal or done, and then in the journal."""
    items = ((job, journal.find(job.key)) for job in original.jobs)
    work = partial(_work, original.convert, out)
    with tqdm(total=len(original.jobs), desc=original.name, unit="image") as bar:
        for job, (done, again) in zip(original.jobs, map_in_order(work, items, workers), strict=True):
            if not again and not done["faults"]:  # what has a fault is tried again
                journal.add(job.key, done)
            bar.update()
            yield done


def _work(convert: Convert, out: Path, item: tuple[Job, dict[str, Any] | None]) -> tuple[dict[str, Any], bool]:
    job, earlier = item
    if earlier is not None and all(_is_whole(out, row) for row in earlier["images"]):
        return earlier, True
    return convert(job, out), False


def _is_whole(out: Path, row: Mapping[str, Any]) -> bool:
    path = out / row["image"]
    return path.is_file() and path.stat().st_size == row["bytes"] and file_hash(path) == row["sha256"]


def _finish(
    out: Path, original: Original, settings: dict[str, Any], totals: _Totals, faults: list[Mapping[str, Any]]
) -> None:
    left = [*original.left_out, *faults]
    for name in totals.strays:
        (out / name).unlink(missing_ok=True)
    with written_whole(out / LEFT_OUT) as file:
        file.writelines(json_line({"rows": one["rows"], "why": one["why"]}) for one in left)
    write_manifest(
        out,
        (RECORDS, IMAGES, LEFT_OUT),
        totals.counts,
        source=original.name,
        command=command_line(f"medground data prepare {original.name}", original.settings),
        licence=original.licence,
        settings=settings,
        rows={"read": original.read, "used": totals.rows, "left_out": sum(len(one["rows"]) for one in left)},
        notes=dict(sorted((Counter(original.notes) + totals.notes).items())),
    )
    (out / JOURNAL).unlink()
    print(f"{out}: {totals.rows} of {original.read} rows, {len(totals.counts.images)} images")


def _refuse(faults: Sequence[Mapping[str, Any]], name: str) -> None:
    collected = Faults()
    for one in faults:
        collected.say(one["why"])
    collected.raise_if_any(name, "--leave-out-faulty leaves their rows out and lists them")


def _settings(original: Original) -> dict[str, Any]:
    hashes = {path.name: file_hash(path) for path in original.annotations}
    return json.loads(json.dumps({**original.settings, "annotations": hashes}))


def _is_there(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds this very data set, whole; False when it holds nothing, or the beginning of it.

    Raises:
        ValueError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: want a folder; got the file {out}")
    manifest = read_manifest(out) if out.is_dir() else None
    if manifest is not None:
        check_settings(out, manifest.get("settings"), settings)
        return _is_complete(out, manifest["files"])
    if out.is_dir() and not (out / JOURNAL).exists():
        # a run that ended before its first job may have left the one empty folder
        held = sorted(
            path.name for path in out.iterdir() if path.name != "images" or not path.is_dir() or any(path.iterdir())
        )
        if held:
            raise ValueError(f"out: want a new or an empty folder; got {out}, which holds {', '.join(held[:5])}")
    return False


def _is_complete(out: Path, files: Mapping[str, str]) -> bool:
    """Whether all that manifest.json speaks of is there.

    Raises:
        ValueError: a file was edited, which a new preparation would undo.
    """
    for name, digest in files.items():
        if not (out / name).is_file():
            return False
        if file_hash(out / name) != digest:
            raise ValueError(f"out: want a folder as it was prepared; got {out}, whose {name} was changed since")
    with (out / IMAGES).open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            path = out / row["image"]
            if not path.is_file() or path.stat().st_size != row["bytes"]:
                return False
    return True
