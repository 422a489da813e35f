"""A profile as text: seconds of each phase with their spread, and what the traced step spent them on."""

from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any

from bench.gpu_watch import throttle_line


def by_group(kernels: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(phase, group) -> calls, seconds, flops."""
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: {"calls": 0, "seconds": 0.0, "flops": 0})
    for kernel in kernels:
        mine = sums[kernel["phase"], kernel["group"]]
        for what in mine:
            mine[what] += kernel[what]
    return dict(sums)


def phase_table(result: dict[str, Any], shown: int = 3) -> str:
    """Markdown: phases, their seconds, their share of the step, the groups of kernels that took most of them."""
    groups = by_group(result["traced"]["kernels"])
    whole = median(result["step"])
    lines = ["| phase | ms | least to most | share | kernels: ms of the traced step |", "|---|---|---|---|---|"]
    for phase, seconds in result["phases"].items():
        mine = sorted(((s["seconds"], group) for (p, group), s in groups.items() if p == phase), reverse=True)[:shown]
        spent = ", ".join(f"{group} {own * 1e3:.3g}" for own, group in mine)
        lines.append(
            f"| {phase} | {median(seconds) * 1e3:.4g} | {min(seconds) * 1e3:.4g} to {max(seconds) * 1e3:.4g} "
            f"| {median(seconds) / whole:.1%} | {spent} |"
        )
    lines.append(
        f"| step | {whole * 1e3:.4g} | {min(result['step']) * 1e3:.4g} to {max(result['step']) * 1e3:.4g} | | |"
    )
    lines += ["", ", ".join(f"{rate_label(name)} {rate:.4g}" for name, rate in result["rates"].items())]
    lines += disturbances(result)
    if found := result["traced"]["idle"]:
        lines.append("GPU: " + ", ".join(f"{cause} {seconds * 1e3:.4g} ms" for cause, seconds in found.items()) + ".")
    return "\n".join(lines)


def rate_label(name: str) -> str:
    """A key of `rates` as a heading: tokens_per_second is tokens/s."""
    return name.replace("_per_second", "/s").replace("_", " ")


def disturbances(result: dict[str, Any]) -> list[str]:
    """What makes the times of a profile doubtful: others used the machine, or the GPU was throttled."""
    cores, gpu, found = result["others_cores"], result["gpu"], []
    if cores and cores > 0.2:
        found.append(f"Other processes used {cores:.2g} cores meanwhile: times are not to be trusted.")
    if gpu.get("marked"):
        found.append(f"The GPU was {throttle_line(gpu)}.")
    return found
