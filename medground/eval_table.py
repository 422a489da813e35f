"""eval.json -> a table for a terminal: an evaluation or control a line, metrics with their intervals."""

from collections.abc import Mapping
from typing import Any

_METRICS = {  # metric -> heading
    "miou": "mean IoU",
    "acc@0.5": "IoU > 0.5",
    "side": "right side",
    "absent": "absent, said so",
    "parse_failures": "unreadable",
}
_NAMES = {
    "true": "the model",
    "shuffled": "  another patient's image",
    "blank": "  a grey image",
    "flipped": "  mirrored image",
    "blind": "best constant per phrase",
    "whole": "whole image",
    "centre": "middle of the image",
}
_WIDE, _NARROW = 28, 21


def table(result: Mapping[str, Any]) -> str:
    """The lines of it.

    Args:
        result: eval.json.
    """
    options, found = result["options"], result["evaluations"]
    lines = [
        f"{options['model']}, split {options['split']} of {', '.join(options['data'])}: {result['records']} records, "
        f"template {options['template']}",
        "",
        " " * _WIDE + "".join(f"{heading:>{_NARROW}}" for heading in _METRICS.values()),
    ]
    for name in _NAMES:
        if name not in found:
            continue
        lines.append(_line(_NAMES[name], found[name]["metrics"]))
        if best := found[name].get("best_of_k"):
            lines.append(_line(f"  best of {options['samples']}", best))
    lines.append("\n95 % intervals: bootstrap over patients." + _means(options["samples"]))
    if flipped := found.get("flipped"):
        lines.append(
            f"The mirrored answer, mirrored back, overlaps the plain one: IoU {_estimate(flipped['agreement'])}."
        )
        if unswapped := flipped["phrases_not_swapped"]:
            lines.append(f"In {unswapped} phrases the sides could not be swapped safely; they were asked as they are.")
    return "\n".join(lines)


def _means(samples: int) -> str:
    return f" Means over {samples} completions of each record." if samples > 1 else ""


def _line(name: str, metrics: Mapping[str, Any]) -> str:
    return f"{name:{_WIDE}}" + "".join(f"{_estimate(metrics[metric]):>{_NARROW}}" for metric in _METRICS)


def _estimate(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.3f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
