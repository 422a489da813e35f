"""CSV files row by row: columns that must be there, cells that must be numbers, every fault with its line and column.

Read as CSV files come: with or without a byte-order mark, either kind of line end, quoted cells that span lines,
gzipped. Blank lines are no rows.
"""

import csv
import gzip
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from medground.datasets.faults import Faults

MAX_CELL = 1 << 20  # characters


class Row:
    """One row: cells by the name of their column, stripped of blanks; `where` is file:line of its first line."""

    def __init__(self, where: str, cells: dict[str, str]) -> None:
        self.where = where
        self.cells = cells

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def get(self, column: str) -> str:
        """The cell, "" where the file has no such column."""
        return self.cells.get(column, "")

    def text(self, column: str, faults: Faults) -> str:
        """The cell, which may not be empty: else a fault is noted and "" returned."""
        if not self.cells[column]:
            faults.add(self.where, column, "a text that is not empty", "")
        return self.cells[column]

    def number(self, column: str, faults: Faults) -> float | None:
        """The cell as a finite number; None where it is none, and a fault noted."""
        try:
            value = float(self.cells[column])
        except ValueError:
            value = math.nan
        if not abs(value) < 1e9:  # NaN too
            faults.add(self.where, column, "a finite number", self.cells[column])
            return None
        return value

    def pixels(self, column: str, faults: Faults) -> int | None:
        """The cell as a whole number of pixels >= 1; None where it is none, and a fault noted."""
        value = self.number(column, faults)
        if value is None:
            return None
        if value < 1 or value != int(value):
            faults.add(self.where, column, "a whole number of pixels >= 1", self.cells[column])
            return None
        return int(value)


def read_table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file, one at a time.

    Args:
        path: of the file; `.gz` is unpacked.
        columns: that it must have, in any order; others are read too.

    Raises:
        ValueError: no such file, not UTF-8, not CSV, a column missing, or a row of another length than the header;
            names the file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    csv.field_size_limit(MAX_CELL)
    with _open(path) as file:
        reader = csv.reader(_lines(file, path), strict=True)
        names = _next(reader, path)
        if names is None:
            raise ValueError(f"{path}:1: header: want columns {', '.join(columns)}; got an empty file")
        names = [name.strip() for name in names]
        _check_header(path, names, columns)
        while True:
            line = reader.line_num + 1
            cells = _next(reader, path)
            if cells is None:
                return
            if not cells:
                continue
            where = f"{path}:{line}"
            if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
                raise ValueError(f"{where}: line: want {len(names)} cells, as the header has; got {len(cells)}")
            yield Row(where, {name: cell.strip() for name, cell in zip(names, cells, strict=False) if name})


def has_column(path: Path, column: str) -> bool:
    """Whether the file's header has the column.

    Raises:
        ValueError: as `read_table`, of the first line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with _open(path) as file:
        return column in [name.strip() for name in _next(csv.reader(_lines(file, path)), path) or []]


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _check_header(path: Path, names: list[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(
            f"{path}:1: header: want columns {', '.join(columns)}; got {', '.join(names)} "
            f"(missing: {', '.join(missing)})"
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}:1: header: want each column once; got {', '.join(twice)} several times")


def _lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(file, 1):
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: line: want UTF-8; got {error.object[error.start :][:8]!r}") from None
    except (OSError, EOFError) as error:  # a damaged gzip file
        raise ValueError(f"{path}:{number + 1}: line: want a file that can be read; got {error}") from None


def _next(reader: Iterator[list[str]], path: Path) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: line: want CSV; got {error}") from None  # type: ignore[attr-defined]
