"""The journal of a preparation: a line for each finished job, so that what was interrupted continues.

Its first line holds the settings: another preparation's journal is refused. A last line that a kill has torn is cut.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medground.datasets.inventory import json_line

JOURNAL = ".prepare.jsonl"


class Journal:
    """Results of finished jobs by key; only their places in the file are held in memory."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the folder's journal, or begin one.

        Raises:
            ValueError: it is of another preparation.
        """
        self.path = folder / JOURNAL
        self._places: dict[str, int] = {}
        end = self._read(settings) if self.path.exists() else 0
        if not end:
            self.path.write_text(json_line({"settings": settings}), encoding="utf-8")
        else:
            os.truncate(self.path, end)
        self._old = self.path.open("rb")
        self._new = self.path.open("ab")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._old.close()
        self._new.close()

    def find(self, key: str) -> dict[str, Any] | None:
        """The result of an earlier run's job, None where there is none."""
        if key not in self._places:
            return None
        self._old.seek(self._places[key])
        return json.loads(self._old.readline())["done"]

    def add(self, key: str, done: Mapping[str, Any]) -> None:
        """Note the result of a job."""
        self._new.write(json_line({"key": key, "done": done}).encode())
        self._new.flush()

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Finds the jobs; returns where the last whole line ends."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                if end:
                    self._places[value["key"]] = end
                else:
                    check_settings(self.path.parent, value["settings"], settings)
                end += len(line)
        return end


def check_settings(out: Path, theirs: Any, ours: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder was prepared with other settings; names them."""
    theirs = theirs if isinstance(theirs, dict) else {}
    names = sorted(name for name in {*ours, *theirs} if theirs.get(name) != ours.get(name))
    if names:
        differ = ", ".join(f"{name} {theirs.get(name)!r}" for name in names)
        raise ValueError(f"out: want a new folder, or the settings it was prepared with; got {out}, which has {differ}")
