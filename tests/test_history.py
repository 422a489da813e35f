"""Kept records: what goes in, what is refused, how they are shown, and the check of a tree against the last one."""

import json
import sys
from pathlib import Path

import pytest
from made_up_profile import HOT, made_up_profile

from bench.step_workloads import WORKLOADS
from profiles import check, history, record, stored
from profiles.changes import compare
from profiles.compare_text import render
from profiles.stored import history_path, keep, load_history


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for histories; every device is called `a-cpu`."""
    monkeypatch.setattr(stored, "device_slug", lambda: "a-cpu")
    return tmp_path


def kept(name: str, commit: str = "a", scale: float = 1.0) -> dict:
    profile = made_up_profile(scale)
    profile["workload"] = {"name": name}
    profile["environment"] |= {"commit": commit * 40}
    return profile


def test_a_history_has_an_entry_a_line_without_curves(folder):
    path = keep(kept("test", "a"), folder=folder)
    first = path.read_text()
    assert path == folder / "a-cpu" / "test.json" == history_path("test", folder)
    keep(kept("test", "b", 1.5), folder=folder)
    lines = path.read_text().splitlines()
    assert lines[0] == "[" and lines[-1] == "]" and len(lines) == 4
    assert lines[1] == first.splitlines()[1] + ",", "what was there stays as it was"
    entries = load_history(path)
    assert [entry["environment"]["commit"][0] for entry in entries] == ["a", "b"]
    assert not entries[0]["traced"].keys() & {"memory", "timeline"}
    assert entries[0]["traced"]["peak_memory"] == 9_000_000
    found = compare(entries[0], made_up_profile(1.5) | {"workload": {"name": "test"}})
    assert [change.name for change in found.slower(0.1)] == ["update"] and "9 MB" in render(found)


def test_keeping_leaves_the_profile_as_it_is(folder):
    profile = kept("test")
    keep(profile, folder=folder)
    assert profile == kept("test")


@pytest.mark.parametrize("trouble", [{"others_cores": 0.3}, {"gpu": HOT}])
def test_a_disturbed_record_is_not_kept(folder, trouble):
    with pytest.raises(ValueError, match=r"not kept in .*test.json \(--anyway keeps it .* not to be trusted"):
        keep(kept("test") | trouble, folder=folder)
    assert not history_path("test", folder).exists()
    assert len(load_history(keep(kept("test") | trouble, anyway=True, folder=folder))) == 1
    assert len(load_history(keep(kept("test") | {"others_cores": 0.2}, folder=folder))) == 2


@pytest.mark.parametrize(
    "text, told",
    [
        ("[\n{},\n{]\n", r"test.json, line 3: want a JSON list of profiles"),
        ("{}", "test.json: want a JSON list of profiles; got dict"),
        ("[ONE,\n{}]", "test.json, entry 2: want a profile of format 1; got None"),
        ("[ONE,\nOTHER]", "test.json, entry 2: want the workload test; got other"),
        ("[ONE,\nELSEWHERE]", "test.json, entry 2: want the device of entry 1, a CPU; got another"),
        ("[ONE,\nTIMELESS]", r"test.json, entry 2: want a list of seconds for decode; got \[\]"),
    ],
)
def test_what_is_wrong_with_a_history_is_named(tmp_path, text, told):
    elsewhere, timeless = kept("test"), kept("test")
    elsewhere["environment"]["device"] = "another"
    timeless["phases"]["decode"] = []
    for name, entry in (
        ("ONE", kept("test")), ("OTHER", kept("other")), ("ELSEWHERE", elsewhere), ("TIMELESS", timeless)
    ):  # fmt: skip
        text = text.replace(name, json.dumps(entry))
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        load_history(tmp_path / "test.json")


def test_the_table_has_every_rate_of_every_entry(folder):
    keep(kept("test", "a"), folder=folder)
    later = kept("test", "b", 2.0)
    later["rates"]["tflops"] = 123.0
    later["environment"] |= {"dirty": True, "date": "2027-01-02T00:00:00+00:00"}
    keep(later, folder=folder)
    keep(kept("tiny-cpu", "c"), folder=folder)
    text = history.render(history.histories(folder))
    assert "**test** on a CPU" in text and "**tiny-cpu** on a CPU" in text
    assert "| date | commit | step, ms | tokens/s | decode tokens/s | tflops |" in text
    first, second = (line for line in text.splitlines() if "aaaaaaaa" in line or "bbbbbbbb" in line)
    assert first.startswith("| 2026-11-26 | aaaaaaaa | 3,0") and first.endswith("| 5 | – |")
    assert second.startswith("| 2027-01-02 | bbbbbbbb+ | 4,0") and second.endswith("| 5 | 123 |")


def test_tokens_per_second_are_drawn(folder):
    pytest.importorskip("matplotlib")
    from PIL import Image

    for commit in "abc":
        keep(kept("test", commit), folder=folder)
    keep(kept("tiny-cpu"), folder=folder)
    history.draw(history.histories(folder), folder / "history.png")
    with Image.open(folder / "history.png") as image:
        assert image.width > 1000 and image.height > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def run(monkeypatch: pytest.MonkeyPatch, module, *words: object) -> int | str:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    try:
        module.main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, str) else int(stopped.code or 0)
    return 0


@pytest.fixture
def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands find their histories here."""
    monkeypatch.setattr(stored.history_path, "__defaults__", (folder,))
    monkeypatch.setattr(stored.keep, "__defaults__", (False, folder))
    monkeypatch.setattr(history.histories, "__defaults__", (folder,))
    return folder


