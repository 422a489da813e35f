"""How much of a device's rates the phases of a step reach: from a record of this device, or else assumed.

A record is what `bench.steps` or `profiles.record --keep` left in profiles/<device>/: seconds of each phase beside its
floor, and the rates by which the floor was reckoned. Its workload is not the one that is planned, so even a measured
share is a guess for another model; the plan names it. No record of a GPU exists so far.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from medground.costs import peak_rate
from medground.plan.floors import Rates
from medground.plan.gpus import Gpu

FOLDER = Path(__file__).parents[2] / "profiles"
PHASES = ("prefill", "decode", "score", "update", "optimizer")


class Share(NamedTuple):
    """A fraction of what is possible, whether it was measured, and why it is believed."""

    value: float
    measured: bool
    why: str


class Efficiencies(NamedTuple):
    """Of a device.

    Attributes:
        rates: that the shares are of.
        told: where the rates come from.
        phases: share of its floor's rate that each phase reaches.
        link: share of the link within a node that collectives reach.
        network: the same of the network between nodes.
    """

    rates: Rates
    told: str
    phases: dict[str, Share]
    link: Share
    network: Share


_FSDP = "torchtitan's docs/performance.md has 52 to 58 % of an A100 for 8B and 70B under FSDP2 with checkpointing"
_PRODUCTS = {
    "A100": (0.50, f"{_FSDP}, in long rows"),
    "H100": (0.40, f"{_FSDP}; an H100's products are 3.2 times as fast and its memory 1.6 times, so its share is less"),
}
_PRODUCTS["H200"] = _PRODUCTS["H100"]
_OTHER_PRODUCTS = (0.40, "nothing published was found; as an H100")
_DECODE = (0.65, "gpt-fast reads the weights of a 7B model in bfloat16 at 1.39 of an A100's 2.04 TB/s")
_OPTIMIZER = (0.80, "a fused AdamW is a copy in all but name; copies reach 85 to 90 %")
_NVLINK = (0.80, "360 of 450 GB/s is what NVIDIA expects of all-gather on 8 H100 (NVIDIA/nccl-tests issue 326)")
_PCIE = (0.50, "GPUs share the way through the host")
_NETWORK = (0.50, "200 of 400 GB/s was seen of all-gather on 32 nodes of 8 H100 (NVIDIA/nccl issue 1218)")
_GLOO = (0.50, "gloo copies")


def efficiencies(gpu: Gpu, folder: Path = FOLDER) -> Efficiencies:
    """Of a kind of GPU, or of CPUs.

    Raises:
        ValueError: a record cannot be read; names the file.
    """
    record = _newest_record(gpu, folder)
    products = _share(_PRODUCTS.get(gpu.name, _OTHER_PRODUCTS))
    phases = {phase: products for phase in ("prefill", "score", "update")}
    phases |= {"decode": _share(_DECODE), "optimizer": _share(_OPTIMIZER)}
    link = _share(_GLOO if not gpu.name else _NVLINK if "NVLink" in gpu.wires else _PCIE)
    network = _share(_NETWORK)
    if not record:
        product = peak_rate(gpu.name) if gpu.name else 100e9
        assert product, gpu
        told = "data sheet" if gpu.name else "assumed: a core or two"
        return Efficiencies(Rates(gpu.bandwidth, product), told, phases, link, network)
    for phase in PHASES:
        floor, seconds = record.floors.get(phase), record.seconds.get(phase)
        if floor and seconds:
            phases[phase] = Share(floor / seconds, True, f"{record.name}: {floor:.3g} of {seconds:.3g} s")
    return Efficiencies(record.rates, f"measured, {record.name}", phases, link, network)


def _share(pair: tuple[float, str]) -> Share:
    return Share(pair[0], False, pair[1])


class _Record(NamedTuple):
    name: str
    date: str
    seconds: dict[str, float]
    floors: dict[str, float]
    rates: Rates


def _newest_record(gpu: Gpu, folder: Path) -> _Record | None:
    found = []
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/tables/*.json")]):
        try:
            value = json.loads(path.read_text())
            value = value[-1] if isinstance(value, list) else value
            about = value["environment"]
            if _is_of(gpu, about) and value.get("device_rates"):
                found.append(_read(value))
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: want a record of a step; got {error!r}") from None
    return max(found, key=lambda record: record.date, default=None)


def _is_of(gpu: Gpu, about: dict[str, Any]) -> bool:
    if not gpu.name:
        return about["on"] == "cpu"
    named = re.search(rf"\b{gpu.name}\b", about["device"])
    return bool(named) and peak_rate(about["device"]) == peak_rate(gpu.name)  # an H100 PCIe is another one


def _read(value: dict[str, Any]) -> _Record:
    if "sides" in value:  # of bench.steps
        seconds = {phase: row["median"] for phase, row in value["sides"]["ours"]["seconds"].items()}
    else:
        seconds = {phase: median(row) for phase, row in value["phases"].items()}
    about, rates = value["environment"], value["device_rates"]
    name = f"{value['workload']['name']} on {about['device']}"
    return _Record(name, about["date"], seconds, value["floors"], Rates(rates["copy"], rates["product"]))
