"""Rows of annotations -> films: rows about one image come together, rows of one phrase become its boxes.

What rows say against each other is a fault like any other: two sizes of one image, two splits of one patient, the same
box twice, two images that would get the same name.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medground.datasets.faults import Faults, complaint
from medground.datasets.films import Film, Statement
from medground.datasets.manifest import SPLITS
from medground.datasets.paths import fault_of_path, need_folder
from medground.records import Box

TWO_CATEGORIES = "boxes that a second row repeats under another category (kept once, under the first)"
_SHARED = ("patient", "study", "split", "size")  # what rows about one image must agree on


@dataclass(frozen=True)
class Said:
    """What one row says. `box` is original, None for "the image does not show it"; `image` names the original file."""

    where: str
    image: str
    phrase: str
    category: str
    box: Box | None
    patient: str
    study: str
    split: str
    size: tuple[int, int] | None


class Gathering:
    """Takes rows one by one, then gives the films.

    Attributes:
        read: rows taken.
        faults: [{"rows", "why"}] of rows that cannot be used.
        left_out: the same, of rows that the settings leave out.
        notes: counts worth knowing.
    """

    def __init__(self) -> None:
        self.read = 0
        self.faults: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.notes: Counter[str] = Counter()
        self._images: dict[str, dict[str, list[Said]]] = {}  # image -> phrase -> rows
        self._seen: dict[tuple[str, str, Box | None], Said] = {}

    def take(self, where: str, parse: Callable[[Faults], Said]) -> None:
        """Take the row at `where`; `parse` notes its faults, and what it returns counts only without any."""
        self.read += 1
        faults = Faults()
        said = parse(faults)
        if faults:
            self.faults += [{"rows": [where] * (not i), "why": line} for i, line in enumerate(faults.lines)]
        else:
            self._add(said)

    def leave_out(self, rows: tuple[str, ...], why: str) -> None:
        """Note rows that the settings leave out."""
        self.left_out.append({"rows": list(rows), "why": f"{rows[0]}: {why}"})

    def films(
        self,
        root: Path,
        source: str,
        longest_side: int,
        name: Callable[[Said], str],
        find: Callable[[Path, str], str] | None = None,
    ) -> list[Film]:
        """The films, in the order of their first rows.

        Args:
            root: folder of the original images.
            source: name of the data set.
            longest_side: of the images to write.
            name: a row's image -> its path in the data folder, without images/ and suffix.
            find: (root, image) -> path relative to root; None where it is `image` itself.

        Raises:
            ValueError: there is no folder `root`.
        """
        root = need_folder(root, "images")
        splits: dict[str, tuple[str, str]] = {}  # patient -> split, where
        names: dict[str, str] = {}
        films = []
        for image, phrases in self._images.items():
            first = next(iter(phrases.values()))[0]
            rows = [said.where for some in phrases.values() for said in some]
            path = find(root, image) if find else image
            if wanted := fault_of_path(root, path, "the folder of images"):
                self._fault(rows, complaint(first.where, "image", wanted, image))
                continue
            split, where = splits.setdefault(first.patient, (first.split, first.where))
            if split != first.split:
                wanted = f"a patient of one split only ({first.patient!r} is in {split!r} at {where})"
                self._fault(rows, complaint(first.where, "split", wanted, first.split))
                continue
            stem = name(first)
            other = names.setdefault(stem.casefold(), image)
            if other != image:
                self._fault(rows, complaint(first.where, "image", f"another name than that of {other!r}", image))
                continue
            films.append(
                Film(
                    key=f"{source}-{stem}",
                    path=str((root / path).resolve()),
                    name=path,
                    image=f"images/{stem}",
                    size=first.size,
                    patient=first.patient,
                    study=first.study,
                    source=source,
                    split=first.split,
                    statements=tuple(_statement(some) for some in phrases.values()),
                    longest_side=longest_side,
                )
            )
        return films

    def _add(self, said: Said) -> None:
        if said.split not in SPLITS:
            self._fault([said.where], complaint(said.where, "split", f"one of {', '.join(SPLITS)}", said.split))
            return
        phrases = self._images.get(said.image)
        if phrases:
            first = next(iter(phrases.values()))[0]
            for field in _SHARED:
                ours, theirs = getattr(said, field), getattr(first, field)
                if ours != theirs:
                    wanted = f"{theirs!r}, as {first.where} has it for this image"
                    self._fault([said.where], complaint(said.where, field, wanted, ours))
                    return
        other = self._seen.get((said.image, said.phrase, said.box))
        if other and (other.category == said.category or said.box is None):
            self._fault([said.where], f"{said.where}: line: want each box once; got the row of {other.where} again")
            return
        some = (phrases or {}).get(said.phrase, [])
        if some and (some[0].box is None) != (said.box is None):
            wanted = f"boxes or none for one phrase ({some[0].where} says otherwise)"
            self._fault([said.where], complaint(said.where, "box", wanted, said.box))
            return
        self.notes[TWO_CATEGORIES] += other is not None
        self._seen.setdefault((said.image, said.phrase, said.box), said)
        self._images.setdefault(said.image, {}).setdefault(said.phrase, []).append(said)

    def _fault(self, rows: list[str], why: str) -> None:
        self.faults.append({"rows": rows, "why": why})


def box_of_xywh(x: float, y: float, w: float, h: float) -> Box:
    """A corner and a size -> xyxy."""
    return (x, y, x + w, y + h)


def relative_stem(said: Said) -> str:
    """The name of an image that keeps the original's folders."""
    return str(Path(said.image).with_suffix(""))


def facts(gathering: Gathering) -> Mapping[str, Any]:
    """What `Original` wants to know of a gathering, by its names."""
    notes = {name: count for name, count in gathering.notes.items() if count}
    return {"read": gathering.read, "faults": gathering.faults, "left_out": gathering.left_out, "notes": notes}


def _statement(some: list[Said]) -> Statement:
    boxes = tuple(dict.fromkeys(said.box for said in some if said.box is not None))
    return Statement(some[0].phrase, some[0].category, boxes, tuple(said.where for said in some))
