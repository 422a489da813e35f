"""The benchmark of data: every part runs at a small size and counts what it says."""

from pathlib import Path

import bench.data
from bench.data import draw, large, loading, memory, preparing, render_rates
from medground.datasets.images import image_size
from medground.datasets.manifest import load_records


def test_loading_and_preparing_of_every_format(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bench.data, "SIDE", 56)
    folders = draw(tmp_path / "films", 2)
    assert {name: image_size(next((folder / "images").iterdir())) for name, folder in folders.items()} == {
        name: (56, 56) for name in ("PNG", "16-bit PNG", "DICOM", "JPEG")
    }
    rates = loading(folders, [0], rounds=2, least=3)
    assert all(len(values) == 2 and min(values) > 0 for found in rates.values() for values in found.values())
    assert list(rates["PNG"]) == ["plain loop", "thread"] and list(rates["DICOM"]) == ["thread"]
    table = render_rates("title", rates).splitlines()
    assert table[0] == "| title | plain loop | thread |" and table[4].startswith("| DICOM |  | ")
    assert all(found["1 worker"] > 0 for found in preparing(folders, tmp_path, [1]).values())


def test_a_large_folder_is_read_audited_and_prepared(tmp_path: Path):
    folder = large(tmp_path / "many", 25)
    assert len(load_records(folder)) == len({path.stat().st_ino: 0 for path in [*(folder / "images").iterdir()]}) * 25
    found = list(memory(tmp_path / "two", 300))
    assert [(records, what) for records, what, _ in found] == [
        (3, "prepare csv"), (12, "prepare csv"),
        (30, "load_records"), (300, "load_records"), (30, "audit, headers"), (300, "audit, headers"),
    ]  # fmt: skip
    assert all(measured.seconds > 0 and measured.megabytes > 0 for *_, measured in found)
