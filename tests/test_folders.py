"""Several data folders as one data set: names, images, splits, hash."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medground.datasets.folders import folders_hash, image_path, load_folders
from medground.datasets.manifest import load_records, records_hash, write_records
from medground.preflight import _splits
from medground.records import Example


def write(folder: Path, splits: dict[str, str], patient: str = "") -> str:
    """A data folder of 8x6 images: name -> split; a patient each, or `patient`."""
    (folder / "images").mkdir(parents=True)
    for name in splits:
        Image.new("L", (8, 6), sum(name.encode())).save(folder / f"images/{name}.png")
    examples = [
        Example(n, f"images/{n}.png", 8, 6, "a", ((1, 1, 4, 4),), "c", patient or f"{folder.name}-{n}", n, "s", split)
        for n, split in splits.items()
    ]
    write_records(folder, [replace(e, study=e.patient) for e in examples])
    return str(folder)


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    a = write(tmp_path / "here" / "a", {"x": "train", "y": "val", "z": "test", "u": "val"})
    return a, write(tmp_path / "b", {"x": "train", "y": "train", "z": "test", "v": "val"})


def test_one_folder_stays_as_it_is(two):
    assert load_folders(two[:1]) == [load_records(two[0])]
    assert folders_hash(two[:1]) == records_hash(two[0])
    assert image_path(two[:1], "images/x.png") == Path(two[0]) / "images/x.png"


def test_ids_and_images_of_several_have_the_folders_name(two):
    parts = load_folders(two)
    assert [[e.id for e in part] for part in parts] == [["a/x", "a/y", "a/z", "a/u"], ["b/x", "b/y", "b/z", "b/v"]]
    for folder, part in zip(two, parts, strict=True):
        for e, alone in zip(part, load_records(folder), strict=True):
            assert image_path(two, e.image) == Path(folder) / alone.image
            assert replace(e, id=alone.id, image=alone.image) == alone
    with pytest.raises(ValueError, match=r"^c/images/x.png: want an image of one of the folders"):
        image_path(two, "c/images/x.png")


def test_the_hash_covers_every_folder(two):
    before = folders_hash(two)
    lines = "".join(f"{hashlib.sha256((Path(f) / 'records.jsonl').read_bytes()).hexdigest()} {f[-1]}\n" for f in two)
    assert before == hashlib.sha256(lines.encode()).hexdigest() != folders_hash(two[::-1])
    records = Path(two[1]) / "records.jsonl"
    records.write_text(records.read_text().replace('"phrase": "a"', '"phrase": "b"', 1))
    assert folders_hash(two) != before


def test_a_fault_of_any_folder_is_named(two):
    (Path(two[1]) / "images/z.png").unlink()
    with pytest.raises(ValueError, match=r"b/records.jsonl:3: image: want .*; got 'images/z.png'"):
        load_folders(two)


def test_two_folders_of_one_name_are_refused(two, tmp_path: Path):
    shutil.copytree(two[0], tmp_path / "a")
    for folders in ((two[0], str(tmp_path / "a")), (two[0], two[0] + "/.")):
        with pytest.raises(ValueError, match=r"^data.path: want folders of different names; got 'a' twice"):
            load_folders(folders)


def test_a_patient_in_two_splits_of_two_folders_is_refused(two, tmp_path: Path):
    c = write(tmp_path / "c", {"p": "test", "q": "test"}, patient="a-x")
    with pytest.raises(ValueError) as error:
        load_folders((*two, c))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{two[0]}, {two[1]}, {c}: 2 faults")
    wanted = f"{c}: record p: patient: want one that is in one split only ('a-x' is in 'train' of {two[0]}); got 'test'"
    assert lines[1] == wanted and lines[2].startswith(f"{c}: record p: study: ")


def test_an_images_content_in_two_splits_of_two_folders_is_refused(two, tmp_path: Path):
    for folder, name in ((two[0], "x"), (two[1], "z")):
        row = {"image": f"images/{name}.png", "width": 8, "height": 6, "sha256": "5" * 64, "bytes": 9}
        row |= {"original": "o", "original_width": 8, "original_height": 6}
        (Path(folder) / "images.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"record z: image content: want .*\(that of 'images/z.png' is in 'train' of"):
        load_folders(two)


def test_splits_come_from_all_folders(two, tiny_job, tmp_path: Path):
    config = tiny_job(tmp_path, **{"evaluation.curve-records": 2})

    def splits(*weights: float):
        data = replace(config.data, path=two, weights=weights)
        return _splits(load_folders(two), replace(config, data=data))

    found, order = splits()
    assert [[e.id for e in split] for split in found] == [["a/x", "b/x", "b/y"], ["a/y", "b/v"], ["a/z", "b/z"]]
    assert sorted(order[p].id for p in range(3)) == ["a/x", "b/x", "b/y"]
    found, order = splits(3, 1)
    assert [e.id for e in found.train] == ["a/x", "b/x", "b/y"]
    assert sorted(order[p].id for p in range(8)) == ["a/x"] * 6 + ["b/x", "b/y"]
    found, order = splits(0, 1)
    assert [e.id for e in found.train] == ["b/x", "b/y"] and len(found.test) == 2
    assert {order[p].id for p in range(9)} == {"b/x", "b/y"}


def test_a_folder_with_a_weight_has_to_have_training_records(tiny_job, tmp_path: Path):
    folders = write(tmp_path / "a", {"x": "train", "v": "val"}), write(tmp_path / "b", {"x": "test", "y": "test"})
    config = tiny_job(tmp_path)
    data = replace(config.data, path=folders, weights=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"b: want records of split 'train'; got splits: test"):
        _splits(load_folders(folders), replace(config, data=data))
    data = replace(data, weights=())
    assert len(_splits(load_folders(folders), replace(config, data=data))[0].train) == 1
