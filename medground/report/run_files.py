"""The files of a run's folder (docs/run_folder.md), read into one value. A run in progress lacks the later ones."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medground.config import Config, load_config
from medground.records import Box

Row = dict[str, Any]


@dataclass(frozen=True)
class Film:
    """One test record and what the model answered before and after training (None: not there yet)."""

    record: Row
    before: Row | None
    after: Row | None

    @property
    def truth(self) -> tuple[Box, ...]:
        """The true boxes, original."""
        return drawable(self.record["truth"])

    @property
    def gain(self) -> float:
        """IoU after training less IoU before; 0 while one of them is missing."""
        return self.after["iou"] - self.before["iou"] if self.before and self.after else 0.0


@dataclass(frozen=True)
class RunFiles:
    """What a run has left so far.

    Attributes:
        config: config.json.
        environment: environment.json.
        metrics: lines of metrics.jsonl by rising step.
        curve: small evaluations by rising step.
        evaluations: whole evaluations, by "before", "after", "before_shuffled" and "after_shuffled"; "blind", "whole"
            and "centre", which need no model; "after_blank" and "after_flipped", of the export, where `medground eval`
            asked for them; those that exist.
        films: records of the test split, in the order of the evaluation.
        summary: summary.json; None while the run goes on.
        warnings: lines of warnings.jsonl.
        audit: audit/rewards.json; None without one.
    """

    config: Config
    environment: Row
    metrics: list[Row]
    curve: list[Row]
    evaluations: Mapping[str, Row]
    films: list[Film]
    summary: Row | None
    warnings: list[Row]
    audit: Row | None

    @property
    def steps_done(self) -> int:
        """Optimizer steps that metrics.jsonl has."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read_run(run: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        ValueError: config.json or environment.json is missing, or a file is not JSON; names the file.
    """
    run = Path(run)
    steps: dict[int, Row] = {row["step"]: row for row in _lines(run / "metrics.jsonl")}  # a resumed step counts last
    whole, curve = _evaluation_files(run / "eval")
    files = {"before": whole.get((0, ""))}
    last = max((step for step, _ in whole), default=0)
    if last > 0:
        files |= {"after": whole.get((last, "")), "after_shuffled": whole.get((last, ".shuffled"))}
    files |= {"before_shuffled": whole.get((0, ".shuffled"))}
    found = {name: path for name, path in files.items() if path is not None}
    summary, audit = run / "summary.json", run / "audit" / "rewards.json"
    config, environment = load_config(run / "config.json"), _json(run / "environment.json")
    return RunFiles(
        config=config,
        environment=environment,
        metrics=[steps[step] for step in sorted(steps)],
        curve=[_json(path) for path in curve],
        evaluations=_asked_later(run, config, environment)
        | _baselines(run)
        | {name: _json(path) for name, path in found.items()},
        films=_films(*(_predictions(found.get(name)) for name in ("before", "after"))),
        summary=_json(summary) if summary.exists() else None,
        warnings=_lines(run / "warnings.jsonl"),
        audit=_json(audit) if audit.exists() else None,
    )


def drawable(boxes: Any) -> tuple[Box, ...]:
    """The boxes of a prediction that have an area; () for an unreadable answer."""
    # comparisons with nan are false, and infinite boxes have no place on a film
    return tuple(
        (x1, y1, x2, y2) for x1, y1, x2, y2 in boxes or () if -1e9 < x1 < x2 < 1e9 and -1e9 < y1 < y2 < 1e9
    )  # fmt: skip


def _evaluation_files(folder: Path) -> tuple[dict[tuple[int, str], Path], list[Path]]:
    """Whole evaluations by (step, "" or ".shuffled"), and the curve's files by rising step."""
    whole: dict[tuple[int, str], Path] = {}
    curve: dict[int, Path] = {}
    for path in folder.glob("step-*.json"):
        name = re.fullmatch(r"step-(\d+)(\.curve|\.shuffled|)\.json", path.name)
        if name and name[2] == ".curve":
            curve[int(name[1])] = path
        elif name:
            whole[int(name[1]), name[2]] = path
    return whole, [curve[step] for step in sorted(curve)]


def _baselines(run: Path) -> dict[str, Row]:
    path = run / "eval" / "baselines.json"
    return _json(path) if path.exists() else {}


def _asked_later(run: Path, config: Config, environment: Row) -> dict[str, Row]:
    """Controls of the run's export, asked greedily about its own test records (docs/evaluating.md)."""
    found: dict[str, Row] = {}
    paths = sorted((run / "eval").glob("*/eval.json")) if (run / "export" / "config.json").is_file() else []
    if not paths:
        return found
    from medground.weight_files import weights_hash  # and torch, which a page seldom needs

    wanted = {
        "split": config.data.test_split,
        "data_sha256": environment.get("data_sha256"),
        "model_sha256": weights_hash(run / "export"),
        "samples": 1,
        "temperature": 0,
    }
    for path in paths:
        result = _json(path)
        options, asked = (result.get(part, {}) for part in ("options", "evaluations"))
        if all(options.get(name) == value for name, value in wanted.items()):
            found |= {f"after_{name}": asked[name] for name in ("blank", "flipped") if name in asked}
            found |= {name: asked[name] for name in ("blind", "whole", "centre") if name in asked}
    return found


def _predictions(evaluation: Path | None) -> list[Row]:
    return _lines(evaluation.with_suffix(".predictions.jsonl")) if evaluation else []


def _films(before: list[Row], after: list[Row]) -> list[Film]:
    old = {row["id"]: row for row in before}
    new = {row["id"]: row for row in after}
    return [Film(row, old.get(row["id"]), new.get(row["id"])) for row in (after or before)]


def _json(path: Path) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; want the folder of a run") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want a JSON object; got {type(value).__name__}")
    return value


def _lines(path: Path) -> list[Row]:
    """Objects of a JSON lines file, [] without the file; a last line without its newline is still being written."""
    if not path.exists():
        return []
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {i}: not JSON: {error}") from None
    return rows
