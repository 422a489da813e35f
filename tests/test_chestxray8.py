"""ChestX-ray8: the box list's split-up header, its spelling, patients, and images in archives."""

import dataclasses

import pytest
from made_up_originals import NIH_BOX_HEADER, nih, rows_of

from medground.datasets.chestxray8 import ChestXray8Config, prepare_chestxray8
from medground.datasets.manifest import load_records
from medground.datasets.splits import split_of


@pytest.fixture
def config(tmp_path):
    boxes, entries, images = map(str, nih(tmp_path / "original"))
    return ChestXray8Config(boxes=boxes, entries=entries, images=images, out=str(tmp_path / "out"), workers=1)


def test_records(config, tmp_path):
    prepare_chestxray8(config)
    records = load_records(tmp_path / "out")
    assert [(r.id, r.category, r.phrase, r.boxes) for r in records] == [
        ("chestxray8-00000007_000-0", "Infiltration", "pulmonary infiltration", ((100.5, 200.25, 400.5, 350.75),)),
        ("chestxray8-00000007_001-0", "Effusion", "pleural effusion", ((600, 700, 800, 800), (100, 700, 300, 800))),
        ("chestxray8-00000007_001-1", "Mass", "lung mass", ((400, 100, 480, 190),)),
        ("chestxray8-00000019_000-0", "Cardiomegaly", "cardiomegaly", ((350, 500, 750, 750),)),
    ]
    assert [r.patient for r in records] == ["nih-00000007"] * 3 + ["nih-00000019"]
    assert {r.split for r in records[:3]} == {split_of("nih-00000007", 0, 0.1, 0.2)}
    (manifest,) = (tmp_path / "out").glob("manifest.json")
    assert "not among their image's labels" in manifest.read_text()  # the mass, which the entries do not have
    assert rows_of(tmp_path / "out", "images.jsonl")[2]["original"] == "images_002/images/00000019_000.png"


def test_the_header_is_the_originals():
    assert NIH_BOX_HEADER == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    assert NIH_BOX_HEADER.split(",")[2:] == ["Bbox [x", "y", "w", "h]", "", "", ""]


FAULTS = {
    "no number": ("600,700,200,100", "600,many,200,100", r":3: y: want a finite number; got 'many'"),
    "NaN": ("600,700,200,100", "600,NaN,200,100", r":3: y: want a finite number; got 'NaN'"),
    "a class of its own": (",Mass,", ",Lump,", r":5: Finding Label: want one of Atelectasis, .*; got 'Lump'"),
    "not in the entries": ("00000019_000.png", "00000019_009.png", r":6: Image Index: want an image of .*Data_Entry"),
    "a row again": ("_001.png,Effusion,100,", "_001.png,Effusion,600,", r":4: line: want each box once; .*:3 again"),
    "too large": ("350,500,400,250", "350,500,700,250", r":6: box: want a box .* 1024x1024; got \[350"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_with_its_line_and_column(config, tmp_path, case):
    old, new, message = FAULTS[case]
    table = tmp_path / "original/BBox_List_2017.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        prepare_chestxray8(config)
    prepare_chestxray8(dataclasses.replace(config, leave_out_faulty=True))
    left = sum(len(one["rows"]) for one in rows_of(tmp_path / "out", "left_out.jsonl"))
    assert left == 1 and sum(len(r.boxes) for r in load_records(tmp_path / "out")) == 4


def test_a_name_and_an_entry_of_two_patients(config, tmp_path):
    table = tmp_path / "original/Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("Cardiomegaly,0,19", "Cardiomegaly,0,18"))
    with pytest.raises(
        ValueError, match=r"2017\.csv:4: Patient ID: want the patient of the file's name, 00000019; got '18'"
    ):
        prepare_chestxray8(config)


def test_a_box_out_by_a_pixel_is_clipped_and_counted(config, tmp_path):
    table = tmp_path / "original/BBox_List_2017.csv"
    table.write_text(table.read_text().replace("350,500,400,250", "350,500,674.75,250"))
    prepare_chestxray8(config)
    assert load_records(tmp_path / "out")[-1].boxes == ((350, 500, 1024, 750),)
    assert '"boxes clipped that stuck out by up to a pixel": 1' in (tmp_path / "out/manifest.json").read_text()
