"""The watch over a GPU, mostly with a pynvml that plays samples from a script; where there is a real one, with that."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from made_up_nvml import FakeNvml

from bench import gpu_watch, nvml
from bench.gpu_watch import GpuWatch, joules_per_1000_completion_tokens, throttle_line

REAL = torch.cuda.is_available()
IDLE, SETTING, POWER_CAP, HARDWARE, SYNC, THERMAL, BRAKE = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20, 0x80
SPREADS = ("power_watts", "sm_clock_mhz", "memory_clock_mhz")
UNKNOWN = {"mean": None, "min": None, "max": None}


@pytest.fixture
def fake(monkeypatch):
    """The fake in pynvml's place, a torch that counts the two GPUs the other way round, a clock that counts calls."""
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=("22-bb", "11-aa")[i]))
    ticks = iter(range(100, 10**9))
    monkeypatch.setattr(nvml, "perf_counter", lambda: float(next(ticks)))
    return module


def watched(fake, *script):
    """The result of a watch that sees the script's samples."""
    fake.script, fake.watch = list(script) or [{}], GpuWatch(every=1e-4)
    with fake.watch:
        assert fake.played.wait(30)
    assert not fake.watch._thread.is_alive() and fake.opened == 0
    return json.loads(json.dumps(fake.watch.result()))


def test_figures_of_a_run(fake):
    first = {"power": 400_000, "sm": 1980, "mem": 2619, "use": 100, "memory_use": 60, "heat": 50, "used": 7 << 30}
    result = watched(fake, first, {"power": 650_000, "sm": 1500, "heat": 71}, {"sm": 1500, "used": 1})
    assert result == {
        "seconds": 4.0,  # a call of the clock at each end and for each sample
        "samples": 3,
        "energy_joules": 600.0,
        "energy_source": "counter",
        "power_watts": {"mean": pytest.approx(1550 / 3), "min": 400.0, "max": 650.0, "allowed": 700.0},
        "sm_clock_mhz": {"mean": 1660, "min": 1500, "max": 1980, "allowed": 1980},
        "memory_clock_mhz": {"mean": pytest.approx(7819 / 3), "min": 2600, "max": 2619, "allowed": 2619},
        "sm_utilisation_percent": {"mean": pytest.approx(280 / 3), "min": 90, "max": 100},
        "memory_utilisation_percent": {"mean": pytest.approx(140 / 3), "min": 40, "max": 60},
        "temperature_celsius": {"mean": pytest.approx(181 / 3), "min": 50, "max": 71},
        "memory_used_bytes": {"mean": pytest.approx(((7 << 30) + 11) / 3), "min": 1, "max": 7 << 30},
        "throttled": [],
        "marked": False,
        "failures": {},
    }
    assert throttle_line(result) == ""


def test_the_device_is_the_one_that_torch_counts(fake):
    with GpuWatch(1, every=1000) as watch:
        pass
    assert watch.result()["sm_clock_mhz"] == {"mean": 7, "min": 7, "max": 7, "allowed": 7}


