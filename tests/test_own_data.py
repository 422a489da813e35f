"""People's own data: CSV, COCO and VLM-R1 files; faults with their places; nothing lost."""

import csv
import dataclasses
import json
import random

import numpy as np
import pytest
from made_up_originals import contents, paint, rows_of
from PIL import Image

from medground.datasets.coco import CocoConfig, prepare_coco
from medground.datasets.manifest import load_records
from medground.datasets.own_csv import OwnCsvConfig, prepare_csv
from medground.datasets.vlm_r1 import VlmR1Config, prepare_vlm_r1

QUESTION = (
    "Please provide the bounding box coordinate of the region this sentence describes: small left effusion. First "
    "output the thinking process in <think> </think> tags and then output the final answer in <answer> </answer> tags."
)


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        paint(tmp_path / "films" / name, (40, 30), (10, 10, 20, 20 + number))
    return tmp_path


def run(root, kind, prepare, name, text, **changes):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    annotations = str(root / name) if kind is OwnCsvConfig else (str(root / name),)
    config = kind(annotations=annotations, images=str(root / "films"), out=str(root / "out"), workers=1)
    config = dataclasses.replace(config, **changes)
    prepare(config)
    return load_records(config.out)


def own(root, text, **changes):
    return run(root, OwnCsvConfig, prepare_csv, "rows.csv", text, **changes)


def coco(root, value, **changes):
    return run(root, CocoConfig, prepare_coco, "train.json", json.dumps(value), **changes)


def vlm_r1(root, items, name="train.json", **changes):
    text = json.dumps(items) if name.endswith(".json") else "".join(json.dumps(i) + "\n" for i in items)
    return run(root, VlmR1Config, prepare_vlm_r1, name, text, **changes)


def test_csv_of_corners_with_everything(root):
    text = (
        "image,phrase,x1,y1,x2,y2,category,patient,study,split,width,height\n"
        "a.png,opacity,1,2,11,12.5,Opacity,p1,s1,train,40,30\n"
        "sub/c.png,no effusion,,,,,Effusion,p2,s2,test,40,30\n"
        "a.png,opacity,20,2,30,12,Opacity,p1,s1,train,40,30\n"
    )
    a, c = own(root, text, source="clinic")
    assert (a.id, a.image, a.boxes) == ("clinic-a-0", "images/a.png", ((1, 2, 11, 12.5), (20, 2, 30, 12)))
    assert (c.id, c.image, c.boxes, c.split) == ("clinic-sub/c-0", "images/sub/c.png", (), "test")
    assert (a.category, a.patient, a.study, a.source) == ("Opacity", "p1", "s1", "clinic")


def test_csv_of_sizes_with_nothing_else(root):
    (a, b) = own(root, "image,phrase,x,y,w,h\na.png,opacity,1,2,10,10\nb.png,mass,1,2,10,10\n")
    assert a.boxes == ((1, 2, 11, 12),) and (a.category, a.patient, a.study) == ("finding", "a.png", "a.png")
    assert (
        "2" in (root / "out/manifest.json").read_text()
        and "a patient of its own" in (root / "out/manifest.json").read_text()
    )


def test_absent_twice_is_once_too_often(root):
    with pytest.raises(ValueError, match=r"rows\.csv:3: line: want each box once; got the row of .*:2 again"):
        own(root, "image,phrase,x,y,w,h,category\na.png,one,,,,,A\na.png,one,,,,,B\n")


