"""The frame of all converters: continues, gives the same bytes whatever happens, counts every row."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_originals import contents, ms_cxr, paint, rows_of
from PIL import Image

from medground.datasets import films, preparing
from medground.datasets.inventory import file_hash
from medground.datasets.manifest import load_records
from medground.datasets.ms_cxr import MsCxrConfig, prepare_ms_cxr
from medground.datasets.own_csv import OwnCsvConfig, prepare_csv
from medground.datasets.workers import map_in_order


@pytest.fixture
def config(tmp_path):
    table, images = ms_cxr(tmp_path / "original")
    return MsCxrConfig(
        annotations=str(table), images=str(images), out=str(tmp_path / "out"), longest_side=96, workers=1
    )


@pytest.fixture
def whole(config, tmp_path):
    """What an uninterrupted preparation writes."""
    prepare_ms_cxr(dataclasses.replace(config, out=str(tmp_path / "whole")))
    return contents(tmp_path / "whole")


def test_the_folder(whole, tmp_path):
    assert sorted(name for name in whole if "/" not in name) == [
        "images.jsonl", "left_out.jsonl", "manifest.json", "records.jsonl"
    ]  # fmt: skip
    manifest = json.loads(whole["manifest.json"])
    table = tmp_path / "original/MS_CXR_Local_Alignment_v1.1.0.csv"
    assert manifest["schema"] == 1 and manifest["source"] == "ms-cxr" and "Credentialed" in manifest["licence"]
    assert manifest["settings"]["annotations"] == {table.name: file_hash(table)}
    assert manifest["command"].startswith(f"medground data prepare ms-cxr --annotations {table} --images ")
    assert "--split official --seed 0 --longest-side 96" in manifest["command"]
    assert manifest["files"] == {name: file_hash(tmp_path / "whole" / name) for name in manifest["files"]}
    assert set(manifest["files"]) == {"records.jsonl", "images.jsonl", "left_out.jsonl"}
    assert manifest["rows"] == {"read": 6, "used": 6, "left_out": 0}
    assert manifest["counts"]["train"] == {
        "records": 3, "boxes": 4, "without_box": 0, "images": 2, "patients": 1,
        "categories": {"Cardiomegaly": {"records": 1, "boxes": 1}, "Lung Opacity": {"records": 1, "boxes": 2},
                       "Pleural Effusion": {"records": 1, "boxes": 1}},
    }  # fmt: skip
    images = rows_of(tmp_path / "whole", "images.jsonl")
    assert {row["image"] for row in images} == {name for name in whole if "/" in name}
    for row in images:
        path = tmp_path / "whole" / row["image"]
        assert (row["sha256"], row["bytes"]) == (file_hash(path), path.stat().st_size)
        assert Image.open(path).size == (row["width"], row["height"])


def test_two_workers_write_what_one_does(config, whole, tmp_path):
    prepare_ms_cxr(dataclasses.replace(config, workers=2))
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("after", range(5))
def test_an_interrupted_preparation_continues(config, whole, tmp_path, monkeypatch, after):
    converted = []

    def interrupted(film, out, *_):
        if len(converted) == after:
            raise KeyboardInterrupt
        converted.append(film.key)
        return films.convert_film(film, out)

    with monkeypatch.context() as patch:
        patch.setattr("medground.datasets.ms_cxr.convert_film", interrupted)
        if after < 4:
            with pytest.raises(KeyboardInterrupt):
                prepare_ms_cxr(config)
        else:  # when all is converted, but nothing written
            patch.setattr(preparing, "_finish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                prepare_ms_cxr(config)
    assert not (tmp_path / "out/manifest.json").exists()
    again = []
    monkeypatch.setattr(
        "medground.datasets.ms_cxr.convert_film",
        lambda film, out: again.append(film.key) or films.convert_film(film, out),
    )
    prepare_ms_cxr(config)
    assert len(again) == 4 - after and not set(again) & set(converted)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("torn", [1, 5])  # bytes that the kill has cut off the last line
def test_what_changed_meanwhile_is_made_again(config, whole, tmp_path, monkeypatch, torn):
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda *args: None)
        prepare_ms_cxr(config)
        journal = tmp_path / "out/.prepare.jsonl"
        lines = len(journal.read_text().splitlines())
        journal.write_bytes(journal.read_bytes()[:-torn])
        image = tmp_path / "out/images/img-a.png"
        image.write_bytes(image.read_bytes()[:-9] + bytes(9))  # of its size, but another
        (tmp_path / "out/images/img-b.png").unlink()
        prepare_ms_cxr(config)
        again = [json.loads(line) for line in journal.read_text().splitlines()]
        assert len(again) == lines + 2  # those two once more, and the torn one again
    prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == whole


def test_what_had_a_fault_is_tried_again(config, whole, tmp_path):
    image = tmp_path / "original/MIMIC-CXR-JPG/files/p10/p10000002/s50000002/img-c.jpg"
    good = image.read_bytes()
    image.write_bytes(good[:200])
    with pytest.raises(ValueError, match=r":6: image: .*img-c\.jpg"):
        prepare_ms_cxr(config)
    image.write_bytes(good)
    prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == whole


KILLED = """
import sys
from medground.datasets.ms_cxr import MsCxrConfig, prepare_ms_cxr
from medground.datasets import films, ms_cxr
import time
def slow(film, out):
    done = films.convert_film(film, out)
    print("done", flush=True)
    time.sleep(1)
    return done
