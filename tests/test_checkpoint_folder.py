"""Checkpoint folders: whole or not there, damage named by file, only the newest kept."""

import json
import os
import shutil
from pathlib import Path

import pytest

from medground import checkpoint_folder as module
from medground.checkpoint_folder import aside_of, checkpoints, complaints, describe, publish, remove, set_aside, tidy


def write(folder: Path, step: int, contents: dict[str, bytes]) -> Path:
    aside = aside_of(folder, step)
    aside.mkdir(parents=True)
    for name, data in contents.items():
        (aside / name).write_bytes(data)
    publish(folder, step, describe(sorted(aside.iterdir())))
    return folder / f"step-{step:06d}"


FILES = {"__0_0.distcp": b"weights" * 40, "__1_0.distcp": b"", "state.json": b"{}\n", ".metadata": b"\x80layout"}


def test_what_is_published_is_whole(tmp_path: Path):
    found = write(tmp_path, 7, FILES)
    assert checkpoints(tmp_path) == [found] and not aside_of(tmp_path, 7).exists()
    assert complaints(found) == []
    assert {p.name for p in found.iterdir()} == {*FILES, "manifest.json"}
    assert all(complaints(found, part, 3) == [] for part in range(3))


@pytest.mark.parametrize("name", list(FILES))
def test_every_damage_is_named(name: str, tmp_path: Path):
    found = write(tmp_path, 7, FILES)
    data, file = FILES[name], found / name
    if data:
        file.write_bytes(data[:-1])
        assert complaints(found) == [f"{file}: want {len(data)} bytes; got {len(data) - 1}"]
        for at in (0, len(data) - 1):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            said = [complaints(found, part, 4) for part in range(4)]
            assert [line for lines in said for line in lines] == [f"{file}: other bytes than were written (SHA-256)"]
    file.write_bytes(data + b"x")
    assert complaints(found) == [f"{file}: want {len(data)} bytes; got {len(data) + 1}"]
    file.unlink()
    assert complaints(found) == [f"{file}: missing"]


def test_every_bit_of_the_manifest_counts(tmp_path: Path):
    found = write(tmp_path, 7, FILES)
    manifest = found / "manifest.json"
    data = manifest.read_bytes()
    for at in range(len(data)):
        manifest.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        assert complaints(found), at
    for length in range(len(data)):
        manifest.write_bytes(data[:length])
        assert complaints(found) == [f"{manifest}: not as it was written"], length
    manifest.unlink()
    assert complaints(found) == [f"{manifest}: missing"]


def test_steps_are_in_order_beyond_six_digits(tmp_path: Path):
    for step in (1_000_000, 999_999, 5):
        write(tmp_path, step, FILES)
    (tmp_path / "step-000009.broken").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [module.step_of(path) for path in checkpoints(tmp_path)] == [5, 999_999, 1_000_000]


def test_the_newest_stay(tmp_path: Path):
    for step in (2, 4, 6):
        write(tmp_path, step, FILES)
    aside_of(tmp_path, 8).mkdir()
    (tmp_path / ".step-000001.removed").mkdir()
    tidy(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]


def test_a_step_is_replaced(tmp_path: Path):
    write(tmp_path, 2, FILES)
    found = write(tmp_path, 2, {"state.json": b"new"})
    assert complaints(found) == [] and {p.name for p in found.iterdir()} == {"state.json", "manifest.json"}
    assert list(tmp_path.iterdir()) == [found]


@pytest.mark.parametrize("when", ["_write_through", "sync_folder", "rename"])
def test_stopped_while_it_is_published(when: str, tmp_path: Path, monkeypatch):
    """At any of its calls: either the old state of the folder or the new one."""

    class Killed(Exception):  # noqa: N818
        pass

    def die(*_):
        raise Killed

    write(tmp_path, 2, FILES)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os if when == "rename" else module, when, die)
        write(tmp_path, 4, FILES)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002"]
    assert complaints(tmp_path / "step-000002") == []
    tidy(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch):
    def die(path: Path, ignore_errors: bool = False):
        if not ignore_errors:
            raise OSError("killed")

    found = write(tmp_path, 2, FILES)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(shutil, "rmtree", die)
        remove(found)
    assert checkpoints(tmp_path) == []
    tidy(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_one_is_kept_to_be_looked_at(tmp_path: Path):
    for _ in range(2):
        path = set_aside(write(tmp_path, 2, FILES))
    assert path.name == "step-000002.broken" and checkpoints(tmp_path) == []
    tidy(tmp_path, 1)
    assert json.loads((path / "manifest.json").read_text())["format"] == 1