def test_films_of_every_format_become_the_same_png(root):
    pytest.importorskip("pydicom")
    from medground.datasets.phantom import PhantomConfig, write_phantom

    forms = {"plain": {}, "wide": {"bits": 16}, "dicom": {"dicom": True}}
    films = {}
    for form, options in forms.items():
        write_phantom(PhantomConfig(out=str(root / form), count=4, val=0, test=1, size=56, **options), workers=1)
        names = sorted(path.name for path in (root / form / "images").iterdir())
        rows = "".join(f"{name},spot,1,1,9,9,train\n" for name in names)
        own(
            root,
            "image,phrase,x,y,w,h,split\n" + rows,
            images=str(root / form / "images"),
            out=str(root / f"out-{form}"),
        )
        paths = sorted((root / f"out-{form}/images").iterdir())
        assert [path.name for path in paths] == [f"00000{n}.png" for n in range(4)]
        assert {Image.open(path).mode for path in paths} == {"L"}
        films[form] = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])
    assert np.abs(films["wide"] - films["plain"]).max() <= 1 and np.abs(films["dicom"] - films["plain"]).max() <= 1


CSV_FAULTS = {
    "text": ("a.png,two,1,2,ten,10,,\n", r"rows\.csv:3: w: want a finite number; got 'ten'"),
    "half a box": ("a.png,two,1,2,,10,,\n", r"rows\.csv:3: w: want a finite number; got ''"),
    "one side": ("a.png,two,1,2,3,4,40,\n", r"rows\.csv:3: width, height: want both or neither"),
    "another size": (
        "b.png,two,1,2,3,4,41,30\n",
        r"rows\.csv:3: image size: want the size of .*b\.png, 40x30; got '41x30'",
    ),
    "sizes of one image": ("a.png,two,1,2,3,4,40,31\n", r"rows\.csv:3: size: want None, as .*:2 has it for this image"),
    "again": ("a.png,one,1,2,10,10,,\n", r"rows\.csv:3: line: want each box once"),
    "a box and none": ("a.png,one,,,,,,\n", r"rows\.csv:3: box: want boxes or none for one phrase"),
    "up": ("../films/b.png,two,1,2,3,4,,\n", r"rows\.csv:3: image: want a path without '\.\.'"),
    "absolute": ("/etc/b.png,two,1,2,3,4,,\n", r"rows\.csv:3: image: want a path relative to the folder of images"),
    "a link out": ("link.png,two,1,2,3,4,,\n", r"rows\.csv:3: image: want a file inside the folder of images"),
    "one name": ("A.JPG,two,1,2,3,4,,\n", r"rows\.csv:3: image: want another name than that of 'a\.png'"),
    "a surrogate": ("a.png,\udc80,1,2,3,4,,\n", r"rows\.csv:3: line: want UTF-8"),
}


@pytest.mark.parametrize("case", CSV_FAULTS)
def test_a_fault_of_a_csv_is_named(root, case):
    row, message = CSV_FAULTS[case]
    Image.new("L", (40, 30)).save(root / "secret.png")
    (root / "films/link.png").symlink_to(root / "secret.png")
    Image.new("L", (40, 30)).save(root / "films/A.JPG")
    text = "image,phrase,x,y,w,h,width,height\na.png,one,1,2,10,10,,\n" + row
    with pytest.raises(ValueError, match=message):
        own(root, text.encode("utf-8", "surrogateescape"))
    assert not (root / "out/records.jsonl").exists()


