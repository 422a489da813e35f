"""What `bench.steps` measured, as numbers and as Markdown."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.gpu_watch import joules_per_1000_completion_tokens, throttle_line
from bench.packed import speedup
from bench.step_job import PHASES, Job, Seconds

RATES = {
    "tokens_per_second": ("completion tokens/s", "completion tokens / seconds"),
    "processed_tokens_per_second": (
        "processed tokens/s",
        "(prompt tokens as often as the update runs them + completion tokens) / seconds",
    ),
    "unpacked_tokens_per_second": (
        "tokens/s, counted as unpacked",
        "(G * prompt tokens + completion tokens) / seconds: what trainers of rows report",
    ),
    "samples_per_second": ("completions/s", "completions / seconds"),
    "mfu": ("MFU", "operations of the step (medground/costs.py) / seconds / the GPU's bfloat16 peak"),
    "of_products": ("of one large product's rate", "operations of the step / seconds / rate of a large product here"),
    "joules_per_1000_tokens": ("J per 1000 completion tokens", "energy from NVML / completion tokens * 1000"),
}
"""Name in JSON -> what the table calls it, and its formula. All sides get the operations of ours: those of the job."""

WATCHED = {
    "power_watts": "power, W",
    "sm_clock_mhz": "SM clock, MHz",
    "sm_utilisation_percent": "SM utilisation, %",
    "temperature_celsius": "temperature, C",
}
"""Means over a side's steps (bench/gpu_watch.py) -> what the table calls them."""

PUBLISHED = (
    "Published, not measured here (EasyR1 v0.3.2, assets/baselines.md; Geo3K, Qwen2.5-VL, 8 H100 80GB, vLLM): "
    "tokens/s and GPU, counted as unpacked over the whole step, 1800 (3B), 1600 to 2000 (7B); MFU of the update "
    "alone, text only, 8.1 % (3B), 16.0 to 23.2 % (7B); 54 to 72 GB a GPU. Other data and lengths, 512 prompts of 5 "
    "completions a step."
)


@dataclass
class Measured:
    """A side.

    Attributes:
        seconds: of each round.
        gap: how far our gradient of its first step is from its own.
        peak_bytes: most that a step held: in all on a GPU, beyond what was there before it on a CPU.
        gpu: what `bench.gpu_watch` saw while it ran.
        failed: why it did not run.
    """

    seconds: list[Seconds] = field(default_factory=list)
    gap: float | None = None
    peak_bytes: int | None = None
    gpu: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


