"""Runs the benchmarks: the fixture `race`, and the table, bars and JSON at the end of the session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import race as racing
from bench.bars import bars, render_bars
from bench.race import OURS, Contender, Floor, Judge
from bench.table import Row, device_slug, environment, render, save

ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--save", action="store_true", help="write bench/results/<device>.json, to be committed")
    group.addoption("--json", type=Path, default=None, help="where the results go (default .benchmarks/<device>.json)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # one table, ours


@pytest.fixture
def race(benchmark) -> Callable[..., list[Row]]:
    """race(op, workload, {name: Contender}, judge, ...): measure, keep the rows, fail where ours is wrong."""

    def measure(
        op: str,
        workload: object,
        contenders: dict[str, Contender],
        judge: Judge,
        *,
        dtype: torch.dtype,
        floor: Floor | None = None,
        **limits: float,
    ) -> list[Row]:
        rows = racing.run(
            op, str(workload), contenders, judge, dtype=dtype, floor=floor, pedantic=benchmark.pedantic, **limits
        )
        ROWS.extend(rows)
        benchmark.extra_info["contenders"] = {row.contender: row.status for row in rows}
        wrong = [
            f"{r.contender}: {r.status}; errors {r.value_error:.1e}, {r.grad_error:.1e}"
            for r in rows
            if r.contender.startswith(OURS) and r.status != "ok"
        ]
        assert not wrong, wrong
        return rows

    return measure


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    found = bars(ROWS, torch.cuda.is_available())
    about = environment()
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in about["packages"].items())
    terminalreporter.section("kernels")
    write(f"{about['device']}; {versions}; commit {str(about['commit'])[:12]}{' (dirty)' if about['dirty'] else ''}")
    write("ms: median, 20th and 80th percentile; x ours: time over ours in the same round, the median.")
    write("MB: peak beyond the inputs, results included.")
    write("error: root mean square against float64, over the truth's; every row of the workload is compared.")
    write(render(ROWS))
    if found:
        write("\nBars")
        write(render_bars(found))
    paths = [config.getoption("--json") or Path(config.rootpath, ".benchmarks", f"{device_slug()}.json")]
    paths += [Path(config.rootpath, "bench/results", f"{device_slug()}.json")] * config.getoption("--save")
    for path in paths:
        save(path, ROWS, [bar.plain() for bar in found])
        write(f"\n{path}")
