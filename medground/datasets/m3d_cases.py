"""A case of M3D-RefSeg, a CT volume and the masks of its regions -> slices as PNG, boxes of each region there."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medground.datasets.components import component_boxes
from medground.datasets.films import image_row, scaled, write_png
from medground.datasets.images import read_whole_volume
from medground.datasets.volumes import Volume, Window
from medground.records import Box, Example

SPECKS = "parts of a mask too small to be boxes"
AREA_FLOOR = 0.1  # of the largest slice's area: where every k-th slice counts


@dataclass(frozen=True)
class Region:
    """A mask id and its phrases, each with the rows (file:line) that give it."""

    mask_id: int
    phrases: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Case:
    """One volume: the paths of its CT and mask, and what to make of them; `step` 0 takes the largest slice."""

    key: str
    ct: str
    mask: str
    source: str
    split: str
    window: Window
    step: int
    min_pixels: int
    regions: tuple[Region, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """All rows about this case."""
        return tuple(row for region in self.regions for _, rows in region.phrases for row in rows)


def convert_case(case: Case, out: Path) -> dict[str, Any]:
    """Write the slices of a case into `out`.

    Returns:
        As `films.convert_film`.
    """
    result: dict[str, Any] = {"images": [], "records": [], "faults": [], "notes": {}}
    try:
        ct, labels = read_whole_volume(case.ct), read_whole_volume(case.mask)
        if ct.raw.shape != labels.raw.shape or not np.allclose(ct.affine, labels.affine, atol=0.1):
            theirs = f"{labels.raw.shape} at {np.round(labels.affine[:3], 2).tolist()}"
            raise ValueError(f"{case.mask}: want the shape {ct.raw.shape} and the place of {case.ct}; got {theirs}")
    except ValueError as error:
        result["faults"] = [{"rows": list(case.rows), "why": f"{case.rows[0]}: {error}"}]
        return result
    limits, notes, written = ct.limits(case.window), Counter[str](), set[int]()
    for region in case.regions:
        mask = _mask(labels, region.mask_id)
        areas = mask.sum((0, 1))
        if not areas.any():
            rows = [row for _, some in region.phrases for row in some]
            why = f"{rows[0]}: Mask_ID: want a number of {case.mask}; got {region.mask_id}, which has no voxel there"
            result["faults"].append({"rows": rows, "why": why})
            continue
        for at, index in enumerate(_slices(areas, case.step)):
            image = f"images/{case.key}/{index:04d}.png"
            if index not in written:
                written.add(index)
                write_png(ct.image(index, limits), out / image)
                name = f"{case.key}/{Path(case.ct).name}#{index}"
                result["images"].append(image_row(out, image, ct.slice_size, name, ct.raw.shape[:2]))
            boxes, specks = _boxes(mask[:, :, index].T, case.min_pixels, ct)
            notes[SPECKS] += specks
            result["records"] += _records(case, region, index, image, ct.slice_size, boxes, first=at == 0)
    result["notes"] = {name: count for name, count in notes.items() if count}
    return result


def _mask(labels: Volume, mask_id: int) -> NDArray[np.bool_]:
    if (labels.slope, labels.intercept) == (1.0, 0.0):
        return labels.raw == mask_id
    return np.abs(labels.raw * labels.slope + labels.intercept - mask_id) < 1e-3


def _slices(areas: NDArray[np.int64], step: int) -> list[int]:
    largest = int(areas.argmax())
    if not step:
        return [largest]
    floor = AREA_FLOOR * areas[largest]
    return [index for index in range(0, len(areas), step) if areas[index] >= floor] or [largest]


def _boxes(mask: NDArray[np.bool_], min_pixels: int, ct: Volume) -> tuple[tuple[Box, ...], int]:
    """Boxes in square pixels, from left to right; how many parts were too small."""
    parts = component_boxes(mask)
    kept = [box for box, pixels in parts if pixels >= min_pixels] or [parts[0][0]]
    rows, columns = mask.shape
    boxes = [scaled((float(a), float(b), float(c), float(d)), (columns, rows), ct.slice_size) for a, b, c, d in kept]
    return tuple(sorted(boxes)), len(parts) - len(kept)


def _records(
    case: Case, region: Region, index: int, image: str, size: tuple[int, int], boxes: tuple[Box, ...], first: bool
) -> Iterator[dict[str, Any]]:
    for number, (phrase, rows) in enumerate(region.phrases):
        example = Example(
            id=f"{case.source}-{case.key}-{region.mask_id}-{index:04d}-{number}",
            image=image,
            width=size[0],
            height=size[1],
            phrase=phrase,
            boxes=boxes,
            category="finding",  # the data set names no classes
            patient=f"m3d-{case.key}",
            study=f"m3d-{case.key}",
            source=case.source,
            split=case.split,
        )
        # a row is used once, however many slices show its region
        yield {"rows": list(rows) if first else [], "example": asdict(example)}