def test_the_check_compares_with_the_last_entry(at, monkeypatch, capsys):
    keep(kept("test", "a", 1.5), folder=at)
    keep(kept("test", "b"), folder=at)
    taken = []

    def recorded(name: str, out: Path) -> dict:
        taken.append(name)
        return kept(name, "c", 1.5)

    monkeypatch.setattr(check, "record", recorded)
    assert run(monkeypatch, check) == 1
    assert run(monkeypatch, check, "test", "--fail-over", "60%") == 0
    out = capsys.readouterr().out
    assert "## test since bbbbbbbbbb of 2026-11-26" in out and "slower" in out
    keep(kept("test", "d", 1.5), folder=at)
    assert run(monkeypatch, check) == 0
    assert "No change." in capsys.readouterr().out
    assert taken == ["test"] * 3


def test_a_disturbed_check_decides_nothing(at, monkeypatch, capsys):
    keep(kept("test"), folder=at)
    monkeypatch.setattr(check, "record", lambda name, _: kept(name, scale=1.5) | {"others_cores": 0.9})
    assert run(monkeypatch, check) == 2
    assert "test: update slower, but: After: Other processes used 0.9 cores" in capsys.readouterr().err
    monkeypatch.setattr(check, "record", lambda name, _: kept(name) | {"others_cores": 0.9})
    assert run(monkeypatch, check) == 0


def test_the_check_needs_something_to_compare_with(at, monkeypatch, capsys):
    assert run(monkeypatch, check) == 2
    assert f"want a record to compare with; of {', '.join(WORKLOADS)} none was kept on" in capsys.readouterr().err
    keep(kept("test"), folder=at)
    assert run(monkeypatch, check, "test", "tiny-cpu") == 2
    assert "of tiny-cpu none was kept on" in capsys.readouterr().err
    assert run(monkeypatch, check, "huge") == 2
    assert f"want workloads of {', '.join(WORKLOADS)}; got huge" in capsys.readouterr().err


def test_the_history_command(at, monkeypatch, capsys):
    assert "no record was kept yet" in run(monkeypatch, history)
    keep(kept("test"), folder=at)
    assert run(monkeypatch, history) == 0
    assert "| 2026-11-26 | aaaaaaaa |" in capsys.readouterr().out
    history_path("test").write_text("[")
    assert "test.json, line 1" in run(monkeypatch, history)


def test_record_keeps_where_it_is_told_to(at, monkeypatch, capsys):
    monkeypatch.setattr(record, "record", lambda name, out, steps: kept(name) | {"others_cores": 0.9})
    words = ("test", "--out", at / "new")
    assert run(monkeypatch, record, *words) == 0 and not history_path("test").exists()
    assert "not kept in" in run(monkeypatch, record, *words, "--keep")
    assert "| update |" in capsys.readouterr().out, "the record is shown all the same"
    assert run(monkeypatch, record, *words, "--keep", "--anyway") == 0
    assert len(load_history(history_path("test"))) == 1
    history_path("test").write_text("{}")
    monkeypatch.setattr(record, "record", lambda *_: pytest.fail("a damaged history is refused before the first step"))
    assert "want a JSON list of profiles" in run(monkeypatch, record, *words, "--keep")
