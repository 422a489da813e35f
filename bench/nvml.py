"""One GPU as NVML has it, through the package nvidia-ml-py (module pynvml, extra `gpu`), imported when one is opened.

A query that NVML does not answer gives None and is counted: a figure that a device has not must not end a benchmark.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from types import ModuleType
from typing import Any

import torch

from bench.race import UnavailableError


@contextmanager
def open_gpu(device_index: int) -> Iterator["Gpu"]:
    """The device that torch counts as `device_index`, with NVML initialised for as long as it is open.

    Raises:
        UnavailableError: no GPU, package or driver, or a GPU in MIG mode, which has no figures of a part alone.
    """
    if not torch.cuda.is_available():
        raise UnavailableError("torch sees no CUDA device")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise UnavailableError(f"{error}: pip install nvidia-ml-py") from error
    # not by index: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
    uuid = f"GPU-{torch.cuda.get_device_properties(device_index).uuid}"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise UnavailableError(f"nvmlInit: {error}") from error
    gpu = Gpu(nvml)
    try:
        gpu.find(uuid)
        yield gpu
    finally:
        gpu.ask("nvmlShutdown")


class Gpu:
    """What NVML answers.

    Attributes:
        allowed: most that the device may do, by the name of the figure in `sample`.
        failures: queries that failed, by function and message.
    """

    def __init__(self, nvml: ModuleType):
        self.nvml, self.failures = nvml, Counter[str]()

    def ask(self, function: str, *args: Any) -> Any:
        try:
            if hasattr(self.nvml, function):
                return getattr(self.nvml, function)(*args)
            failure = "not in this pynvml"
        except self.nvml.NVMLError as error:
            failure = str(error)
        self.failures[f"{function}: {failure}"] += 1
        return None

    def find(self, uuid: str) -> None:
        self.handle = gpu = self.ask("nvmlDeviceGetHandleByUUID", uuid)
        if gpu is None:
            raise UnavailableError(f"NVML has no {uuid} (a part of a GPU in MIG mode?): {dict(self.failures)}")
        mode = self.ask("nvmlDeviceGetMigMode", gpu)
        if mode is not None and mode[0]:
            raise UnavailableError(f"{uuid} is in MIG mode, where figures are those of all its parts together")
        self._reasons = "nvmlDeviceGetCurrentClocksEventReasons"
        if self.ask(self._reasons, gpu) is None:  # older drivers know the older name alone
            self._reasons = "nvmlDeviceGetCurrentClocksThrottleReasons"
        self.allowed = {
            "power_watts": _thousandth(self.ask("nvmlDeviceGetEnforcedPowerLimit", gpu)),
            "sm_clock_mhz": self.ask("nvmlDeviceGetMaxClockInfo", gpu, self.nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self.ask("nvmlDeviceGetMaxClockInfo", gpu, self.nvml.NVML_CLOCK_MEM),
        }

    def energy(self) -> tuple[float, float | None]:
        """Seconds of the clock, and joules since the driver was loaded."""
        return perf_counter(), _thousandth(self.ask("nvmlDeviceGetTotalEnergyConsumption", self.handle))

    def sample(self) -> dict[str, Any]:
        gpu, nvml = self.handle, self.nvml
        use, memory = self.ask("nvmlDeviceGetUtilizationRates", gpu), self.ask("nvmlDeviceGetMemoryInfo", gpu)
        return {
            "seconds": perf_counter(),
            "power_watts": _thousandth(self.ask("nvmlDeviceGetPowerUsage", gpu)),
            "sm_clock_mhz": self.ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self.ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_MEM),
            "sm_utilisation_percent": use and use.gpu,
            "memory_utilisation_percent": use and use.memory,
            "temperature_celsius": self.ask("nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU),
            "memory_used_bytes": memory and memory.used,
            "reasons": self.ask(self._reasons, gpu),
        }


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3
