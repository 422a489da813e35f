"""MS-CXR: the CSV of either version, its boxes, splits and traps."""

import dataclasses
import gzip
import json
from collections import Counter

import numpy as np
import pytest
from made_up_originals import edges, ms_cxr, rows_of
from PIL import Image

from medground.cli import main
from medground.datasets.manifest import load_records
from medground.datasets.ms_cxr import MEDRPG_TEST, MEDRPG_VAL, MsCxrConfig, prepare_ms_cxr
from medground.datasets.splits import split_of


def config(tmp_path, **changes):
    table, images = ms_cxr(tmp_path / "original", with_split=changes.get("split", "official") == "official")
    values = {"annotations": str(table), "images": str(images), "out": str(tmp_path / "out"), "workers": 1}
    return MsCxrConfig(**(values | changes))


def test_records_of_the_official_split(tmp_path):
    prepare_ms_cxr(config(tmp_path, longest_side=0))
    records = load_records(tmp_path / "out")
    assert [(r.id, r.phrase, r.category, r.split) for r in records] == [
        ("ms-cxr-img-a-0", "small left pleural effusion", "Pleural Effusion", "train"),
        ("ms-cxr-img-a-1", "opacities, both sides", "Lung Opacity", "train"),
        ("ms-cxr-img-b-0", "cardiomegaly", "Cardiomegaly", "train"),
        ("ms-cxr-img-c-0", "right apical pneumothorax", "Pneumothorax", "val"),
        ("ms-cxr-img-d-0", "left basal atelectasis", "Atelectasis", "test"),
    ]
    assert records[1].boxes == ((20, 60, 50, 100), (130, 60, 160, 100))  # two rows, apart in the file
    assert records[0].boxes == ((120, 150, 160, 200),)
    assert {(r.patient, r.study) for r in records[:2]} == {("mimic-10000001", "mimic-50000001")}
    assert {r.source for r in records} == {"ms-cxr"}
    # nothing to convert: the very file
    original = tmp_path / "original/MIMIC-CXR-JPG/files/p10/p10000002/s50000002/img-c.jpg"
    assert (tmp_path / "out" / records[3].image).read_bytes() == original.read_bytes()


def test_boxes_follow_the_smaller_image(tmp_path):
    prepare_ms_cxr(config(tmp_path, longest_side=96))
    record = next(r for r in load_records(tmp_path / "out") if r.phrase == "cardiomegaly")
    assert (record.width, record.height) == (80, 96) and record.image.endswith(".png")
    assert record.boxes == ((70 * 0.4, 120 * 0.4, 150 * 0.4, 190 * 0.4),)
    found = edges(np.asarray(Image.open(tmp_path / "out" / record.image)))
    assert np.abs(np.subtract(found, record.boxes[0])).max() < 0.5
    row = next(r for r in rows_of(tmp_path / "out", "images.jsonl") if r["image"] == record.image)
    assert (row["original_width"], row["original_height"]) == (200, 240)
    assert row["original"] == "files/p10/p10000001/s50000001/img-b.jpg"


def test_version_1_0_0_has_no_split(tmp_path):
    table, images = ms_cxr(tmp_path / "original", with_split=False)
    words = ["--annotations", str(table), "--images", str(images), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"v1\.0\.0\.csv:1: header: want the column split.*medrpg-like or mimic"):
        prepare_ms_cxr(MsCxrConfig(annotations=str(table), images=str(images), out=str(tmp_path / "out")))
    assert main(["data", "prepare", "ms-cxr", *words]) == 2
    assert not (tmp_path / "out").exists()


def test_medrpg_like_has_phrases_of_one_box_and_lists_the_others(tmp_path):
    prepare_ms_cxr(config(tmp_path, split="medrpg-like"))
    records = load_records(tmp_path / "out")
    assert len(records) == 4 and all(len(r.boxes) == 1 for r in records)
    (left,) = rows_of(tmp_path / "out", "left_out.jsonl")
    assert [row.rsplit(":", 1)[1] for row in left["rows"]] == ["3", "5"]
    assert "wants phrases of one box; got 2" in left["why"]


