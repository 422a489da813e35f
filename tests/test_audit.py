"""The audit: each planted defect is found, named and counted; a clean set passes; the page is safe and whole."""

import base64
import dataclasses
import io
import json
import re

import pytest
from made_up_originals import paint
from PIL import Image

from medground.audit.audit import AuditConfig, audit_folder, run_audit
from medground.cli import main
from medground.datasets.manifest import write_records
from medground.records import Example
from medground.scoring import blind_baseline


def record(number, **changes):
    """One of many sound records: films of 200x100, the box on the image's right, the patient's left."""
    values = {
        "id": f"r{number}",
        "image": f"images/{number}.png",
        "width": 200,
        "height": 100,
        "phrase": "left mass",
        "boxes": ((120.0, 20.0, 160.0, 60.0),),
        "category": "mass",
        "patient": f"p{number}",
        "study": f"s{number}",
        "source": "made",
        "split": "train" if number < 12 else "test",
    }
    return Example(**(values | changes))


@pytest.fixture
def data(tmp_path):
    """A function that writes 16 records, some changed, and their films, and gives the folder."""

    def write(changes=(), extra=()):
        changed = dict(changes)
        examples = [record(n, **changed.get(n, {})) for n in range(16)] + list(extra)
        for number in range(16):
            paint(tmp_path / f"images/{number}.png", (200, 100), (120 + number, 20, 160, 60))
        write_records(tmp_path, examples)
        return tmp_path

    return write


def audit(folder, **options):
    return audit_folder(AuditConfig(folder=str(folder), workers=1, **options))


def test_a_sound_set(data, capsys):
    folder = data()
    found = audit(folder)
    assert (found.errors, found.warnings) == ([], [])
    assert found.counts["train"]["records"] == 12 and found.counts["test"]["categories"] == {
        "mass": {"records": 4, "boxes": 4}
    }
    assert found.blind == blind_baseline(found.examples[:12], found.examples[12:])
    assert found.blind["metrics"]["miou"]["value"] == pytest.approx(1)  # every box is the same
    run_audit(AuditConfig(folder=str(folder), workers=1))
    told = capsys.readouterr().out
    assert "0 errors, 0 warnings" in told and "on test: miou 1.000 [1.000, 1.000]" in told


def test_two_workers_find_the_same(data):
    folder = data()
    (folder / "images/3.png").write_bytes((folder / "images/3.png").read_bytes()[:-30])
    assert audit(folder).as_json() == audit_folder(AuditConfig(folder=str(folder), workers=2)).as_json()


