"""What a GPU did while a benchmark ran: energy, power, clocks, and whether anything slowed it down.

    with GpuWatch() as watch:
        work()
        torch.cuda.synchronize()  # what the GPU does after the watch has closed is not seen
    print(watch.result()["energy_joules"], throttle_line(watch.result()))

Figures are NVML's (`bench.nvml`) and the whole board's: other processes' work counts. Energy is the difference of the
board's counter; where there is none, power over time. Since Ampere, save for GA100, a reading of power is the average
of the last second (nvmlDeviceGetPowerUsage), so a run should take several.

Clocks are lowered for "clocks event reasons" (NVML API reference, group NvmlClocksEventReasons,
https://docs.nvidia.com/deploy/nvml-api/api/group__nvmlClocksEventReasons.html). An idle GPU and applications clocks are
no throttling. The power cap is a note: it keeps a GPU within its limit (`allowed` of `power_watts`), where one at full
load may well stay, in the next run too. Sync boost and display clocks are notes, since somebody has set them up. Every
other reason is a warning and marks the run: heat, the power brake and the hardware's slowdown depend on the room and
the neighbours, and one that NVML adds is not known to be harmless. A hardware slowdown may be reported while clocks
merely change, so one sample of many says little: the share tells.
"""

from collections import Counter
from itertools import pairwise
from statistics import fmean
from threading import Event, Thread
from typing import Any

import torch

from bench.nvml import open_gpu
from bench.race import UnavailableError

NO_THROTTLING = 0x1 | 0x2  # idle, applications clocks
NOTES = {0x4: "power cap", 0x10: "sync boost", 0x100: "display clocks"}
WARNINGS = {
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x200: "board limit",
    0x400: "reliability limit",
}

End = tuple[float, float | None]
"""Seconds and the counter's joules where a run begins or ends."""


class GpuWatch:
    """Samples the GPU that torch counts as `device_index` from a thread, with pauses of `every` seconds. Opens once.

    Raises:
        ValueError: no such device, or `every` is not above 0. What else goes wrong in the thread is raised when the
            watch opens or closes, or noted on the error that closes it; what NVML does not answer is not raised.
    """

    def __init__(self, device_index: int = 0, every: float = 0.05):
        if not every > 0:
            raise ValueError(f"want every > 0 seconds; got {every}")
        if torch.cuda.is_available() and not 0 <= device_index < torch.cuda.device_count():
            raise ValueError(f"want device_index from 0, below {torch.cuda.device_count()}; got {device_index}")
        self.device_index, self.every = device_index, every
        self._ready, self._stop = Event(), Event()
        self._thread = Thread(target=self._run, name="GpuWatch", daemon=True)
        self._result: dict[str, Any] | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "GpuWatch":
        self._thread.start()
        self._ready.wait()
        if self._error:
            raise self._error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error and error:
            error.add_note(f"GpuWatch failed too: {self._error!r}")
        elif self._error:
            raise self._error

    def result(self) -> dict[str, Any]:
        """What was seen, as JSON has it.

        `unavailable` alone, the reason in words, where NVML cannot tell. Else `seconds`, `samples`, `energy_joules` and
        `energy_source` ("counter" or "power samples"); of each figure of `bench.nvml.Gpu.sample` mean, min and max over
        samples, and for some `allowed`; `throttled`, reasons with their share of samples, `warning` or note; `marked`,
        whether one is a warning; `failures` of queries. What no query gave is None.

        Raises:
            ValueError: the watch has not closed, or failed.
        """
        if self._result is None or not self._stop.is_set():
            raise ValueError("want a watch that has closed without an error")
        return self._result

    def _run(self) -> None:
        try:
            with open_gpu(self.device_index) as gpu:
                start, samples = gpu.energy(), []
                self._ready.set()
                while True:
                    samples.append(gpu.sample())
                    if self._stop.wait(self.every):
                        break
                end = gpu.energy()
            self._result = _summary(start, samples, end, gpu.allowed) | {"failures": dict(gpu.failures)}
        except UnavailableError as error:
            self._result = {"unavailable": str(error)}
        except Exception as error:
            self._error = error
        finally:
            self._ready.set()


def _summary(start: End, samples: list[dict[str, Any]], end: End, allowed: dict[str, Any]) -> dict[str, Any]:
    joules, source = _energy(start, samples, end)
    known = {name: [sample[name] for sample in samples if sample[name] is not None] for name in samples[0]}
    throttled = _throttled(known.pop("reasons"))
    del known["seconds"]
    figures = {name: _spread(values) for name, values in known.items()}
    for name, most in allowed.items():
        figures[name]["allowed"] = most
    return {
        "seconds": end[0] - start[0],
        "samples": len(samples),
        "energy_joules": joules,
        "energy_source": source,
        **figures,
        "throttled": throttled,
        "marked": None if throttled is None else any(reason["warning"] for reason in throttled),
    }


def _energy(start: End, samples: list[dict[str, Any]], end: End) -> tuple[float | None, str | None]:
    # a counter that did not rise started anew with the driver, or has longer steps than the run
    if start[1] is not None and end[1] is not None and end[1] > start[1]:
        return end[1] - start[1], "counter"
    power = [(sample["seconds"], sample["power_watts"]) for sample in samples if sample["power_watts"] is not None]
    if not power:
        return None, None
    points = [(start[0], power[0][1]), *power, (end[0], power[-1][1])]
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(points)), "power samples"


def _spread(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": fmean(values), "min": min(values), "max": max(values)}


def _throttled(masks: list[int]) -> list[dict[str, Any]] | None:
    if not masks:
        return None
    bits = [1 << i for i in range(64)]
    seen = Counter(bit for mask in masks for bit in bits if mask & ~NO_THROTTLING & bit)
    return [
        {
            "reason": (NOTES | WARNINGS).get(bit, f"reason {bit:#x}"),
            "share": count / len(masks),
            "warning": bit not in NOTES,
        }
        for bit, count in seen.most_common()
    ]


def throttle_line(result: dict[str, Any]) -> str:
    """What a table says below the times of a run; nothing where nothing slowed the GPU down."""
    if "unavailable" in result:
        return f"throttling unknown: {result['unavailable']}"
    if result["throttled"] is None:
        return "throttling unknown: NVML gave no reasons"
    warnings, notes = (
        ", ".join(
            f"{r['reason']} in {100 * r['share']:.3g} % of samples" for r in result["throttled"] if r["warning"] is kind
        )
        for kind in (True, False)
    )
    warning = warnings and f"throttled: {warnings}: times are not to be trusted"
    return "; ".join(filter(None, (warning, notes)))


def joules_per_1000_completion_tokens(result: dict[str, Any], completion_tokens: int) -> float | None:
    """None where energy is not known.

    Raises:
        ValueError: no completion tokens.
    """
    if completion_tokens < 1:
        raise ValueError(f"want completion tokens; got {completion_tokens}")
    joules = result.get("energy_joules")
    return None if joules is None else 1000 * joules / completion_tokens