def test_medrpg_like_proportions():
    splits = Counter(split_of(f"mimic-{n}", 0, MEDRPG_VAL, MEDRPG_TEST) for n in range(10_000_000, 10_008_900))
    assert abs(splits["val"] - 850) < 90 and abs(splits["test"] - 1670) < 120


def test_the_split_of_mimic(tmp_path):
    given = config(tmp_path, split="mimic")
    root = tmp_path / "original/MIMIC-CXR-JPG"
    splits = {"img-a": "train", "img-b": "train", "img-c": "validate", "img-d": "test", "img-z": "train"}
    text = "dicom_id,study_id,subject_id,split\n" + "".join(f"{k},1,1,{v}\n" for k, v in splits.items())
    with pytest.raises(ValueError, match=r"MIMIC-CXR-JPG: want mimic-cxr-2\.0\.0-split\.csv"):
        prepare_ms_cxr(given)
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(text.encode()))
    prepare_ms_cxr(given)
    assert [r.split for r in load_records(tmp_path / "out")] == ["train", "train", "train", "val", "test"]
    (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(text.replace("img-b", "img-y").encode()))
    with pytest.raises(ValueError, match=r"csv:4: dicom_id: want an image of mimic-cxr-2.0.0-split.csv; got 'img-b'"):
        prepare_ms_cxr(config(tmp_path, split="mimic", out=str(tmp_path / "other")))


def test_one_box_under_two_categories_is_kept_once(tmp_path):
    given = config(tmp_path)
    table = tmp_path / "original/MS_CXR_Local_Alignment_v1.1.0.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[3].replace(",Cardiomegaly,", ",Edema,")]) + "\n")
    prepare_ms_cxr(given)
    record = next(r for r in load_records(tmp_path / "out") if r.phrase == "cardiomegaly")
    assert record.category == "Cardiomegaly" and len(record.boxes) == 1
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["rows"] == {"read": 7, "used": 7, "left_out": 0}
    assert [count for note, count in manifest["notes"].items() if "another category" in note] == [1]


EDITS = {  # what is replaced in the CSV, by what, the message, rows that it makes useless
    "another size": (",200,240,train", ",200,241,train", r"size: want the size of .*200x240; got '200x241'", 4),
    "no such split": (",test", ",dev", r":7: split: want one of train, val, test; got 'dev'", 1),
    "a box beyond the image": (",120,180,50,30,", ",120,180,90,30,", r":7: box: want a box .* the image of 200x240", 1),
    "a negative size": (",120,180,50,30,", ",120,180,-50,30,", r":7: box: want a box with an area", 1),
    "no image": ("s50000002/img-c", "s50000002/img-x", r":6: image: want an existing file", 1),
    "up": ("files/p10/p10000002/s50000002", "../../x", r":6: image: want a path without '\.\.'", 1),
    "absolute": ("files/p10/p10000002/s50000002", "/x", r":6: image: want a path relative to the folder of images", 1),
    "no phrase": ('"cardiomegaly"', '" "', r":4: label_text: want a text that is not empty; got ''", 1),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_fault_stops_or_is_left_out(tmp_path, case):
    old, new, message, rows = EDITS[case]
    given = config(tmp_path)
    table = tmp_path / "original/MS_CXR_Local_Alignment_v1.1.0.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        prepare_ms_cxr(given)
    assert "--leave-out-faulty" in str(caught.value)
    assert not (tmp_path / "out/records.jsonl").exists() and not (tmp_path / "out/manifest.json").exists()
    prepare_ms_cxr(dataclasses.replace(given, leave_out_faulty=True))
    left = rows_of(tmp_path / "out", "left_out.jsonl")
    used = sum(len(record.boxes) for record in load_records(tmp_path / "out"))
    assert sum(len(one["rows"]) for one in left) == rows and used == 6 - rows


def test_a_patient_in_two_splits_is_named(tmp_path):
    given = config(tmp_path)
    table = tmp_path / "original/MS_CXR_Local_Alignment_v1.1.0.csv"
    lines = table.read_text().splitlines()
    lines[3] = lines[3].replace(",train", ",test")  # img-b of the patient of img-a
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ValueError, match=r":4: split: want a patient of one split only \('mimic-10000001' is in 'train'"
    ):
        prepare_ms_cxr(given)
