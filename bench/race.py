"""One workload: every contender is checked against the float64 truth, then timed in turn with the others.

No speed without correctness: a contender whose error exceeds what is allowed has none in its row. Ours may be twice
as far off as plain PyTorch in the same dtype plus a slack, and its test fails otherwise; a peer may be 5 % off
(some save work by being inexact), and only its row tells.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import timing
from bench.table import Row

OURS, YARDSTICK = "ours", "torch"
SLACK = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
PEER_ALLOWED = 0.05
BUDGET = 0.3 if torch.cuda.is_available() else 0.5
"""Seconds of samples for each contender of a race."""

Result = dict[str, Tensor | Callable[[], Tensor]]
"""What a call returns: values and gradients by name; a gradient's begins with d. A function is called off the clock."""


class UnavailableError(Exception):
    """This contender cannot run here; says why."""


@dataclass(frozen=True)
class Contender:
    """`build()` gives the call that is timed; raises UnavailableError where it cannot."""

    build: Callable[[], Callable[[], Result]]
    prepare: Callable[[], object] | None = None  # before every call, untimed


@dataclass(frozen=True)
class Floor:
    """The least time the work can take: `needed` bytes or operations at the rate that `call` reaches with `done`."""

    name: str
    unit: str  # "GB/s" or "TF/s"
    call: Callable[[], object]
    done: float
    needed: float

    def rate(self, seconds: float) -> float:
        return self.needed / seconds / (1e9 if self.unit == "GB/s" else 1e12)


@dataclass(frozen=True)
class Errors:
    """Relative to the truth's root mean square; nan where a contender computes none."""

    value: float
    grad: float


Judge = Callable[[Result], Errors]


def against(truth: dict[str, Tensor]) -> Judge:
    """Compare all that a contender returns with the float64 truth of the same name."""

    def judge(result: Result) -> Errors:
        if not result.keys() <= truth.keys():
            raise ValueError(f"want results among {sorted(truth)}; got {sorted(result)}")
        worst = {"value": float("nan"), "grad": float("nan")}
        for name, got in result.items():
            kind = "grad" if name.startswith("d") else "value"
            error = relative_error(got() if callable(got) else got, truth[name])
            # a nan that a result has must not be lost: it is the worst error there is
            error = float("inf") if error != error else error
            worst[kind] = error if worst[kind] != worst[kind] else max(worst[kind], error)
        return Errors(**worst)

    return judge


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth, a scalar's at least 1 (a loss may cancel to 0)."""
    if got.shape != truth.shape:
        return float("inf")
    off, size = torch.zeros((), device=truth.device).double(), torch.zeros((), device=truth.device).double()
    for a, b in zip(got.detach().flatten().split(1 << 26), truth.flatten().split(1 << 26), strict=True):
        off += (a.double() - b).square().sum()
        size += b.double().square().sum()
    return (off / (size.clamp(min=1) if truth.dim() == 0 else size)).sqrt().item()


def run(
    op: str,
    workload: str,
    contenders: dict[str, Contender],
    judge: Judge,
    *,
    dtype: torch.dtype,
    floor: Floor | None,
    pedantic: Callable,
    budget: float = BUDGET,
    most: int = 30,
) -> list[Row]:
    """All rows of one workload, ours first. Ours raises what it raises; a peer's row tells."""
    rows = {name: Row(op, workload, name) for name in contenders}
    turns: dict[str, timing.Turn] = {}
    seconds: dict[str, float] = {}
    # the yardstick first: ours is measured by it
    for name in sorted(contenders, key=lambda name: name != YARDSTICK):
        try:
            turn, seconds[name] = _admit(contenders[name], rows[name], judge)
        except Exception as error:
            if name.startswith(OURS):
                raise
            kind = "skipped" if isinstance(error, UnavailableError) else f"failed: {type(error).__name__}"
            rows[name].status = f"{kind}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
            _forget()
            continue
        _allow(rows[name], rows.get(YARDSTICK), dtype)
        if rows[name].status == "ok":
            turns[name] = turn
    turns = {name: turns[name] for name in contenders if name in turns}  # ours leads
    _time(rows, turns, seconds, floor, pedantic, budget, most)
    return list(rows.values())


def _admit(contender: Contender, row: Row, judge: Judge) -> tuple[timing.Turn, float]:
    """First call (it compiles), error, peak memory, rough time."""
    turn = timing.Turn(contender.build(), contender.prepare)
    if turn.prepare:
        turn.prepare()
    errors = judge(turn.call())
    row.value_error, row.grad_error = errors.value, errors.grad
    seconds = timing.timed(turn)
    if seconds < 10 * timing.SHORT:  # the second call may still have compiled for another thread or shape
        seconds = min(seconds, timing.timed(turn))
    row.memory = timing.peak_memory(turn)
    return turn, seconds


def _allow(row: Row, yardstick: Row | None, dtype: torch.dtype) -> None:
    row.allowed_value = row.allowed_grad = PEER_ALLOWED
    if row.contender.startswith(OURS):
        plain = yardstick if yardstick is not None and yardstick.status == "ok" else Row("", "", "")
        row.allowed_value, row.allowed_grad = (
            SLACK[dtype] + (2 * error if error == error else 0.0) for error in (plain.value_error, plain.grad_error)
        )
    errors = ((row.value_error, row.allowed_value), (row.grad_error, row.allowed_grad))
    if all(error != error for error, _ in errors) or any(error > allowed for error, allowed in errors):
        row.status = f"wrong: allowed {row.allowed_value:.1e}, gradients {row.allowed_grad:.1e}"


def _time(rows, turns, seconds, floor, pedantic, budget, most):
    if not any(name.startswith(OURS) for name in turns):
        return
    if floor:
        turns["floor"] = timing.Turn(floor.call)
        timing.timed(turns["floor"])
        seconds["floor"] = timing.timed(turns["floor"])
    ours = min(seconds[name] for name in turns if name.startswith(OURS))
    if torch.cuda.is_available() and ours < timing.SHORT:
        times = timing.alternate_short(turns, pedantic)
    else:
        times = timing.alternate(turns, seconds, pedantic, budget, most=most)
    for name, row in rows.items():
        if name not in times:
            continue
        row.median, row.p20, row.p80, row.samples, row.clock, row.versus = times[name]
        if floor:
            row.unit, row.rate = floor.unit, floor.rate(row.median)
            at_floor = times["floor"].median * floor.needed / floor.done
            row.floor, row.floor_seconds, row.of_floor = floor.name, at_floor, at_floor / row.median


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_floor(needed: int) -> Floor:
    """`needed` bytes at the rate of a copy from device memory to device memory, read and write counted."""
    size = 1 << 30 if torch.cuda.is_available() else 1 << 27
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return Floor("copy", "GB/s", lambda: target.copy_(source), 2 * size, needed)


def product_floor(N: int, H: int, V: int, dtype: torch.dtype, names: tuple[str, ...]) -> Floor:
    """The bare matrix products of a head, each once over all N rows, into outputs that exist already."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, logits = (torch.randn(size, dtype=dtype, device=device) for size in ((N, H), (V, H), (N, V)))
    out = {"logits": torch.empty_like(logits), "dhidden": torch.empty_like(hidden), "dweight": torch.empty_like(weight)}
    factors = {"logits": (hidden, weight.T), "dhidden": (logits, weight), "dweight": (logits.T, hidden)}

    def products() -> None:
        for name in names:
            torch.mm(*factors[name], out=out[name])

    work = 2.0 * N * H * V * len(names)
    return Floor(f"{len(names)} products", "TF/s", products, work, work)
