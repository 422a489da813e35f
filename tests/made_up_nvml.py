"""A pynvml without a GPU, for the tests of `bench.gpu_watch`."""

# ruff: noqa: N802  the names are pynvml's

import threading
import types
from types import SimpleNamespace

HARDWARE = 0x8


class FakeNvml(types.ModuleType):
    """pynvml as far as it is used. The first GPU says 7 to everything; the second has a script, a dict a sample.

    Attributes:
        opened: how often NVML is initialised and not shut down.
        broken: function -> what it raises.
        missing: functions that this pynvml has not.
        counter: millijoules, one a call.
        watch: is told to take no sample after the last of the script, which sets `played`.
    """

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.opened = self.mig = 0
        self.broken: dict[str, Exception] = {}
        self.missing: set[str] = set()
        self.counter = [5_000, 605_000]
        self.script = [{}]
        self.sample = -1
        self.watch, self.played = None, threading.Event()

    def __getattribute__(self, name):
        get = super().__getattribute__
        if name in get("__dict__").get("missing", ()):
            raise AttributeError(name)
        if error := get("__dict__").get("broken", {}).get(name):

            def fail(*args):
                raise error

            return fail
        return get(name)

    def now(self, name, gpu, default):
        assert self.opened == 1
        return self.script[max(self.sample, 0)].get(name, default) if gpu == "second" else 7

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        found = {"GPU-11-aa": "first", "GPU-22-bb": "second"}.get(uuid)
        if found is None:
            raise self.NVMLError("Not Found")
        return found

    def nvmlDeviceGetMigMode(self, gpu):
        return [self.mig, 0]

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return self.now("limit", gpu, 700_000)

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return self.now("most", gpu, {1: 1980, 2: 2619}[kind])

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        assert self.opened == 1
        return self.counter.pop(0)

    def nvmlDeviceGetUtilizationRates(self, gpu):
        self.sample += 1  # the first query of a sample
        if self.watch and self.sample == len(self.script) - 1:  # the last: only the end of the watch is to come
            self.watch.every = 1000
            self.played.set()
        return SimpleNamespace(gpu=self.now("use", gpu, 90), memory=self.now("memory_use", gpu, 40))

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(total=80, free=80, used=self.now("used", gpu, 10))

    def nvmlDeviceGetPowerUsage(self, gpu):
        power = self.now("power", gpu, 500_000)
        if power is None:
            raise self.NVMLError("Unknown Error")
        return power

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return self.now({1: "sm", 2: "mem"}[kind], gpu, {1: 1700, 2: 2600}[kind])

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self.now("heat", gpu, 60)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        return self.now("reasons", gpu, 0)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return self.now("old_reasons", gpu, HARDWARE)
