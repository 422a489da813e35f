"""Profiles on disk: one in a folder, and the history of a workload on a device.

A history is `profiles/<device>/<workload>.json`: a JSON list of profiles, the oldest first, one a line, so that a diff
shows what came in. Its entries lack the curves of the traced step (`CURVES`), which are long and no verdict needs.
"""

import json
from pathlib import Path
from typing import Any

from bench.table import device_slug
from profiles.tables import disturbances

FORMAT = 1
FOLDER = Path(__file__).parent
CURVES = ("memory", "timeline")
_PARTS = {
    "workload.name": str,
    "environment.device": str,
    "environment.on": str,
    "environment.date": str,
    "phases": dict,
    "rates.tokens_per_second": float,
    "traced.kernels": list,
    "traced.counts": dict,
    "traced.step": float,
    "traced.peak_memory": int,
}
_OF_A_KERNEL = {"name", "group", "phase", "calls", "seconds", "flops"}


def load(path: Path) -> dict[str, Any]:
    """Read a profile from its folder or its file.

    Raises:
        ValueError: there is none, or one of another format.
    """
    path = path / "profile.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: want a profile written by profiles.record ({error})") from None
    if wrong := _wrong(found):
        raise ValueError(f"{path}: {wrong}")
    return found


def history_path(workload: str, folder: Path = FOLDER) -> Path:
    """Where the history of a workload on this device is, or will be."""
    return folder / device_slug() / f"{workload}.json"


def load_history(path: Path) -> list[dict[str, Any]]:
    """Profiles of one workload on one device, the oldest first; none where there is no file.

    Raises:
        ValueError: the file is damaged: which line or entry of it, and how.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: want a JSON list of profiles, one a line ({error.msg})"
        ) from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: want a JSON list of profiles; got {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        if wrong := _wrong(entry) or _misplaced(entry, path.stem, entries[0]["environment"]["device"]):
            raise ValueError(f"{path}, entry {number}: {wrong}")
    return entries


def keep(result: dict[str, Any], anyway: bool = False, folder: Path = FOLDER) -> Path:
    """Append a profile of this device to its history: the file.

    Raises:
        ValueError: something disturbed it (not `anyway`), or the history is damaged.
    """
    path = history_path(result["workload"]["name"], folder)
    entries = load_history(path)
    if (doubts := disturbances(result)) and not anyway:
        raise ValueError(f"not kept in {path} (--anyway keeps it all the same): {' '.join(doubts)}")
    traced = {what: value for what, value in result["traced"].items() if what not in CURVES}
    lines = [json.dumps(entry, separators=(",", ":")) for entry in [*entries, result | {"traced": traced}]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return path


def _wrong(found: Any) -> str | None:
    """What is wrong with a profile, if anything."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        return f"want a profile of format {FORMAT}; got {got!r}"
    for name, kind in _PARTS.items():
        value: Any = found
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            return f"want {name} of type {kind.__name__}; got {value!r}"
    for row in found["traced"]["kernels"]:
        if not isinstance(row, dict) or not row.keys() >= _OF_A_KERNEL:
            return f"want kernels with {', '.join(sorted(_OF_A_KERNEL))}; got {row!r}"
    for name, seconds in {**found["phases"], "step": found.get("step")}.items():
        if not isinstance(seconds, list) or not seconds or not all(_is_time(s) for s in seconds):
            return f"want a list of seconds for {name}; got {seconds!r}"
    return None


def _misplaced(entry: dict[str, Any], workload: str, device: str) -> str | None:
    """Whether a profile is of something else than its history."""
    name, where = entry["workload"]["name"], entry["environment"]["device"]
    if name != workload:
        return f"want the workload {workload}; got {name}"
    return None if where == device else f"want the device of entry 1, {device}; got {where}"


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0
