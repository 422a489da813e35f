"""The rows that benchmarks leave: a table, a JSON file, and the comparison of two.

python -m bench.table A.json                 the table, as Markdown
python -m bench.table A.json B.json          B's time over A's, row by row
python -m bench.table A.json B.json --fail 0.1    exit 1 where B is more than 10 % slower, beyond the spread
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NAN = float("nan")
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "deepspeed", "pytest-benchmark"
)  # fmt: skip


@dataclass
class Row:
    """One contender on one workload. A figure that was not measured is nan (null in JSON)."""

    op: str
    workload: str
    contender: str
    status: str = "ok"  # or "wrong: ...", "failed: ...", "skipped: ..."
    median: float = NAN  # seconds, as are p20 and p80
    p20: float = NAN
    p80: float = NAN
    samples: int = 0
    clock: str = ""
    versus: float = NAN  # time over ours of the same round, the median over rounds
    memory: float = NAN  # bytes at the peak beyond the inputs, results included
    rate: float = NAN
    unit: str = ""
    floor: str = ""
    floor_seconds: float = NAN
    of_floor: float = NAN
    value_error: float = NAN
    grad_error: float = NAN
    allowed_value: float = NAN
    allowed_grad: float = NAN
    launches: int = 0  # CUDA kernels, where counted

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.workload, self.contender


HEAD = ("contender", "ms", "p20", "p80", "x ours", "MB", "rate", "of floor", "error", "grad error")


def render(rows: Iterable[Row], markdown: bool = False) -> str:
    """One table: a line for each workload with its floor, under it a line for each contender."""
    rows = list(rows)
    cells = [_cells(row) for row in rows]
    width = [max(len(line[i]) for line in (HEAD, *cells)) for i in range(len(HEAD))]
    mark = "| " if markdown else "  "
    lines, last = [], None
    for row, line in zip(rows, cells, strict=True):
        if (row.op, row.workload) != last:
            last = row.op, row.workload
            floors = [r for r in rows if (r.op, r.workload) == last and r.floor]
            floor = _floor(floors[0]) if floors else ""
            title = f"{row.op}, {row.workload}{floor}"
            lines += ["", f"**{title}**" if markdown else title]
            lines += (
                ["", _join(HEAD, width, mark), "|" + "---|" * len(HEAD)] if markdown else [_join(HEAD, width, mark)]
            )
        note = "" if row.status == "ok" else f"  {row.status}"
        lines.append(_join((line[0] + note, *line[1:]) if markdown else line, width, mark) + (note * (not markdown)))
    return "\n".join(lines)


def _floor(row: Row) -> str:
    return f"; floor: {row.floor} at {row.rate / row.of_floor:.4g} {row.unit}, {row.floor_seconds * 1e3:.4g} ms"


def _join(cells: tuple[str, ...], width: list[int], mark: str) -> str:
    text = mark.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, width, strict=True)))
    return f"| {text} |" if mark == "| " else f"  {text}"


def _cells(row: Row) -> tuple[str, ...]:
    def show(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    times = [show(t * 1e3, ".4g") for t in (row.median, row.p20, row.p80)]
    rate = "-" if math.isnan(row.rate) else f"{row.rate:.3g} {row.unit}"
    return (
        row.contender, *times, show(row.versus, ".2f"), show(row.memory / 1e6, ".1f"), rate, show(row.of_floor, ".0%"),
        show(row.value_error, ".1e"), show(row.grad_error, ".1e"),
    )  # fmt: skip


def environment() -> dict[str, object]:
    """What the figures were measured with and on."""
    cuda = torch.cuda.is_available()
    dirty = _output("git", "status", "--porcelain")
    return {
        "device": device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT"),
        "dirty": None if dirty is None else bool(dirty),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def device_slug() -> str:
    """The device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def save(path: Path, rows: Iterable[Row], bars: list[dict]) -> None:
    """Write everything to a JSON file."""
    plain = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(r).items()} for r in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "bars": bars, "rows": plain}, indent=1) + "\n")


def load(path: Path) -> list[Row]:
    """The rows of a JSON file."""
    floats = {field.name for field in fields(Row) if field.type in (float, "float")}
    rows = json.loads(path.read_text())["rows"]
    return [Row(**{k: NAN if v is None and k in floats else v for k, v in row.items()}) for row in rows]


def compare(old: list[Row], new: list[Row], tolerance: float) -> tuple[str, list[Row]]:
    """A line for each row that both have, and the rows that got slower by more than tolerance and spread."""
    before = {row.key: row for row in old}
    lines, slower = [], []
    for row in new:
        was = before.get(row.key)
        if was is None:
            continue
        ratio = row.median / was.median
        # nan, so a contender that lost its speed, is not silently fine
        lost = math.isnan(row.median) and not math.isnan(was.median)
        if lost or (ratio > 1 + tolerance and row.p20 > was.p80):
            slower.append(row)
        if lost or not math.isnan(ratio):
            figure = "lost" if lost else f"{ratio:.3f}"
            lines.append(f"{figure:>7}  {', '.join(row.key)}" + ("   <- slower" if row in slower else ""))
    return "\n".join(lines), slower


def main() -> None:
    """Print one file's table, or compare two."""
    parser = argparse.ArgumentParser(description="Show the results of a benchmark run, or compare two.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--fail", type=float, default=None, metavar="TOLERANCE", help="exit 1 where slower by more")
    args = parser.parse_args()
    if len(args.files) > 2:
        parser.error(f"want one file or two; got {len(args.files)}")
    if len(args.files) == 1:
        print(render(load(args.files[0]), markdown=True))
        return
    text, slower = compare(*(load(file) for file in args.files), 0.1 if args.fail is None else args.fail)
    print(text)
    sys.exit(bool(slower) and args.fail is not None)


if __name__ == "__main__":
    main()
