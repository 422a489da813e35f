"""M3D-RefSeg: slices, masks, orientations, square pixels, splits by case."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_originals import contents, m3d, nifti, rows_of
from PIL import Image

from medground.datasets.components import component_boxes
from medground.datasets.m3d_refseg import M3dRefSegConfig, prepare_m3d_refseg
from medground.datasets.manifest import load_records
from medground.datasets.splits import split_of

pytest.importorskip("nibabel")


def config(tmp_path, codes=("RAS", "LPI"), **changes):
    tables, volumes = m3d(tmp_path / "original", codes)
    values = {"csv": tuple(map(str, tables)), "volumes": str(volumes), "out": str(tmp_path / "out"), "workers": 1}
    return M3dRefSegConfig(**(values | changes))


def test_records(tmp_path):
    prepare_m3d_refseg(config(tmp_path, split="files"))
    records = load_records(tmp_path / "out")
    assert [(r.id, r.split, r.phrase) for r in records] == [
        ("m3d-refseg-s0001-1-0003-0", "train", "Nodule in the left lung."),
        ("m3d-refseg-s0001-2-0005-0", "train", "Two small lesions in the right lung."),
        ("m3d-refseg-s0002-1-0003-0", "test", "Nodule in the left lung."),
        ("m3d-refseg-s0002-2-0005-0", "test", "Two small lesions in the right lung."),
    ]
    # the slice of largest area; left on the right of the image; rows of 1.5 mm made square
    assert records[0].boxes == ((24, 9, 36, 21),)
    assert (records[0].width, records[0].height) == (40, 45)
    assert records[1].boxes == ((5, 30, 9, 37.5), (12, 30, 16, 37.5))  # two parts, the speck is none
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["rows"] == {"read": 8, "used": 8, "left_out": 0}
    assert manifest["notes"] == {"parts of a mask too small to be boxes": 2}


def test_boxes_lie_on_what_the_slice_shows(tmp_path):
    prepare_m3d_refseg(config(tmp_path, ("SRA", "PIL"), window="bone"))
    for record in load_records(tmp_path / "out"):
        grey = np.asarray(Image.open(tmp_path / "out" / record.image)).astype(float)
        found = component_boxes(grey > (grey.max() + grey.min()) / 2)
        found = sorted(box for box, pixels in found if pixels > 4)
        assert len(found) == len(record.boxes)
        assert np.abs(np.array(found) - record.boxes).max() <= 0.5, record


def test_the_order_of_voxels_changes_nothing(tmp_path):
    images = []
    for number, codes in enumerate([("LPS", "LPS"), ("IRA", "ALS")]):
        folder = tmp_path / str(number)
        prepare_m3d_refseg(config(folder, codes))
        images.append({k: v for k, v in contents(folder / "out").items() if k != "manifest.json"})
    assert images[0] == images[1]


def test_every_k_th_slice(tmp_path):
    prepare_m3d_refseg(config(tmp_path, slices="every:2"))
    records = [r for r in load_records(tmp_path / "out") if r.patient == "m3d-s0001"]
    # slices 0, 2, 4, 6: the nodule is in 2 and 3, the lesions in 5 alone, whose slice stands in
    assert [r.id for r in records] == ["m3d-refseg-s0001-1-0002-0", "m3d-refseg-s0001-2-0005-0"]
    assert records[0].boxes == ((24, 9, 34, 18),)
    prepare_m3d_refseg(config(tmp_path, slices="every:1", out=str(tmp_path / "all")))
    records = [r for r in load_records(tmp_path / "all") if r.patient == "m3d-s0001"]
    assert [r.id.split("-")[4] for r in records] == ["0002", "0003", "0005"]
    assert json.loads((tmp_path / "all/manifest.json").read_text())["rows"]["used"] == 8


def test_parts_that_are_all_too_small_leave_the_largest(tmp_path):
    prepare_m3d_refseg(config(tmp_path, min_pixels=10_000))
    assert [r.boxes for r in load_records(tmp_path / "out")][:2] == [((24, 9, 36, 21),), ((5, 30, 9, 37.5),)]


def test_scaled_masks_count_by_their_values(tmp_path):
    nib = pytest.importorskip("nibabel")
    prepare_m3d_refseg(config(tmp_path))
    path = tmp_path / "original/M3D_RefSeg/s0001/mask.nii.gz"
    mask = nib.load(path)
    image = nib.Nifti1Image(np.asarray(mask.dataobj).astype(np.int16) * 2, mask.affine)
    image.header.set_slope_inter(0.5, 0)
    nib.save(image, path)
    assert float(nib.load(path).dataobj.slope) == 0.5
    values = config(tmp_path / "unused").settings() | {"csv": (str(tmp_path / "original/M3D_RefSeg_train.csv"),)}
    values |= {"volumes": str(tmp_path / "original/M3D_RefSeg"), "out": str(tmp_path / "scaled"), "workers": 1}
    prepare_m3d_refseg(M3dRefSegConfig(**values))
    assert load_records(tmp_path / "scaled") == load_records(tmp_path / "out")[:2]


def test_questions_and_drawn_splits(tmp_path):
    prepare_m3d_refseg(config(tmp_path, phrases="question", test=0.5, val=0.2))
    records = load_records(tmp_path / "out")
    assert [r.phrase for r in records[:2]] == ["Where is finding 1 of kind 0?", "Where is finding 1 of kind 1?"]
    assert {(r.patient, r.split) for r in records} == {
        (f"m3d-{case}", split_of(f"m3d-{case}", 0, 0.2, 0.5)) for case in ("s0001", "s0002")
    }


def no_region(folder):
    path = folder / "M3D_RefSeg/s0001/text.json"
    path.write_text(json.dumps({"1": "Nodule.", "2": "Lesions.", "7": "Nothing there."}))
    table = folder / "M3D_RefSeg_train.csv"
    table.write_text(table.read_text().replace("mask.nii.gz,2,1", "mask.nii.gz,7,1"))


def other_shape(folder):
    nifti(folder / "M3D_RefSeg/s0001/mask.nii.gz", np.ones((40, 30, 7), np.uint8))


def other_place(folder):
    nifti(folder / "M3D_RefSeg/s0001/mask.nii.gz", np.ones((40, 30, 8), np.uint8), spacing=(1, 1.5, 4))


def bare(folder):
    (folder / "M3D_RefSeg/ct.nii.gz").write_bytes((folder / "M3D_RefSeg/s0001/ct.nii.gz").read_bytes())
    table = folder / "M3D_RefSeg_train.csv"
    lines = table.read_text().splitlines()
    lines[4] = lines[4].replace("M3D_RefSeg/s0001/ct.nii.gz", "ct.nii.gz")
    table.write_text("\n".join(lines) + "\n")


def edit(old, new):
    def change(folder):
        table = folder / "M3D_RefSeg_train.csv"
        assert old in table.read_text()
        table.write_text(table.read_text().replace(old, new))

    return change


FAULTS = {
    "no voxel": (no_region, r"train\.csv:5: Mask_ID: want a number of .*mask\.nii\.gz; got 7, which has no voxel", 1),
    "another shape": (other_shape, r"train\.csv:2: .*mask\.nii\.gz: want the shape \(40, 30, 8\)", 4),
    "another place": (other_place, r"train\.csv:2: .*mask\.nii\.gz: want the shape", 4),
    "text as id": (edit("mask.nii.gz,2,1", "mask.nii.gz,two,1"), r":5: Mask_ID: want a finite number; got 'two'", 1),
    "no case": (bare, r":5: Image: want a volume in the folder of its case; got 'ct\.nii\.gz'", 1),
    "no text": (edit("mask.nii.gz,2,1", "mask.nii.gz,3,1"), r":5: Mask_ID: want one with a text .*: 1, 2; got '3'", 1),
    "up": (edit("/mask.nii.gz,2,1", "/../../a/mask.nii.gz,2,1"), r":5: Mask: want a path without '\.\.'", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_stops_or_is_left_out(tmp_path, case):
    change, message, rows = FAULTS[case]
    given = config(tmp_path)
    change(tmp_path / "original")
    with pytest.raises(ValueError, match=message):
        prepare_m3d_refseg(given)
    values = given.settings() | {"out": str(tmp_path / "out"), "workers": 1, "leave_out_faulty": True}
    prepare_m3d_refseg(M3dRefSegConfig(**values))
    assert sum(len(one["rows"]) for one in rows_of(tmp_path / "out", "left_out.jsonl")) == rows
    load_records(tmp_path / "out")


def test_a_case_in_both_files_is_a_fault_of_the_split_by_files(tmp_path):
    given = config(tmp_path, split="files")
    train, test = (tmp_path / f"original/M3D_RefSeg_{name}.csv" for name in ("train", "test"))
    test.write_text(test.read_text() + train.read_text().splitlines()[1] + "\n")
    with pytest.raises(ValueError, match=r"test\.csv:6: Image, Mask, split: want one of each for case s0001"):
        prepare_m3d_refseg(given)


@pytest.mark.parametrize("slices", ["most", "every:0", "every:", "every:x"])
def test_a_wrong_choice_of_slices_is_named(tmp_path, slices):
    with pytest.raises(ValueError, match="slices: want largest or every:k"):
        config(tmp_path, slices=slices)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_components_are_those_of_a_flood(rows, columns, seed, density):
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    wanted = []
    while left:
        front, part = [left.pop()], []
        while front:
            r, c = front.pop()
            part.append((r, c))
            near = {(r + a, c + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            front += near
        r, c = zip(*part, strict=True)
        wanted.append(((min(c), min(r), max(c) + 1, max(r) + 1), len(part)))
    assert sorted(component_boxes(mask)) == sorted(wanted)