def test_a_run_shorter_than_a_pause_has_a_sample(fake):
    class Stop(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return super().wait(timeout)

    pauses, watch = [], GpuWatch(every=1000)
    watch._stop = Stop()
    with watch:
        pass
    assert watch.result()["samples"] == 1 and pauses == [1000]


@pytest.mark.parametrize("counter", [[605_000, 5_000], [5_000, 5_000]], ids=["began anew", "did not move"])
def test_a_counter_that_did_not_rise_is_not_believed(fake, counter):
    fake.counter = counter
    result = watched(fake, {"power": 400_000}, {"power": 600_000}, {"power": 200_000})
    # at seconds 0 to 4 of the clock 400, 400, 600, 200, 200 W
    assert result["energy_joules"] == 400 + 500 + 400 + 200 and result["energy_source"] == "power samples"
    assert result["failures"] == {}


def test_energy_without_a_counter_passes_over_samples_without_power(fake):
    fake.broken = {"nvmlDeviceGetTotalEnergyConsumption": fake.NVMLError("Not Supported")}
    result = watched(fake, {"power": 400_000}, {"power": None}, {"power": 200_000})
    assert result["energy_joules"] == 400 + 2 * 300 + 200 and result["energy_source"] == "power samples"
    assert result["power_watts"] == {"mean": 300, "min": 200, "max": 400, "allowed": 700}
    assert result["failures"] == {
        "nvmlDeviceGetTotalEnergyConsumption: Not Supported": 2,
        "nvmlDeviceGetPowerUsage: Unknown Error": 1,
    }


@pytest.mark.parametrize("lost", [0, 1])
def test_a_counter_that_answers_once_is_no_counter(fake, lost):
    class Once(list):
        def pop(self, i):
            value = super().pop(i)
            if value is None:
                raise fake.NVMLError("GPU is lost")
            return value

    fake.counter = Once([5_000, 605_000])
    fake.counter[lost] = None
    assert watched(fake)["energy_source"] == "power samples"


QUERIES = {
    "nvmlDeviceGetPowerUsage": ["power_watts"],
    "nvmlDeviceGetClockInfo": ["sm_clock_mhz", "memory_clock_mhz"],
    "nvmlDeviceGetUtilizationRates": ["sm_utilisation_percent", "memory_utilisation_percent"],
    "nvmlDeviceGetTemperature": ["temperature_celsius"],
    "nvmlDeviceGetMemoryInfo": ["memory_used_bytes"],
}


@pytest.mark.parametrize("how", ["NVML", "package"])
@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_fails_costs_its_figures_alone(fake, query, how):
    if how == "NVML":
        fake.broken = {query: fake.NVMLError("Not Supported")}
    else:
        fake.missing = {query}
    with GpuWatch(every=1000) as watch:
        pass
    result = watch.result()
    lost = [name for name, value in result.items() if isinstance(value, dict) and value.items() >= UNKNOWN.items()]
    assert lost == QUERIES[query]
    ((message, count),) = result["failures"].items()
    assert message.startswith(f"{query}: ") and count == len(lost) - (query == "nvmlDeviceGetUtilizationRates")
    assert ("Not Supported" if how == "NVML" else "not in this pynvml") in message
    assert result["energy_source"] == "counter" and type(result["failures"]) is dict


def test_a_device_that_tells_nothing_still_ends_well(fake):
    names = [name for name in dir(FakeNvml) if name.startswith("nvmlDeviceGet") and "Handle" not in name]
    fake.broken = {name: fake.NVMLError("Not Supported") for name in [*names, "nvmlShutdown"]}
    with GpuWatch(every=1000) as watch:
        pass
    result = watch.result()
    assert result["energy_joules"] is None and result["energy_source"] is None
    assert all(result[name] == UNKNOWN | {"allowed": None} for name in SPREADS)
    assert result["throttled"] is None and result["marked"] is None
    assert throttle_line(result) == "throttling unknown: NVML gave no reasons"
    assert joules_per_1000_completion_tokens(result, 100) is None
    assert result["failures"]["nvmlShutdown: Not Supported"] == 1


@pytest.mark.parametrize("masks, throttled, marked, line", [
    ([IDLE | SETTING, 0], [], False, ""),
    ([POWER_CAP, POWER_CAP | IDLE, 0, 0], [("power cap", 0.5, False)], False, "power cap in 50 % of samples"),
    ([SYNC | 0x100], [("sync boost", 1.0, False), ("display clocks", 1.0, False)], False,
     "sync boost in 100 % of samples, display clocks in 100 % of samples"),
    ([HARDWARE, *[0] * 7], [("hardware slowdown", 0.125, True)], True,
     "throttled: hardware slowdown in 12.5 % of samples: times are not to be trusted"),
    ([POWER_CAP | THERMAL, THERMAL | HARDWARE | 0x40, THERMAL, 0], [
        ("thermal slowdown", 0.75, True), ("power cap", 0.25, False), ("hardware slowdown", 0.25, True),
        ("hardware thermal slowdown", 0.25, True)], True,
     "throttled: thermal slowdown in 75 % of samples, hardware slowdown in 25 % of samples, hardware thermal slowdown "
     "in 25 % of samples: times are not to be trusted; power cap in 25 % of samples"),
    ([BRAKE], [("power brake", 1.0, True)], True,
     "throttled: power brake in 100 % of samples: times are not to be trusted"),
    ([0x600], [("board limit", 1.0, True), ("reliability limit", 1.0, True)], True,
     "throttled: board limit in 100 % of samples, reliability limit in 100 % of samples: times are not to be trusted"),
    ([1 << 63], [("reason 0x8000000000000000", 1.0, True)], True,
     "throttled: reason 0x8000000000000000 in 100 % of samples: times are not to be trusted"),
])  # fmt: skip
def test_throttling_in_words(fake, masks, throttled, marked, line):
    result = watched(fake, *({"reasons": mask} for mask in masks))
    assert [tuple(reason.values()) for reason in result["throttled"]] == throttled
    assert result["marked"] is marked and throttle_line(result) == line


@pytest.mark.parametrize("how", ["driver", "package"])
def test_the_older_name_of_reasons(fake, how):
    name = "nvmlDeviceGetCurrentClocksEventReasons"
    if how == "driver":
        fake.broken = {name: fake.NVMLError("Function Not Found")}
    else:
        fake.missing = {name}
    result = watched(fake, {"old_reasons": POWER_CAP}, {"old_reasons": 0})
    assert result["throttled"] == [{"reason": "power cap", "share": 0.5, "warning": False}]
    assert list(result["failures"].values()) == [1]


def unavailable(watch):
    with watch, pytest.raises(ValueError, match="has closed"):
        watch.result()
    assert watch.result().keys() == {"unavailable"} and not watch._thread.is_alive()
    assert throttle_line(watch.result()) == f"throttling unknown: {watch.result()['unavailable']}"
    assert joules_per_1000_completion_tokens(watch.result(), 100) is None
    return watch.result()["unavailable"]


def test_a_machine_without_the_package_says_so(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in (said := unavailable(GpuWatch())) and "pip install nvidia-ml-py" in said


def test_a_machine_without_a_driver_says_so(fake):
    fake.broken = {"nvmlInit": fake.NVMLError("NVML Shared Library Not Found")}
    assert unavailable(GpuWatch()) == "nvmlInit: NVML Shared Library Not Found"
    assert fake.opened == 0


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable(GpuWatch()) == "torch sees no CUDA device"


def test_a_part_of_a_gpu_has_no_figures(fake, monkeypatch):
    fake.mig = 1
    assert "GPU-22-bb is in MIG mode" in unavailable(GpuWatch())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="33-cc"))
    said = unavailable(GpuWatch())
    assert "no GPU-33-cc" in said and "MIG" in said and "nvmlDeviceGetHandleByUUID: Not Found" in said
    assert fake.opened == 0


