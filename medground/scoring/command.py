"""`medground score`: scores of predictions, wherever they were made; needs no model and no images."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from medground.scoring.coco import read_coco
from medground.scoring.export import write_coco, write_csv
from medground.scoring.measures import SIZE_LIMITS
from medground.scoring.overlap import overlap
from medground.scoring.reading import Loaded, find_predictions, read_columns, read_predictions
from medground.scoring.scores import RESAMPLES, records_of, score_columns
from medground.scoring.text import render_scores
from medground.scoring.vlm_r1 import check_claims, read_vlm_r1

TOLERANCE = 1e-3  # by which the file's own `iou` may be off


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score a file of predictions: metrics with 95 % intervals, by category, side word and size."""

    file: tyro.conf.Positional[str]
    """Predictions; for --format medground the folder of a run or an evaluation, too."""
    format: Literal["medground", "vlm-r1", "coco"] = "medground"
    """`medground`: JSON lines as in docs/run_folder.md. `vlm-r1`: a result file of VLM-R1 or MedGround-R1. `coco`: COCO
    results, with --truth."""
    truth: str = ""
    """COCO annotations that --format coco answers to."""
    json: bool = False
    """Print everything as JSON."""
    resamples: int = RESAMPLES
    """Bootstrap resamples."""
    seed: int = 0
    """Of the bootstrap."""
    legacy_iou: bool = False
    """The IoU of VLM-R1, to compare with old logs: single boxes; an overlap of a pixel or less counts for nothing."""
    csv: str = ""
    """File to write the predictions into, as CSV; of --format medground."""
    coco: str = ""
    """File to write the predictions into, as COCO results, with what they answer to beside it, in a file that ends in
    .truth.json; of --format medground."""

    def __post_init__(self) -> None:
        if (self.format == "coco") != bool(self.truth):
            raise ValueError(f"--truth: want a file with --format coco, and none without; got {self.truth!r}")
        for option, name in (("--csv", self.csv), ("--coco", self.coco)):
            if name and self.format != "medground":
                raise ValueError(f"{option}: want --format medground to export from; got {self.format}")
            if name and not Path(name).parent.is_dir():
                raise ValueError(f"{option}: want a file in a folder that exists; got {name}")


def run_score(config: ScoreConfig) -> None:
    """Score the file, print, export.

    Raises:
        ValueError: the file is not in its format, or an option does not fit it.
    """
    path = find_predictions(config.file)
    found = scores_of(path, config)
    if config.csv:
        write_csv(Path(config.csv), read_predictions(path))
    if config.coco:
        found["notes"] += write_coco(Path(config.coco), read_predictions(path))
    sys.stdout.write((json.dumps(found, indent=1, allow_nan=False) if config.json else render_scores(found)) + "\n")


def scores_of(path: Path, config: ScoreConfig) -> dict[str, Any]:
    """Everything that --json prints.

    Raises:
        ValueError: as `run_score`.
    """
    loaded = _load(path, config)
    columns = loaded.columns
    try:
        scores = score_columns(columns, config.resamples, config.seed, config.legacy_iou)
        record = records_of(columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    metrics = scores["metrics"]
    out: dict[str, Any] = {
        "file": str(path),
        "format": config.format,
        "n": len(columns) if record is None else int(record.max()) + 1,
        "answers": len(columns),
        "clusters": len(columns.patients),
        "cluster": loaded.claims.get("cluster", "patient"),
        "resamples": config.resamples,
        "seed": config.seed,
        "legacy_iou": config.legacy_iou,
        **{name: metrics[name]["value"] for name in ("miou", "acc@0.5")},
        **scores,
        "size_limits": SIZE_LIMITS,
        "notes": loaded.notes + _disputed_ious(loaded, config.legacy_iou),
    }
    if config.format == "vlm-r1":
        out["file_says"] = check_claims(loaded)
    return out


def _load(path: Path, config: ScoreConfig) -> Loaded:
    if config.format == "vlm-r1":
        return read_vlm_r1(path)
    if config.format == "coco":
        return read_coco(path, Path(config.truth))
    return read_columns(path)


def _disputed_ious(loaded: Loaded, legacy: bool) -> list[str]:
    """Where the file's own `iou` is not that of its boxes."""
    claimed = loaded.claimed_iou
    if claimed is None or legacy or np.isnan(claimed).all():
        return []
    off = np.flatnonzero(np.abs(overlap(loaded.columns).iou - claimed) > TOLERANCE)
    if not off.size:
        return []
    first = off[0]
    return [
        f"the file's `iou` is not that of its boxes in {off.size} lines (first: {loaded.columns.ids[first]!r}, "
        f"{claimed[first]:.3f}); the scores are of the boxes"
    ]
