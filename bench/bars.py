"""The bars of the kernels: what was wanted, what was measured. Printed beside the table; nothing fails on them."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from bench.table import Row

CPU_BAR = "N 1024 H 512 V 32000 float32"


@dataclass(frozen=True)
class Bar:
    """One promise on one workload."""

    name: str
    wanted: str
    measured: str
    met: bool

    def plain(self) -> dict:
        return asdict(self)


def bars(rows: Iterable[Row], cuda: bool) -> list[Bar]:
    """Those whose rows were measured, on this kind of device."""
    by_op: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.status == "ok":
            by_op.setdefault((row.op, row.workload), {})[row.contender] = row
    found = []
    for (op, workload), race in by_op.items():
        if "ours" in race:
            found += _on_cuda(op, workload, race) if cuda else _on_cpu(op, workload, race)
    return found


def _on_cuda(op: str, workload: str, race: dict[str, Row]) -> Iterator[Bar]:
    ours, name = race["ours"], f"{op}, {workload}"
    if op.startswith("token_logprob"):
        share = 0.85 if "backward" in op else 0.90
        yield Bar(name, f"{share:.0%} of the copy's rate", f"{ours.of_floor:.1%}", ours.of_floor >= share)
    elif op == "linear_grpo":
        ratio = ours.median / ours.floor_seconds
        yield Bar(name, "at most 1.15x the three products", f"{ratio:.3f}x", ratio <= 1.15)
        for peer, least in (("TRL", 1.3), ("Liger", 5.0)):
            if peer in race:
                ratio = race[peer].versus
                yield Bar(name, f"at least {least}x faster than {peer}", f"{ratio:.2f}x", ratio >= least)
        if workload.startswith("N 8192"):
            yield from _memory(name, race)
    elif op in ("sample_token", "rewards"):
        launches = f", {ours.launches} launches" if ours.launches else ""
        wanted = "under 30 us" + (", two launches" if op == "rewards" else "")
        met = ours.median < 30e-6 and (op != "rewards" or ours.launches == 2)
        yield Bar(name, wanted, f"{ours.median * 1e6:.1f} us{launches}", met)


def _memory(name: str, race: dict[str, Row]) -> Iterator[Bar]:
    for contender, most in (("ours", 1.3e9), ("ours, small budget", 0.2e9)):
        if contender in race:
            row = race[contender]
            extra = row.memory - gradient_bytes(row.workload)
            measured = f"{extra / 1e9:.2f} GB in {row.median * 1e3:.2f} ms ({row.memory / 1e9:.2f} GB with them)"
            wanted = f"at most {most / 1e9:.1f} GB beyond the gradients, the head's in float32"
            yield Bar(f"{name}, {contender}", wanted, measured, extra <= most)


def gradient_bytes(workload: str) -> int:
    """What linear_grpo's gradients take: the head's in float32, in which it is summed, and that of hidden states."""
    words = workload.split()
    N, H, V = (int(words[words.index(letter) + 1]) for letter in "NHV")
    return V * H * 4 + N * H * (4 if words[-1] == "float32" else 2)


def _on_cpu(op: str, workload: str, race: dict[str, Row]) -> Iterator[Bar]:
    if op == "linear_grpo" and workload == CPU_BAR and "torch" in race:
        ours, plain = race["ours"], race["torch"]
        name = f"{op}, {workload}"
        for what, most, ratio in (
            ("time", 1.05, 1 / plain.versus),
            ("peak memory", 0.40, ours.memory / plain.memory),
        ):
            yield Bar(name, f"{what} at most {most:.2f}x linear + log_softmax + gather", f"{ratio:.3f}x", ratio <= most)


def render_bars(found: list[Bar]) -> str:
    """A line for each."""
    width = [max(len(getattr(bar, column)) for bar in found) for column in ("name", "wanted", "measured")]
    return "\n".join(
        f"  {'met   ' if bar.met else 'MISSED'}  {bar.name:{width[0]}}  {bar.wanted:{width[1]}}  {bar.measured}"
        for bar in found
    )