class BugError(Exception):
    """Not NVML's."""


def test_an_error_of_the_thread_is_raised_before_the_work(fake):
    fake.broken = {"nvmlDeviceGetMigMode": BugError("early")}
    watch = GpuWatch()
    with pytest.raises(BugError, match="early"):
        watch.__enter__()
    assert fake.opened == 0


def test_an_error_of_the_thread_is_raised_after_the_work(fake):
    fake.counter.pop()  # the fake has no answer at the end of the watch
    done = []
    with pytest.raises(IndexError, match="pop from empty list"), GpuWatch() as watch:
        done.append("work")
    assert done and fake.opened == 0
    with pytest.raises(ValueError, match="without an error"):
        watch.result()


def test_an_error_of_the_work_is_not_hidden_by_one_of_the_thread(fake):
    fake.counter.pop()
    with pytest.raises(ZeroDivisionError) as caught, GpuWatch():
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["GpuWatch failed too: IndexError('pop from empty list')"]


def test_an_error_of_the_work_ends_the_watch(fake):
    with pytest.raises(ZeroDivisionError) as caught, GpuWatch(every=1000) as watch:
        raise ZeroDivisionError
    assert not hasattr(caught.value, "__notes__")
    assert not watch._thread.is_alive() and fake.opened == 0 and watch.result()["samples"] == 1


def test_nvml_is_open_before_the_work_begins_and_opens_once(fake, monkeypatch):
    monkeypatch.setattr(fake, "nvmlInit", lambda: (time.sleep(0.05), FakeNvml.nvmlInit(fake)))
    with GpuWatch(every=1000) as watch:
        assert fake.opened == 1 and watch._thread.daemon
        with pytest.raises(RuntimeError, match="once"):
            watch.__enter__()
        assert fake.opened == 1
    with pytest.raises(RuntimeError, match="once"):
        watch.__enter__()
    assert fake.opened == 0


@pytest.mark.parametrize("index", [-1, 2])
def test_no_such_device(fake, index):
    with pytest.raises(ValueError, match=f"below 2; got {index}"):
        GpuWatch(index)


@pytest.mark.parametrize("every", [0, -1.0, float("nan")])
def test_a_pause_is_some_time(every):
    with pytest.raises(ValueError, match="want every > 0 seconds; got"):
        GpuWatch(every=every)


def test_energy_of_completion_tokens():
    assert joules_per_1000_completion_tokens({"energy_joules": 600.0}, 4000) == 150
    assert joules_per_1000_completion_tokens({"energy_joules": 0.5}, 1) == 500
    with pytest.raises(ValueError, match="want completion tokens; got 0"):
        joules_per_1000_completion_tokens({"energy_joules": 600.0}, 0)


def test_the_package_has_every_name_that_is_used():
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = [name for name in vars(FakeNvml) if name.lower().startswith("nvml")]
    assert len(names) > 15 and [name for name in names if not hasattr(pynvml, name)] == []
    assert [getattr(pynvml, name) for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU")] == [1, 2, 0]
    bits = {v for name, v in vars(pynvml).items() if name.startswith(("nvmlClocksEventReason", "nvmlClocksThrottle"))}
    assert {*gpu_watch.NOTES, *gpu_watch.WARNINGS, IDLE, SETTING} <= bits


@pytest.mark.skipif(not REAL, reason="needs a CUDA device")
def test_a_real_gpu():
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    x = torch.randn(2048, 2048, device="cuda")
    with GpuWatch(every=0.01) as watch:
        for _ in range(500):
            x = (x @ x).clamp(-1, 1)
        torch.cuda.synchronize()
    result = watch.result()
    if "MIG" in result.get("unavailable", ""):
        pytest.skip(result["unavailable"])
    assert result["samples"] >= 1 and result["memory_used_bytes"]["max"] > x.nbytes and result["energy_joules"] > 0
    json.dumps(result, allow_nan=False)
