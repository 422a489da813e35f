"""The folder of an evaluation (docs/evaluating.md): what is in it already, and what is added as answers come.

    options.json                what it was started with; another evaluation is refused
    parts/rank-0.jsonl          a line for each finished piece, while the evaluation goes on
    predictions.jsonl           and predictions.CONTROL.jsonl, when all is done
    eval.json                   written last

A piece is a fixed slice of the records, so that its answers depend neither on the rank that gives them nor on what was
finished before. A last line that a kill has torn does not count.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from medground.run_folder import LOCK, hold, write_json

EVAL, OPTIONS, PARTS = "eval.json", "options.json", "parts"

Row = dict[str, Any]


class Piece(NamedTuple):
    """A slice of what is asked: of which evaluation ("true" or a control), and its number."""

    evaluation: str
    number: int


def start(out: Path, asked: Mapping[str, Any]) -> TextIO:
    """Take hold of a new folder, or of one where the same evaluation was begun; on one rank.

    Args:
        out: the folder.
        asked: what decides its results, as JSON has it.

    Returns:
        What holds the folder while it is open.

    Raises:
        ValueError: it holds another evaluation or other files, or is written to by another process.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: want a folder; got the file {out}")
    started = out / OPTIONS
    if not started.is_file() and out.is_dir() and any(path.name not in (LOCK, PARTS) for path in out.iterdir()):
        raise ValueError(f"out: want a new folder, or one of an evaluation; {out} holds other files")
    lock = hold(out)
    try:
        if started.is_file():
            theirs = json.loads(started.read_text(encoding="utf-8"))
            names = sorted({*asked, *theirs}, key=[*asked, *theirs].index)
            differ = [
                f"{n}: {asked.get(n)!r} against {theirs.get(n)!r}" for n in names if asked.get(n) != theirs.get(n)
            ]
            if differ:
                raise ValueError(f"{out}: want the options that it was started with; got {'; '.join(differ)}")
        else:
            write_json(started, dict(asked))
        (out / PARTS).mkdir(exist_ok=True)
    except ValueError:
        lock.close()
        raise
    return lock


def finished(out: Path) -> dict[Piece, list[Row]]:
    """The rows of each piece that is finished.

    Raises:
        ValueError: a line is damaged, other than the last of its file.
    """
    found: dict[Piece, list[Row]] = {}
    for path in sorted((out / PARTS).glob("rank-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                value = json.loads(line)
                found.setdefault(Piece(value["evaluation"], value["piece"]), value["rows"])
            except (ValueError, KeyError, TypeError) as error:
                told = f"want a finished piece; got {error!r}; without this file the evaluation asks again"
                raise ValueError(f"{path}:{number}: {told}") from None
    return found


def complete(out: Path, result: Mapping[str, Any]) -> None:
    """Write eval.json; the predictions are there."""
    write_json(out / EVAL, dict(result))
    shutil.rmtree(out / PARTS)


class Part:
    """Where a rank writes the pieces that it finishes."""

    def __init__(self, out: Path, rank: int):
        """Open it, after its last whole line."""
        path = out / PARTS / f"rank-{rank}.jsonl"
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("ab")

    def add(self, piece: Piece, rows: list[Row]) -> None:
        """Write a piece; on the disk when this returns."""
        line = json.dumps({"evaluation": piece.evaluation, "piece": piece.number, "rows": rows})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of it."""
        self._file.close()
