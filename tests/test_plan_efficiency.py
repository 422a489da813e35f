"""Shares of a device's rates: from its own records where there are any, and said to be assumed elsewhere."""

import json

import pytest

from medground.costs import peak_rate
from medground.plan.efficiency import FOLDER, PHASES, efficiencies
from medground.plan.gpus import GPUS


def record(device: str, on: str, date: str, update: float, kept: bool = False) -> dict:
    seconds = {"data": 1.0, "prefill": 2.0, "decode": 4.0, "score": 0.0, "update": update, "optimizer": 1.0}
    found = {
        "workload": {"name": "some"},
        "floors": {"prefill": 1.0, "decode": 1.0, "score": 0.0, "update": 3.0, "optimizer": 0.5},
        "device_rates": {"copy": 10.0, "product": 20.0},
        "environment": {"device": device, "on": on, "date": date},
    }
    if kept:  # as `profiles.record --keep` has it
        return found | {"phases": {phase: [s, s, 9 * s] for phase, s in seconds.items()}}
    return found | {"sides": {"ours": {"seconds": {phase: {"median": s} for phase, s in seconds.items()}}}}


def test_without_a_record_everything_is_assumed_and_says_why(tmp_path):
    for name, gpu in GPUS.items():
        found = efficiencies(gpu, tmp_path)
        shares = [*found.phases.values(), found.link, found.network]
        assert list(found.phases) != [] and set(found.phases) == set(PHASES), name
        assert all(0 < share.value < 1 and not share.measured and share.why for share in shares), name
        if gpu.name:
            assert found.rates.product == peak_rate(gpu.name) and found.rates.copy == gpu.bandwidth


def test_the_newest_record_of_the_device_counts(tmp_path):
    tables = tmp_path / "a-gpu" / "tables"
    tables.mkdir(parents=True)
    (tables / "some.json").write_text(json.dumps(record("NVIDIA H100 80GB HBM3", "cuda", "2026-01-02", 6.0)))
    (tables / "old.json").write_text(json.dumps(record("NVIDIA H100 80GB HBM3", "cuda", "2026-01-01", 60.0)))
    (tables / "other.json").write_text(json.dumps(record("NVIDIA H100 PCIe", "cuda", "2026-01-03", 30.0)))
    (tmp_path / "a-gpu" / "some.json").write_text(
        json.dumps(
            [record("a CPU", "cpu", "2026-01-01", 5.0, kept=True), record("a CPU", "cpu", "2026-01-02", 4.0, kept=True)]
        )
    )
    h100, cpu = efficiencies(GPUS["h100-80gb"], tmp_path), efficiencies(GPUS["cpu"], tmp_path)
    assert h100.phases["update"].value == 0.5 and h100.phases["update"].measured
    assert h100.phases["prefill"].value == 0.5 and h100.phases["decode"].value == 0.25
    assert "some on NVIDIA H100 80GB HBM3: 3 of 6 s" in h100.phases["update"].why
    assert not h100.phases["score"].measured, "it did not score"
    assert (h100.rates.copy, h100.rates.product) == (10.0, 20.0) and "measured" in h100.told
    assert cpu.phases["update"].value == 0.75
    assert not efficiencies(GPUS["a100-80gb"], tmp_path).phases["update"].measured


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "device" / "step.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"environment": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"step\.json: want a record of a step"):
            efficiencies(GPUS["cpu"], tmp_path)


def test_this_repository_has_records_of_no_gpu():
    assert [name for name, gpu in GPUS.items() if gpu.name and "measured" in efficiencies(gpu, FOLDER).told] == []
    assert efficiencies(GPUS["cpu"], FOLDER).phases["update"].measured