WARNINGS = {
    "the pair again": ([], [record(0, id="x", phrase=" Left  mass")], "repeated pair", "x", "image and phrase of r0"),
    "left on the left": (
        [(3, {"boxes": ((10.0, 20.0, 90.0, 60.0),)})],
        [],
        "side",
        "r3",
        "every box is on the image's l",
    ),
    "right on the right": ([(3, {"phrase": "right mass"})], [], "side", "r3", "every box is on the image's right"),
    "a class of the test": ([(14, {"category": "rare"})], [], "class", "rare", "1 records in test, 0 in train"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_a_suspicion_is_named(data, case):
    changes, extra, kind, where, text = WARNINGS[case]
    found = audit(data(changes, extra))
    assert not found.errors
    (warning,) = found.warnings
    assert (warning.kind, warning.where) == (kind, where) and text in warning.text


@pytest.mark.parametrize("changes", [
    {"boxes": ((10.0, 20.0, 101.0, 60.0),)},  # over the middle
    {"boxes": ((10.0, 20.0, 90.0, 60.0), (120.0, 20.0, 160.0, 60.0))},  # one of the two is where it should be
    {"phrase": "right mass", "boxes": ((10.0, 20.0, 90.0, 60.0), (120.0, 20.0, 160.0, 60.0))},
    {"phrase": "left and right mass", "boxes": ((10.0, 20.0, 90.0, 60.0),)},
    {"phrase": "mass", "boxes": ((10.0, 20.0, 90.0, 60.0),)},
    {"boxes": ()},
])  # fmt: skip
def test_what_is_no_contradiction_of_sides(data, changes):
    assert not audit(data([(3, changes)])).warnings


def test_sides_may_be_left_aside(data):
    assert not audit(data([(3, {"phrase": "right mass"})]), sides=False).warnings


def same_film(folder, a, b):
    (folder / f"images/{b}.png").write_bytes(b"")  # another file of the same pixels
    Image.open(folder / f"images/{a}.png").save(folder / f"images/{b}.png", compress_level=9)


def test_one_picture_under_two_names(data):
    folder = data()
    same_film(folder, 3, 5)
    found = audit(folder)
    assert not found.errors and [(w.kind, w.where) for w in found.warnings] == [("same picture", "images/5.png")]
    same_film(folder, 3, 13)
    (error,) = audit(folder).errors
    assert (
        "images/13.png: pixels: want a picture in one split only; got that of images/3.png ('train') in 'test'" in error
    )
    assert not audit(folder, headers_only=True).errors


def test_flat_films_of_two_shapes_are_two_pictures(tmp_path):
    paint(tmp_path / "images/0.png", (200, 100))
    paint(tmp_path / "images/1.png", (100, 200))
    boxes = ((1.0, 1.0, 9.0, 9.0),)
    write_records(tmp_path, [record(0, boxes=boxes), record(1, width=100, height=200, boxes=boxes)])
    assert not audit(tmp_path, sides=False).warnings


def test_classes_of_few_training_records(data):
    changes = [(n, {"category": "rare"}) for n in (0, 1, 13)]
    (warning,) = audit(data(changes)).warnings
    assert (warning.kind, warning.where, warning.text) == ("class", "rare", "1 records in test, 2 in train")


def test_errors_of_records_and_images_are_listed_at_once(data, capsys, tmp_path):
    folder = data([(2, {"boxes": ((5.0, 5.0, 1.0, 1.0),)}), (4, {"width": 201}), (6, {"patient": "p13"})])
    (folder / "images/7.png").write_text("no image")
    (folder / "images/8.png").unlink()
    noise = folder / "images/9.png"
    noise.write_bytes(noise.read_bytes()[:-40])  # its header is whole
    out = tmp_path / "audit.json"
    assert main(["data", "audit", str(folder), "--json", str(out), "--html", str(tmp_path / "a.html")]) == 2
    told = capsys.readouterr().err
    value = json.loads(out.read_text())
    wanted = [
        ":3: boxes[0]: want 0 <= x1",
        ":5: width, height: want the size of",
        ":8: image: want a readable image",
        ":9: image: want an existing file",
        ":14: patient: want a patient of one split only",
        "9.png: cannot read",
    ]
    assert len(value["errors"]) == len(wanted)
    for text in wanted:
        assert text in told and any(text in error for error in value["errors"]), text
    assert "6 faults (--json FILE lists all)" in told
    assert value["counts"]["train"]["records"] == 7  # what is sound is still counted
    assert "cannot read" in (tmp_path / "a.html").read_text()


def test_files_that_are_not_those_of_the_preparation(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--count", "12", "--val", "3", "--test", "3", "--size", "56"]
    assert main(["data", "phantom", *words]) == 0
    assert not audit(tmp_path).errors
    records = tmp_path / "records.jsonl"
    records.write_text(records.read_text() + "")
    assert not [w for w in audit(tmp_path).warnings if w.kind == "edited"]
    records.write_text(records.read_text().replace("nodule", "lump"))
    Image.new("L", (56, 56)).save(tmp_path / "images/000003.png")
    found = audit(tmp_path)
    assert [w.where for w in found.warnings if w.kind == "edited"] == ["records.jsonl"]
    (error,) = found.errors
    assert "images/000003.png: SHA-256: want " in error and error.count("as images.jsonl") == 1
    assert found.as_json()["source"] == "phantom" and "without patients" in found.as_json()["licence"]


def test_the_page(data, tmp_path):
    hostile = "<script>alert(1)</script> left mass"
    folder = data([(3, {"phrase": hostile, "boxes": ((10.0, 20.0, 90.0, 60.0),)}), (5, {"category": "<b>"})])
    run_audit(AuditConfig(folder=str(folder), workers=1, html=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "default-src 'none'" in page and not re.search(r"(src|href)=.https?:", page)
    sheets = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert len(sheets) == 2  # of all, and of the one whose side contradicts
    assert [Image.open(io.BytesIO(sheet)).width for sheet in sheets] == [6 * 230 + 6, 230 + 6]
    assert "12 / 12" not in page and "11 / 11" in page  # classes by split


def test_without_test_records_there_is_no_prior(data):
    folder = data([(n, {"split": "train"}) for n in range(12, 16)])
    assert audit(folder).blind is None
    folder = data([(n, {"boxes": ()}) for n in range(12)])
    assert audit(folder).blind is None


def test_no_data_set(tmp_path, capsys):
    assert main(["data", "audit", str(tmp_path / "none")]) == 2
    assert "no such data folder" in capsys.readouterr().err


def test_an_audit_changes_nothing(data):
    folder = data()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run_audit(AuditConfig(folder=str(folder), workers=1))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert dataclasses.asdict(audit(folder))["errors"] == []
