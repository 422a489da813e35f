"""records.jsonl: written whole, read whole, and every fault in it named with its line and field."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from medground.datasets import manifest
from medground.datasets.manifest import load_records, records_hash, select, write_records
from medground.records import Example

GOOD = {
    "id": "a-0",
    "image": "images/a.png",
    "width": 40,
    "height": 30,
    "phrase": "small left apical pneumothorax",
    "boxes": [[1, 2.5, 40, 30]],
    "category": "pneumothorax",
    "patient": "p1",
    "study": "s1",
    "source": "made",
    "split": "train",
}


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("L", (40, 30)).save(data / f"images/{name}.png")
    return data


def write(folder, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def other(**changes):
    """A second record, without a fault but for the changes."""
    return GOOD | {"id": "b-0", "image": "images/b.png", "patient": "p2", "study": "s2"} | changes


def test_records_read_back_as_they_were_written(folder):
    examples = [
        Example(**(GOOD | {"boxes": ((1.0, 2.5, 40.0, 30.0), (0.0, 0.0, 0.5, 0.5))})),
        Example(**other(boxes=(), phrase="épanchement pleural à gauche", split="val")),
    ]
    write_records(folder, examples)
    assert load_records(folder) == examples
    assert "épanchement" in (folder / "records.jsonl").read_text(encoding="utf-8")
    assert records_hash(folder) == hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == ["images", "records.jsonl"]


def test_the_last_line_may_lack_its_end(folder):
    (folder / "records.jsonl").write_text(json.dumps(GOOD) + "\r\n" + json.dumps(other()))
    assert [example.id for example in load_records(folder)] == ["a-0", "b-0"]


def test_writing_is_all_or_nothing(folder):
    good = Example(**(GOOD | {"boxes": ((1.0, 2.0, 3.0, 4.0),)}))
    write_records(folder, [good])
    before = (folder / "records.jsonl").read_bytes()

    def interrupted():
        yield dataclasses.replace(good, id="new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(folder, interrupted())
    assert (folder / "records.jsonl").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["images", "records.jsonl"]


@pytest.mark.parametrize("name", list(GOOD))
def test_every_field_is_required(folder, name):
    write(folder, GOOD, {key: value for key, value in other().items() if key != name})
    with pytest.raises(ValueError, match=rf"records\.jsonl:2: {name}: missing; a record has id, image"):
        load_records(folder)


WHOLE = "a whole number of pixels >= 1"
FAULTS = {
    "not JSON": ("{", "line", "one JSON object in UTF-8", "'{'"),
    "blank line": ("", "line", "one JSON object in UTF-8", "''"),
    "deep": ("[" * 100_000, "line", "one JSON object in UTF-8", "'[[["),
    "a list": ("[1, 2]", "line", "one JSON object", "[1, 2]"),
    "number as id": (other(id=7), "id", "a string", "7"),
    "null as phrase": (other(phrase=None), "phrase", "a string", "None"),
    "text as width": (other(width="40"), "width", WHOLE, "'40'"),
    "fraction as height": (other(height=30.0), "height", WHOLE, "30.0"),
    "truth as width": (other(width=True), "width", WHOLE, "True"),
    "no width": (other(width=0), "width", WHOLE, "0"),
    "no boxes": (other(boxes=None), "boxes", "a list of boxes [x1, y1, x2, y2]", "None"),
    "three numbers": (other(boxes=[[1, 2, 3]]), "boxes[0]", "four finite numbers", "[1, 2, 3]"),
    "a flat box": (other(boxes=[7]), "boxes[0]", "four finite numbers", "7"),
    "text in a box": (other(boxes=[[1, 2, 3, "4"]]), "boxes[0]", "four finite numbers", "[1, 2, 3, '4']"),
    "truth in a box": (other(boxes=[[0, 0, True, 4]]), "boxes[0]", "four finite numbers", "[0, 0, True, 4]"),
    "NaN": (other(boxes=[[0, 0, float("nan"), 4]]), "boxes[0]", "four finite numbers", "[0, 0, nan, 4]"),
    "infinity": (other(boxes=[[0, 0, float("inf"), 4]]), "boxes[0]", "four finite numbers", "[0, 0, inf, 4]"),
    "beyond floats": (other(boxes=[[0, 0, 10**400, 4]]), "boxes[0]", "four finite numbers", "..."),
    "inverted": (
        other(boxes=[[0, 0, 5, 5], [9, 1, 4, 3]]),
        "boxes[1]",
        "0 <= x1 < x2 <= width (40) and 0 <= y1 < y2 <= height (30)",
        "[9, 1, 4, 3]",
    ),
    "no area": (other(boxes=[[4, 1, 4, 3]]), "boxes[0]", "0 <= x1 < x2 <= width (40)", "[4, 1, 4, 3]"),
    "left of the image": (other(boxes=[[-1, 1, 4, 3]]), "boxes[0]", "0 <= x1 < x2", "[-1, 1, 4, 3]"),
    "right of the image": (other(boxes=[[1, 1, 40.5, 3]]), "boxes[0]", "width (40)", "[1, 1, 40.5, 3]"),
    "below the image": (other(boxes=[[1, 1, 4, 31]]), "boxes[0]", "height (30)", "[1, 1, 4, 31]"),
    "a box twice": (other(boxes=[[0, 0, 5, 5], [0, 0.0, 5, 5]]), "boxes[1]", "each box once", "[0, 0.0, 5, 5]"),
    "a study in two splits": (
        other(study="s1", split="val"),
        "study",
        "a study of one split only ('s1' is in 'train' at line 1)",
        "'val'",
    ),
    "an image in two splits": (
        other(image="images/a.png", split="val"),
        "image",
        "an image of one split only ('images/a.png' is in 'train' at line 1)",
        "'val'",
    ),
    "same id": (other(id="a-0"), "id", "an id of its own (line 1 has the same)", "'a-0'"),
    "empty phrase": (other(phrase=" "), "phrase", "a text that is not empty", "' '"),
    "no such split": (other(split="dev"), "split", "one of train, val, test", "'dev'"),
    "two splits": (
        other(patient="p1", split="test"),
        "patient",
        "a patient of one split only ('p1' is in 'train' at line 1)",
        "'test'",
    ),
    "absolute": (other(image="/etc/a.png"), "image", "a path relative to the data folder", "'/etc/a.png'"),
    "drive": (other(image="C:\\a.png"), "image", "a path relative to the data folder", "'C:"),
    "up": (other(image="images/../../a.png"), "image", "a path without '..'", "'images/../../a.png'"),
    "missing image": (other(image="images/c.png"), "image", "an existing file", "'images/c.png'"),
    "folder": (other(image="images"), "image", "an existing file", "'images'"),
    "no name": (other(image="a\0b"), "image", "a file name", "'a"),
    "other size": (other(width=41), "width, height", "the size of images/b.png, 40x30", "'41x30'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named_with_its_line_and_field(folder, case):
    record, field, wanted, got = FAULTS[case]
    write(folder, GOOD, record)
    with pytest.raises(ValueError) as caught:
        load_records(folder)
    first, *faults = str(caught.value).splitlines()
    assert first == f"{folder}/records.jsonl: 1 fault (docs/data/records.md)"
    assert len(faults) == 1
    assert faults[0].startswith(f"{folder}/records.jsonl:2: {field}: want "), faults
    assert wanted in faults[0] and got in faults[0].split("; got ")[1], faults


def test_an_unknown_field_is_named(folder):
    write(folder, GOOD, other(bbox=[1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"records\.jsonl:2: bbox: unknown field; a record has id, image"):
        load_records(folder)


def test_bytes_that_are_no_text_are_named(folder):
    (folder / "records.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:2: line: want one JSON object in UTF-8"):
        load_records(folder)


def test_a_file_that_is_no_image_is_named(folder):
    (folder / "images/b.png").write_text("no image")
    write(folder, GOOD, other())
    with pytest.raises(ValueError, match=r"records\.jsonl:2: image: want a readable image .*want a PNG"):
        load_records(folder)


def test_a_link_may_not_lead_out_of_the_folder(folder):
    Image.new("L", (40, 30)).save(folder.parent / "secret.png")
    (folder / "images/b.png").unlink()
    (folder / "images/b.png").symlink_to(folder.parent / "secret.png")
    write(folder, GOOD, other())
    with pytest.raises(ValueError, match=r":2: image: want a file inside the data folder \(a link leads to .*secret"):
        load_records(folder)
    (folder / "images/b.png").unlink()
    (folder / "images/b.png").symlink_to("a.png")  # inside is fine
    assert len(load_records(folder)) == 2


def test_one_picture_under_two_names_may_not_be_in_two_splits(folder):
    write(folder, GOOD, other(split="test"))
    assert len(load_records(folder)) == 2
    rows = [{"image": f"images/{name}.png", "sha256": "abc", "bytes": 1} for name in ("a", "b")]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = r"records\.jsonl:2: image: want an image of one split only \(the content of 'images/b.png' is in 'train'"
    with pytest.raises(ValueError, match=wanted):
        load_records(folder)
    (folder / "images.jsonl").write_text(json.dumps(rows[0]) + "\n{}\n")
    with pytest.raises(ValueError, match=r"images\.jsonl:2: want an object with image, sha256 and bytes"):
        load_records(folder)


@pytest.mark.parametrize("text, named", [('{"schema": 2}', "schema: want 1, .*got 2"), ("[]", "want a JSON object"),
                                         ("{", "want a JSON object"), ("{}", "schema: want 1")])  # fmt: skip
def test_a_manifest_of_another_schema_is_refused(folder, text, named):
    write(folder, GOOD)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.json: {named}"):
        load_records(folder)
    (folder / "manifest.json").write_text('{"schema": 1, "more": 2}')
    assert len(load_records(folder)) == 1


def test_all_faults_are_counted_and_twenty_shown(folder):
    write(folder, *[GOOD | {"id": f"a-{n}", "boxes": [[5, 5, 1, 1]]} for n in range(30)], other(phrase="", split="dev"))
    with pytest.raises(ValueError) as caught:
        load_records(folder)
    lines = str(caught.value).splitlines()
    assert "32 faults" in lines[0]
    assert len(lines) == 22 and lines[-1] == "and 12 more"
    assert ":20: boxes[0]" in lines[-2]


def test_several_faults_of_one_record_are_all_named(folder):
    write(folder, GOOD, other(phrase="", boxes=[[5, 5, 1, 1]], width=41))
    with pytest.raises(ValueError, match=r"3 faults[\s\S]*boxes\[0\][\s\S]*phrase[\s\S]*width, height"):
        load_records(folder)


def test_no_folder_no_file_no_records(tmp_path):
    with pytest.raises(ValueError, match="none: no such data folder"):
        load_records(tmp_path / "none")
    with pytest.raises(ValueError, match=r"records\.jsonl: no such file"):
        load_records(tmp_path)
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(ValueError, match="want at least one record; got an empty file"):
        load_records(tmp_path)


def test_select(folder):
    write(folder, GOOD, other(split="val"), other(id="c"))
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (GOOD, other(split="val"))))
    examples = load_records(folder)
    assert [example.id for example in select(examples, "val", folder)] == ["b-0"]
    with pytest.raises(ValueError, match=r"data: want records of split 'test'; got splits: train, val$"):
        select(examples, "test", folder)
    with pytest.raises(ValueError, match="got splits: none"):
        select([], "test", folder)


def test_each_image_is_measured_once(folder, monkeypatch):
    measured = []
    monkeypatch.setattr(manifest, "image_size", lambda path: measured.append(Path(path).name) or (40, 30))
    write(folder, *[GOOD | {"id": str(n)} for n in range(50)], other())
    load_records(folder)
    assert measured == ["a.png", "b.png"]
