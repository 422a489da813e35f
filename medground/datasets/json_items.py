"""JSON and JSONL annotations item by item, and boxes in them; every fault with its file and line or place."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medground.datasets.faults import Faults


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: no such file, or no JSON in UTF-8; names the file and line.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: want a file that can be read; got {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: want JSON; got {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: want JSON in UTF-8; got {error}") from None


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, item) of a JSON list, or of each line of a `.jsonl` file.

    Raises:
        ValueError: as `read_json`, or it is no list.
    """
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ValueError(f"{path}: want a file that can be read; got none")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{path}:{number}: want JSON in UTF-8; got {error}") from None
        return
    value = read_json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path}: want a list of items; got {type(value).__name__}")
    yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))


def four_numbers(where: str, field: str, value: Any, faults: Faults) -> tuple[float, float, float, float]:
    """`value` as four finite numbers; a fault is noted and zeros returned where it is something else."""
    right = (
        isinstance(value, list)
        and len(value) == 4
        and all(type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e9 for v in value)
    )
    if not right:
        faults.add(where, field, "four finite numbers", value)
        return 0.0, 0.0, 0.0, 0.0
    a, b, c, d = (float(v) for v in value)
    return a, b, c, d


def text(where: str, field: str, value: Any, faults: Faults) -> str:
    """`value` as a text that is not empty; a fault is noted and "" returned where it is something else."""
    if not isinstance(value, str) or not value.strip():
        faults.add(where, field, "a text that is not empty", value)
        return ""
    return value.strip()