ms_cxr.convert_film = slow
prepare_ms_cxr(MsCxrConfig(annotations=sys.argv[1], images=sys.argv[2], out=sys.argv[3], longest_side=96, workers=1))
"""


def test_a_killed_preparation_continues(config, whole, tmp_path):
    words = [sys.executable, "-c", KILLED, config.annotations, config.images, config.out]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        process.stdout.readline()  # the first film is in the journal, the second perhaps not
        process.kill()
    names = contents(tmp_path / "out")
    assert "records.jsonl" not in names and ".prepare.jsonl" in names
    prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == whole


def test_a_finished_one_is_not_done_again(config, whole, tmp_path, monkeypatch, capsys):
    prepare_ms_cxr(config)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_results", None)
        prepare_ms_cxr(dataclasses.replace(config, workers=2))
    assert "already there" in capsys.readouterr().out
    (tmp_path / "out/images/img-a.png").unlink()  # a part of it is not it
    prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == whole
    (tmp_path / "out/images/img-b.png").write_bytes(b"torn")
    prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == whole
    (tmp_path / "out/left_out.jsonl").unlink()
    prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == whole


def test_what_was_edited_is_left_alone(config, tmp_path):
    prepare_ms_cxr(config)
    records = tmp_path / "out/records.jsonl"
    records.write_text(records.read_text().replace("small left", "left"))
    before = contents(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"want a folder as it was prepared; .* whose records\.jsonl was changed since"
    ):
        prepare_ms_cxr(config)
    assert contents(tmp_path / "out") == before


def test_another_data_set_is_left_alone(config, tmp_path):
    prepare_ms_cxr(config)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out: want a new folder, or the settings .*which has longest_side 96"):
        prepare_ms_cxr(dataclasses.replace(config, longest_side=90))
    assert contents(tmp_path / "out") == before
    paint(tmp_path / "mine/images/a.png", (4, 4))
    with pytest.raises(ValueError, match=r"want a new or an empty folder; got .*mine, which holds images"):
        prepare_ms_cxr(dataclasses.replace(config, out=str(tmp_path / "mine")))
    with pytest.raises(ValueError, match=r"which holds MIMIC-CXR-JPG, MS_CXR"):  # the originals' own folder
        prepare_ms_cxr(dataclasses.replace(config, out=str(tmp_path / "original")))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: want a folder that can be made; got .*\(Not a directory\)"):
        prepare_ms_cxr(dataclasses.replace(config, out=str(tmp_path / "file/out")))
    with pytest.raises(ValueError, match=r"images: want a folder; got .*none, which is none"):
        prepare_ms_cxr(dataclasses.replace(config, images=str(tmp_path / "none"), out=str(tmp_path / "new")))
    (tmp_path / "empty/images").mkdir(parents=True)
    prepare_ms_cxr(dataclasses.replace(config, out=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"want a folder; got the file .*file"):
        prepare_ms_cxr(dataclasses.replace(config, out=str(tmp_path / "file")))


def test_a_begun_one_with_other_settings_is_left_alone(config, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_finish", lambda *args: None)
    prepare_ms_cxr(config)
    with pytest.raises(ValueError, match=r"which has longest_side 96"):
        prepare_ms_cxr(dataclasses.replace(config, longest_side=90))
    Path(config.annotations).write_text(Path(config.annotations).read_text() + "\n")
    with pytest.raises(ValueError, match=r"which has annotations \{'MS_CXR"):
        prepare_ms_cxr(config)


def test_results_come_in_the_order_of_the_items():
    assert list(map_in_order(abs, range(-100, 0), 2)) == list(range(100, 0, -1))


def test_a_dead_worker_is_said():
    with pytest.raises(ValueError, match="workers: want processes that stay alive"):
        list(map_in_order(os._exit, [9, 9], 2))


def own(folder, text, **changes):
    (folder / "rows.csv").write_text(text)
    values = {"annotations": str(folder / "rows.csv"), "images": str(folder / "films"), "out": str(folder / "out")}
    prepare_csv(OwnCsvConfig(**(values | {"workers": 1} | changes)))


def test_images_that_cannot_be_read_are_all_named(tmp_path):
    paint(tmp_path / "films/a.png", (40, 30))
    (tmp_path / "films/b.png").write_text("no image")
    noise = paint(tmp_path / "films/c.jpg", (64, 64), (9, 9, 30, 30))
    noise.write_bytes(noise.read_bytes()[:300])
    text = "image,phrase,x,y,w,h\na.png,one,1,1,5,5\nb.png,two,1,1,5,5\nc.jpg,three,1,1,5,5\nc.jpg,four,2,2,5,5\n"
    with pytest.raises(ValueError) as caught:
        own(tmp_path, text)
    assert str(caught.value).startswith("csv: 2 faults (--leave-out-faulty")
    assert "rows.csv:3: image: " in str(caught.value) and "rows.csv:4: image: " in str(caught.value)
    own(tmp_path, text, leave_out_faulty=True)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["rows"] == {"read": 4, "used": 1, "left_out": 3}
    assert [r.phrase for r in load_records(tmp_path / "out")] == ["one"]


def test_one_picture_in_two_splits_is_a_fault(tmp_path):
    for name in ("a", "b"):
        paint(tmp_path / f"films/{name}.png", (40, 30), (9, 9, 30, 20))
    text = "image,phrase,x,y,w,h,split,patient\na.png,one,1,1,5,5,train,p\nb.png,two,1,1,5,5,test,q\n"
    wanted = r"rows\.csv:3: image: want a picture of one split only \(that of a\.png is in 'train'\); got 'test'"
    with pytest.raises(ValueError, match=wanted):
        own(tmp_path, text)
    own(tmp_path, text, leave_out_faulty=True)
    assert [r.phrase for r in load_records(tmp_path / "out")] == ["one"]
    assert [path.name for path in (tmp_path / "out/images").iterdir()] == ["a.png"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["rows"] == {"read": 2, "used": 1, "left_out": 1}


def test_nothing_left_is_said(tmp_path):
    paint(tmp_path / "films/a.png", (40, 30))
    with pytest.raises(ValueError, match="want at least one record; got none of 1 rows"):
        own(tmp_path, "image,phrase,x,y,w,h\na.png,one,100,1,5,5\n", leave_out_faulty=True)
    assert not (tmp_path / "out/records.jsonl").exists()


def test_ten_thousand_boxes_on_one_image(tmp_path):
    paint(tmp_path / "films/a.png", (1000, 1000))
    lines = [f"a.png,spots,{x * 10},{y * 10},5,5" for x in range(100) for y in range(100)]
    own(tmp_path, "\n".join(["image,phrase,x,y,w,h", *lines]))
    assert len(load_records(tmp_path / "out")[0].boxes) == 10_000
