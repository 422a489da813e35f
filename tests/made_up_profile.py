"""A profile as `profiles.record` writes it, made up."""

from typing import Any

import torch

PHASES = ("data", "decode", "update")


def made_up_profile(scale: float = 1.0, noise: int = 0) -> dict[str, Any]:
    """Phases of about a second with 5 % of noise; `update` is `scale` times as long."""
    generator = torch.Generator().manual_seed(noise)
    seconds = {phase: (1 + 0.05 * torch.rand(5, generator=generator)).tolist() for phase in PHASES}
    seconds["update"] = [scale * s for s in seconds["update"]]
    step = [sum(phases) for phases in zip(*seconds.values(), strict=True)]
    mm = {"name": "aten::mm", "group": "GEMM", "phase": "update", "calls": 10, "seconds": 0.5, "flops": 100}
    return {
        "format": 1,
        "workload": {"name": "made up", "P": 40},
        "others_cores": 0.0,
        "gpu": {"unavailable": "a CPU"},
        "environment": {
            "device": "a CPU",
            "on": "cpu",
            "date": "2026-11-26T11:21:16+00:00",
            "commit": "a" * 40,
            "dirty": False,
            "packages": {"torch": "2.13.0"},
        },
        "phases": seconds,
        "step": step,
        "rates": {"tokens_per_second": 12 / sorted(step)[2], "decode_tokens_per_second": 5.0},
        "traced": {
            "step": 4.0,
            "seconds": dict.fromkeys(PHASES, 1.3),
            "kernels": [mm, mm | {"phase": "decode"}, mm | {"name": "aten::silu", "group": "norm and elementwise"}],
            "counts": {"launches": 3, "synchronisations": 0},
            "idle": None,
            "peak_memory": 9_000_000,
            "memory": [[2.0, 5_000_000], [4.0, 9_000_000]],
            "timeline": {
                "phases": [["data", 0.0, 1.3], ["decode", 1.3, 2.6], ["update", 2.6, 4.0]],
                "work": {"GEMM": [0.0, 0.3, 0.4, 0.3], "norm and elementwise": [0.0, 0.0, 0.2, 0.3]},
            },
        },
    }


HOT = {"throttled": [{"reason": "thermal slowdown", "share": 0.25, "warning": True}], "marked": True}
"""What a watch over a GPU leaves that was too warm."""


def on_a_gpu(profile: dict[str, Any]) -> dict[str, Any]:
    """The same of a GPU, which was idle for a third of the step, with two floors."""
    return profile | {
        "environment": profile["environment"] | {"device": "a GPU", "on": "cuda"},
        "gpu": {"throttled": [], "marked": False},
        "floors": {"decode": 0.5, "update": 0.25},
        "traced": profile["traced"]
        | {"idle": {"busy": 2.5, "synchronisation": 0.25, "host late": 1.0, "launch gap": 0.25}},
    }
