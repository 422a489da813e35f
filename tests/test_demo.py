"""The demo, made small, from data to page."""

import json
from pathlib import Path

import pytest

from medground.demo import DemoConfig, run_demo

pytestmark = pytest.mark.slow


def test_the_whole_job(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "demo"
    run_demo(DemoConfig(out=str(out), films=330, base_steps=3, base_films=40, steps=2, ranks=1))
    summary = json.loads((out / "summary.json").read_text())
    for key in (
        "miou_before", "miou_after", "miou_after_shuffled_images", "miou_blind_baseline", "acc50_before",
        "acc50_after", "side_before", "side_after", "seconds_total", "completion_tokens_per_second", "steps",
    ):  # fmt: skip
        assert isinstance(summary[key], int | float), key
    assert summary["steps"] == 2 and summary["preset"] == "demo"
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "data:image" in page
    text = capsys.readouterr().out
    assert "$ python -m medground data phantom" in text and "mean IoU, image-blind baseline" in text


def test_a_part_that_fails_stops_the_demo(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "records.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="ended with status"):
        run_demo(DemoConfig(out=str(tmp_path)))
    with pytest.raises(ValueError, match="films"):
        DemoConfig(films=-1)