def summarise(job: Job, name: str, side: Measured, ours: Measured, work: dict[str, Any]) -> dict[str, Any]:
    """One side as JSON has it.

    Args:
        job: what it did.
        name: of the side.
        side: what it took.
        ours: what we took in the same rounds.
        work: `tokens` and `operations` of each round, `peak` (or None) and `product` rates of the device.
    """
    if side.failed:
        return {"failed": side.failed}
    whole = [seconds["step"] for seconds in side.seconds]
    G, prompts = job.size.G, len(job.examples) * job.size.P
    runs = 1 if name == "ours" else G
    rates = [
        {
            "tokens_per_second": tokens / s,
            "processed_tokens_per_second": (runs * prompts + tokens) / s,
            "unpacked_tokens_per_second": (G * prompts + tokens) / s,
            "samples_per_second": len(job.examples) * G / s,
            "of_products": operations / s / work["product"],
            **({"mfu": operations / s / work["peak"]} if work["peak"] else {}),
        }
        for tokens, operations, s in zip(work["tokens"], work["operations"], whole, strict=True)
    ]
    found = {rate: median(row[rate] for row in rates) for rate in rates[0]}
    if joules := joules_per_1000_completion_tokens(side.gpu, sum(work["tokens"])):
        found["joules_per_1000_tokens"] = joules
    return {
        "seconds": {phase: _spread([seconds[phase] for seconds in side.seconds]) for phase in ("step", *PHASES)},
        "rates": found,
        "speedup": speedup(whole, [seconds["step"] for seconds in ours.seconds]),
        "gradient_gap": side.gap,
        "peak_bytes": side.peak_bytes,
        "gpu": side.gpu,
        "rounds": side.seconds,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    work, about = result["workload"], result["environment"]
    ran = {name: side for name, side in result["sides"].items() if "failed" not in side}
    versions = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "transformers", "trl"))
    lines = [
        f"**{work['name']}**: {work['prompts']} prompts of {work['P']} tokens, {work['image_tokens']} the image's, "
        f"G {work['G']}; answers {work['answers']}; Qwen2.5-VL of random weights, shape {work['model']}. "
        f"{about['device']}; {versions}; {len(ran['ours']['rounds'])} rounds.",
        "",
        *_phase_table(ran, result["floors"]),
        "",
        *_rate_table(ran),
        "",
        *(f"{label} = {formula}." for rate, (label, formula) in RATES.items() if rate in ran["ours"]["rates"]),
        "",
    ]
    for name, side in result["sides"].items():
        if "failed" in side:
            lines.append(f"{name}: {side['failed']}.")
        elif name != "ours":
            s = side["speedup"]
            lines.append(
                f"{name} takes {s['median']:.2f} times as long as ours in the same round ({s['least']:.2f} to "
                f"{s['most']:.2f}); gradients differ by {side['gradient_gap']:.1e} of theirs."
            )
    checkpoint = result["checkpoint_seconds"]
    lines += [
        f"A checkpoint of ours holds the loop up for {result['checkpoint_stall_seconds']:.2g} s and is written after "
        f"{checkpoint:.3g} s."
        if checkpoint
        else "No checkpoint was taken.",
        PUBLISHED,
    ]
    lines += [f"{name}: {line}" for name, side in ran.items() if side["gpu"] and (line := throttle_line(side["gpu"]))]
    return "\n".join(lines)


def _phase_table(ran: dict[str, Any], floors: dict[str, float]) -> list[str]:
    others = [name for name in ran if name != "ours"]
    lines = [
        "| ms | ours | least to most | floor | of floor | " + " | ".join(others) + " |",
        "|---" * (5 + len(others)) + "|",
    ]
    for phase in ("step", *PHASES):
        mine, floor = ran["ours"]["seconds"][phase], floors[phase]
        theirs = [f"{ran[name]['seconds'][phase]['median'] * 1e3:.4g}" for name in others]
        spread = f"{mine['least'] * 1e3:.4g} to {mine['most'] * 1e3:.4g}"
        share = (f"{floor * 1e3:.3g}", f"{floor / mine['median']:.0%}") if floor else ("", "")
        lines.append("| " + " | ".join([phase, f"{mine['median'] * 1e3:.4g}", spread, *share, *theirs]) + " |")
    return lines


def _rate_table(ran: dict[str, Any]) -> list[str]:
    lines = ["| | " + " | ".join(ran) + " |", "|---" * (1 + len(ran)) + "|"]
    for rate, (label, _) in RATES.items():
        if rate in ran["ours"]["rates"]:
            shown = [_figure(rate, side["rates"].get(rate)) for side in ran.values()]
            lines.append(f"| {label} | " + " | ".join(shown) + " |")
    peaks = [f"{side['peak_bytes'] / 1e6:.4g}" for side in ran.values()]
    lines.append("| peak memory, MB | " + " | ".join(peaks) + " |")
    for name, label in WATCHED.items():
        means = [side["gpu"].get(name, {}).get("mean") for side in ran.values()]
        if any(mean is not None for mean in means):
            lines.append(f"| {label} | " + " | ".join("-" if m is None else f"{m:.4g}" for m in means) + " |")
    return lines


def _figure(rate: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if rate in ("mfu", "of_products") else f"{value:.4g}"