def test_coco(root):
    value = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30, "patient_id": 1},
            {"id": "x", "file_name": "sub/c.png", "patient_id": 2},
            {"id": 9, "file_name": "b.png"},
        ],
        "categories": [{"id": 1, "name": "nodule"}, {"id": 2, "name": "mass"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [1, 2, 10, 10]},
            {"image_id": 7, "category_id": 1, "bbox": [20, 2, 10.5, 10]},
            {"image_id": "x", "category_id": 2, "bbox": [1, 2, 3, 4], "phrase": "mass in the left lung"},
            {"image_id": "x", "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
    }
    a, c = coco(root, value, split="files")
    assert (a.phrase, a.category, a.boxes, a.patient) == ("nodule", "nodule", ((1, 2, 11, 12), (20, 2, 30.5, 12)), "1")
    assert (c.phrase, c.category, c.split) == ("mass in the left lung", "mass", "train")
    manifest = json.loads((root / "out/manifest.json").read_text())
    assert manifest["rows"] == {"read": 4, "used": 3, "left_out": 1}
    assert manifest["notes"]["images without an annotation, which give no record"] == 1
    (left,) = rows_of(root / "out", "left_out.jsonl")
    assert left["rows"] == [f"{root}/train.json: annotations[3]"] and "crowd" in left["why"]


IMAGES, CATEGORIES = [{"id": 1, "file_name": "a.png"}], [{"id": 1, "name": "nodule"}]
COCO_FAULTS = {
    "no list": ({"images": {}, "annotations": []}, r"train\.json: images: want a list of objects"),
    "no object": ([], r"train\.json: want an object with images and annotations; got list"),
    "one id": ({"images": IMAGES * 2, "annotations": []}, r"images\[1\]\.id: want an id of its own; got 1"),
    "image": (
        {"image_id": 2, "bbox": [1, 2, 3, 4], "category_id": 1},
        r"annotations\[0\]: image_id: want the id of an",
    ),
    "category": (
        {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 5},
        r"annotations\[0\]: category_id: want a text",
    ),
    "box": ({"image_id": 1, "bbox": [1, 2, 3], "category_id": 1}, r"annotations\[0\]: bbox: want four finite numbers"),
    "NaN": ({"image_id": 1, "bbox": [1, 2, float("nan"), 3], "category_id": 1}, r"bbox: want four finite numbers"),
}


@pytest.mark.parametrize("case", COCO_FAULTS)
def test_a_fault_of_coco_is_named(root, case):
    value, message = COCO_FAULTS[case]
    if isinstance(value, dict) and "bbox" in value:
        value = {"images": IMAGES, "categories": CATEGORIES, "annotations": [value]}
    with pytest.raises(ValueError, match=message):
        coco(root, value)


def test_vlm_r1_in_both_forms(root):
    items = [
        {"image": "a.png", "problem": "left opacity", "solution": [1, 2, 11.5, 12], "normalized_solution": [0]},
        {"image": ["sub/c.png"], "conversations": [{"from": "human", "value": "<image>" + QUESTION},
                                                   {"from": "gpt", "value": "[1, 2, 30, 20]"}]},
        {"image": "b.png", "problem": QUESTION, "solution": [[1, 2, 3, 4], [5, 6, 7, 8]]},
    ]  # fmt: skip
    for name in ("train.json", "train.jsonl"):
        a, c, b = vlm_r1(root, items, name, split="files", out=str(root / name[5:]))
        assert (a.phrase, a.boxes, a.split) == ("left opacity", ((1, 2, 11.5, 12),), "train")
        assert (c.phrase, c.boxes) == ("small left effusion", ((1, 2, 30, 20),))
        assert (b.phrase, b.boxes) == ("small left effusion", ((1, 2, 3, 4), (5, 6, 7, 8)))
        assert json.loads((root / name[5:] / "manifest.json").read_text())["rows"]["used"] == 4


def test_patients_of_mimic_are_known_by_their_paths(root):
    path = "files/p10/p10000001/s50000001/x.png"
    paint(root / "films" / path, (40, 30))
    (record,) = vlm_r1(root, [{"image": path, "problem": "opacity", "solution": [1, 2, 11, 12]}])
    assert (record.patient, record.study) == ("mimic-10000001", "mimic-50000001")


ITEM = {"image": "a.png", "problem": "opacity", "solution": [1, 2, 3, 4]}
VLM_R1_FAULTS = {
    "no object": ([ITEM, 7], r"train\.jsonl:2: item: want an object; got 7"),
    "no image": ([ITEM, {**ITEM, "image": None}], r"train\.jsonl:2: image: want a text that is not empty; got None"),
    "two images": ([ITEM, {**ITEM, "image": ["a.png", "b.png"]}], r"train\.jsonl:2: image: want a text"),
    "no phrase": ([ITEM, {**ITEM, "problem": " "}], r"train\.jsonl:2: problem: want a text"),
    "no box": ([ITEM, {**ITEM, "solution": "the left"}], r"train\.jsonl:2: solution: want a box"),
    "half a box": (
        [ITEM, {**ITEM, "solution": [1, 2]}],
        r"train\.jsonl:2: solution: want four finite numbers; got \[1",
    ),
    "no answer": ([{"image": "a.png", "conversations": []}], r"train\.jsonl:1: conversations\[0\]\.value: want a text"),
    "inverted": ([{**ITEM, "solution": [9, 2, 3, 4]}], r"train\.jsonl:1: box: want a box with an area inside"),
}


@pytest.mark.parametrize("case", VLM_R1_FAULTS)
def test_a_fault_of_vlm_r1_is_named(root, case):
    items, message = VLM_R1_FAULTS[case]
    with pytest.raises(ValueError, match=message):
        vlm_r1(root, items, "train.jsonl")


@pytest.mark.parametrize("name, text, message", [
    ("train.json", "[1,\n2", r"train\.json:2: want JSON"),
    ("train.json", '{"a": 1}', r"train\.json: want a list of items"),
    ("train.jsonl", '{"a": 1}\n{', r"train\.jsonl:2: want JSON in UTF-8"),
    ("train.json", b'["\xff"]', r"train\.json: want JSON"),
    ("mine.json", "[]", r"mine\.json: want train, val or test in the file's name"),
])  # fmt: skip
def test_a_damaged_json_is_named(root, name, text, message):
    with pytest.raises(ValueError, match=message):
        run(root, VlmR1Config, prepare_vlm_r1, name, text, split="files")


def test_two_hundred_files_of_rubbish(root):
    """Rows are damaged at random: each file is refused by place or every row is used or listed; nothing is written
    beside `out`."""
    good = ["a.png,one,1,2,10,10", "b.png,two,1,2,10,10", "sub/c.png,three,5,5,9,9", "a.png,four,3,3,9,9"]
    bad = [
        "NaN",
        "-5",
        "",
        "1e9",
        "inf",
        "../../etc",
        "/etc/passwd",
        "a.png\0",
        '"',
        "\udcff",
        "é" * 300,
        "0",
        "40",
        "x",
    ]
    outside = {k: v for k, v in contents(root).items() if not k.startswith("out/")}
    used = 0
    for seed in range(200):
        rng = random.Random(seed)
        rows = [row.split(",") for row in good]
        for _ in range(rng.randint(1, 3)):
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = rng.choice(bad)
        lines = [",".join(row) for row in rows] + [",".join(rng.choice(rows))] * rng.randint(0, 1)
        end = rng.choice(["\n", "\r\n"])
        text = rng.choice(["", "\ufeff"]) + end.join(["image,phrase,x,y,w,h", *lines]) + rng.choice(["", end])
        out = root / f"out/{seed}"
        try:
            own(root, text.encode("utf-8", "surrogateescape"), out=str(out), leave_out_faulty=True)
        except ValueError as error:
            assert f"{root}/rows.csv:" in str(error) or "want at least one record" in str(error), (seed, error)
        if (out / "manifest.json").exists():
            counts = json.loads((out / "manifest.json").read_text())["rows"]
            rows = len(list(csv.reader(lines)))  # an open quote may make one row of two lines
            assert counts["read"] == rows == counts["used"] + counts["left_out"], seed
            assert sum(max(1, len(r.boxes)) for r in load_records(out)) == counts["used"]
            used += 1
    assert used > 100
    (root / "rows.csv").unlink()
    assert {k: v for k, v in contents(root).items() if not k.startswith("out/")} == outside
    assert np.all([name.split("/")[1].isdigit() for name in contents(root) if name.startswith("out/")])
