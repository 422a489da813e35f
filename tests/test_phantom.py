"""Phantom films: the boxes fit what is painted, the words fit the boxes, and the words alone do not give them."""

import dataclasses
import importlib.util
import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from medground.datasets import phantom
from medground.datasets.contact_sheet import COLOURS, contact_sheet
from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.datasets.phantom import PhantomConfig, draw_film, film_examples, phantom_examples, write_phantom
from medground.datasets.phantom_film import box_of, draw_anatomy, sample_chest
from medground.datasets.phantom_findings import CATEGORIES, HEART, LESIONS, ZONES
from medground.datasets.phantom_findings import paint as paint_finding

SIZE = 112


@pytest.fixture(scope="module")
def films():
    """1,200 films and the examples of each."""
    drawn = [draw_film(0, index, SIZE) for index in range(1200)]
    return [(film, film_examples(film, 0, index)) for index, film in enumerate(drawn)]


@pytest.fixture
def upright(monkeypatch):
    """Chests in the middle of the film, not tilted: the film's midline is the patient's."""

    def sample(person, film, enlarged_heart):
        chest = sample_chest(person, film, enlarged_heart)
        return dataclasses.replace(chest, shift_x=0.0, shift_y=0.0, tilt=0.0)

    monkeypatch.setattr(phantom, "sample_chest", sample)


def iou(a, b):
    """[N, M] of xyxy boxes [N, 4] and [M, 4]."""
    a, b = np.asarray(a)[:, None], np.asarray(b)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = np.clip(sides, 0, None).prod(-1)
    return inter / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter)


def singles(films):
    return [(film, example) for film, some in films for example in some if len(example.boxes) == 1]


def test_a_box_fits_the_pixels_that_its_finding_changes(films, monkeypatch):
    def invisible(canvas, plan, rng):
        return paint_finding(dataclasses.replace(canvas, pixels=canvas.pixels.copy()), plan, rng)

    monkeypatch.setattr(phantom, "paint", invisible)
    fits = defaultdict(list)
    for index, (film, _) in enumerate(films[:500]):
        if len(film.findings) == 1 and film.findings[0].category != HEART:
            without = draw_film(0, index, SIZE)
            assert without.findings == film.findings
            change = np.abs(film.pixels - without.pixels)
            found = box_of(change > 0.3 * np.quantile(change, 0.999))
            fits[film.findings[0].category].append(iou([found], [film.findings[0].box])[0, 0])
    assert set(fits) == set(CATEGORIES) - {HEART}
    for category, values in fits.items():
        assert np.mean(values) > 0.9, f"{category}: {np.mean(values):.2f}"
        assert np.quantile(values, 0.05) > 0.8, f"{category}: {np.quantile(values, 0.05):.2f}"


def test_the_box_of_an_enlarged_heart_fits_the_heart(films):
    checked = 0
    for index, (film, _) in enumerate(films[:300]):
        for finding in film.findings:
            if finding.category == HEART:
                person = np.random.default_rng([0, index // 3 * 2 + (index % 3 > 0), 1])
                chest = sample_chest(person, np.random.default_rng([0, index, 0, 2]), enlarged_heart=True)
                heart, none = (
                    draw_anatomy(dataclasses.replace(chest, heart_ratio=ratio), np.random.default_rng(0), SIZE).pixels
                    for ratio in (chest.heart_ratio, 1e-3)
                )
                assert iou([box_of(heart - none > 0.06)], [finding.box])[0, 0] > 0.8
                checked += 1
    assert checked > 20


def test_findings_stand_out_from_the_noise(films, monkeypatch):
    def invisible(canvas, plan, rng):
        return paint_finding(dataclasses.replace(canvas, pixels=canvas.pixels.copy()), plan, rng)

    monkeypatch.setattr(phantom, "paint", invisible)
    for index, (film, _) in enumerate(films[:200]):
        if len(film.findings) == 1 and film.findings[0].category != HEART:
            x1, y1, x2, y2 = (int(value) for value in film.findings[0].box)
            change = np.abs(film.pixels - draw_film(0, index, SIZE).pixels)[y1:y2, x1:x2]
            corner = film.pixels[-6:, :6]  # below the arm: air or the skin's edge, smooth but for the noise
            assert np.quantile(change, 0.9) > max(0.1, 2 * np.diff(corner, axis=1).std() / np.sqrt(2)), index


def test_boxes_lie_on_the_film_and_can_be_seen(films):
    for film, examples in films:
        assert film.pixels.dtype == np.float32
        assert film.pixels.min() == 0 and film.pixels.max() == pytest.approx(1)
        for box in (box for example in examples for box in example.boxes):
            assert box[0] >= 0 and box[0] + 4 <= box[2] <= SIZE
            assert box[1] >= 0 and box[1] + 4 <= box[3] <= SIZE


def test_findings_lie_in_the_lungs(films):
    for film, _ in films:
        left, right = film.lungs
        assert left[0] + left[2] > right[0] + right[2], "the patient's left is the film's right"
        assert all(0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE for x1, y1, x2, y2 in film.lungs)
        for finding in film.findings:
            x1, y1, x2, y2 = left if finding.side == "left" else right
            u1, v1, u2, v2 = finding.box
            if finding.category in LESIONS:
                assert x1 - 3 < (u1 + u2) / 2 < x2 + 3 and y1 < (v1 + v2) / 2 < y2 + 3, finding


def test_left_is_the_patients_left(upright):
    seen = defaultdict(int)
    for index in range(300):
        for example in phantom_examples(1, index, SIZE)[1]:
            for side in {"left", "right"} & set(example.phrase.split()):
                for x1, _, x2, _ in example.boxes:
                    assert ((x1 + x2) / 2 > SIZE / 2) == (side == "left"), example
                    seen[example.category, side] += 1
            if example.phrase.startswith("bilateral"):  # from the film's left to its right
                (x1, _, x2, _), (x3, _, x4, _) = example.boxes
                assert (x1 + x2) / 2 < SIZE / 2 < (x3 + x4) / 2
            if example.category == HEART and example.boxes:
                assert example.boxes[0][0] + example.boxes[0][2] > SIZE
    assert len(seen) == 2 * (len(CATEGORIES) - 1) and min(seen.values()) > 5


def test_zones_and_size_words_mean_what_they_say(upright):
    heights, areas = defaultdict(list), defaultdict(list)
    for index in range(400):
        for example in phantom_examples(2, index, SIZE)[1]:
            if len(example.boxes) == 1:
                x1, y1, x2, y2 = example.boxes[0]
                words = example.phrase.split()
                for zone in set(ZONES) & set(words):
                    heights[zone].append((y1 + y2) / 2)
                for word in {"small", "moderate", "large"} & set(words):
                    areas[example.category, word].append((x2 - x1) * (y2 - y1))
    assert max(heights["upper"]) < np.median(heights["mid"]) < min(heights["lower"])
    assert np.median(heights["upper"]) < min(heights["mid"]) and max(heights["mid"]) < np.median(heights["lower"])
    for category, words in {
        "opacity": ("small", "large"),
        "effusion": ("small", "moderate", "large"),
        "pneumothorax": ("small", "moderate", "large"),
    }.items():
        means = [np.mean(areas[category, word]) for word in words]
        assert means == sorted(means) and means[-1] > 1.5 * means[0], (category, means)


def test_a_phrase_of_one_box_fits_one_finding_and_an_absent_one_none(films):
    for film, examples in films:
        for example in examples:
            fitting = [finding for finding in film.findings if finding.category == example.category]
            words = set(example.phrase.split())
            if words & {"left", "right"}:
                fitting = [finding for finding in fitting if finding.side in words]
            if words & set(ZONES):
                fitting = [finding for finding in fitting if finding.zone in words]
            assert sorted(finding.box for finding in fitting) == list(example.boxes), (example, film.findings)
            if not example.boxes and example.category in LESIONS:  # nor another lesion that might pass for it
                assert not any(other.category in LESIONS and other.side in words for other in film.findings)


def test_the_mixture_of_records(films):
    examples = [example for _, some in films for example in some]
    boxes = np.array([len(example.boxes) for example in examples])
    sided = [bool({"left", "right"} & set(example.phrase.split())) for example in examples]
    assert set(boxes) == {0, 1, 2}
    assert 0.08 < np.mean(boxes == 2) < 0.15
    assert 0.04 < np.mean(boxes == 0) < 0.10
    assert np.mean(sided) > 0.6
    assert 0.5 < np.mean([len(film.findings) == 2 for film, _ in films]) < 0.8
    assert {len(some) for _, some in films} == {1, 2}
    assert len({word for example in examples for word in example.phrase.split()}) <= 32


def test_words_without_the_film_do_not_give_the_box(films):
    by_phrase = defaultdict(list)
    for _, example in singles(films):
        by_phrase[example.phrase].append(example.boxes[0])
    best = 0.0
    for boxes in by_phrase.values():
        overlap = iou(boxes, boxes)
        best += overlap.mean(1).max() * len(boxes)
    prior = best / sum(len(boxes) for boxes in by_phrase.values())
    assert 0.25 < prior < 0.40, prior


def test_a_film_is_a_function_of_seed_and_index():
    first, again = draw_film(5, 9, SIZE), draw_film(5, 9, SIZE)
    assert np.array_equal(first.pixels, again.pixels) and first.findings == again.findings
    assert not np.array_equal(first.pixels, draw_film(5, 10, SIZE).pixels)
    assert not np.array_equal(first.pixels, draw_film(6, 9, SIZE).pixels)


@pytest.mark.parametrize("size", [56, 131, 320])
def test_a_film_shows_the_same_at_any_size(size):
    for index in range(8):
        usual, other = draw_film(4, index, 224), draw_film(4, index, size)
        assert other.pixels.shape == (size, size)
        assert [found.category for found in usual.findings] == [found.category for found in other.findings]
        for a, b in zip(usual.findings, other.findings, strict=True):
            assert np.abs(np.array(a.box) / 224 - np.array(b.box) / size).max() < 2.5 / min(size, 112)


def test_films_of_a_patient_show_one_build_in_two_poses():
    _, one = phantom_examples(0, 1, SIZE)
    _, two = phantom_examples(0, 2, SIZE)
    assert one[0].patient == two[0].patient and one[0].study != two[0].study
    chests = [
        sample_chest(np.random.default_rng([0, 1, 1]), np.random.default_rng([0, index, 0, 2]), False)
        for index in (1, 2)
    ]
    assert chests[0].spread == chests[1].spread and chests[0].scale != chests[1].scale


def config(folder, **changes):
    return PhantomConfig(**({"out": str(folder), "count": 24, "seed": 3, "val": 3, "test": 6} | changes))


def test_files_do_not_depend_on_the_number_of_processes(tmp_path):
    write_phantom(config(tmp_path / "a"), workers=1)
    write_phantom(config(tmp_path / "b"), workers=2)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(names) == 24 + 4  # records.jsonl, images.jsonl, manifest.json, phantom.json
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_data_set_reads_back_as_it_was_drawn(tmp_path):
    write_phantom(config(tmp_path), workers=1)
    records = load_records(tmp_path)
    for index in range(24):
        pixels, examples = phantom_examples(3, index, SIZE)
        film = read_image(tmp_path / examples[0].image)
        assert np.array_equal(np.asarray(film)[..., 0], pixels)
        own = [record for record in records if record.image == examples[0].image]
        assert [dataclasses.replace(record, split="train") for record in own] == examples


@pytest.mark.parametrize("count, val, test", [(24, 3, 6), (24, 0, 0), (100, 1, 98), (201, 17, 30), (50, 1, 1)])
def test_splits_hold_whole_patients_and_as_many_films_as_asked(count, val, test):
    wanted = config("unused", count=count, val=val, test=test)
    splits = phantom._splits(wanted)
    assert (splits.count("val"), splits.count("test")) == (val, test)
    by_patient = defaultdict(set)
    for index, split in enumerate(splits):
        by_patient[phantom._patient(index)].add(split)
    assert all(len(some) == 1 for some in by_patient.values())
    assert len(by_patient) < count


def test_16_bits_and_dicom_show_the_same_film(tmp_path):
    pytest.importorskip("pydicom")
    import pydicom

    write_phantom(config(tmp_path / "wide", bits=16), workers=1)
    write_phantom(config(tmp_path / "dicom", dicom=True), workers=1)
    wide, dicom = load_records(tmp_path / "wide"), load_records(tmp_path / "dicom")
    assert Image.open(tmp_path / "wide" / wide[0].image).mode == "I;16"
    kinds = set()
    for a, b in zip(wide, dicom, strict=True):
        assert b.image == a.image.replace(".png", ".dcm") and a.boxes == b.boxes
        pixels = phantom_examples(3, int(a.image[-10:-4]), SIZE)[0].astype(int)
        for folder, name in (("wide", a.image), ("dicom", b.image)):
            assert np.abs(np.asarray(read_image(tmp_path / folder / name))[..., 0] - pixels).max() <= 1
        kinds.add(pydicom.dcmread(tmp_path / "dicom" / b.image).PhotometricInterpretation)
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}


def test_the_same_data_set_is_not_drawn_twice(tmp_path, monkeypatch, capsys):
    write_phantom(config(tmp_path), workers=1)
    before = (tmp_path / "records.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(phantom, "draw_film", None)
        write_phantom(config(tmp_path), workers=1)
    assert "already there" in capsys.readouterr().out
    # a part of it is not it: cut off before the records, or images lost
    (tmp_path / "records.jsonl").unlink()
    write_phantom(config(tmp_path), workers=1)
    assert (tmp_path / "records.jsonl").read_bytes() == before
    (tmp_path / "images/000003.png").unlink()
    write_phantom(config(tmp_path), workers=1)
    assert (tmp_path / "images/000003.png").exists()


def test_another_data_set_is_left_alone(tmp_path):
    write_phantom(config(tmp_path / "mine"), workers=1)
    with pytest.raises(ValueError, match=r"mine, phantom films of seed 3"):
        write_phantom(config(tmp_path / "mine", seed=4))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/records.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"other, which holds another data set"):
        write_phantom(config(tmp_path / "other"))
    (tmp_path / "films/images").mkdir(parents=True)
    (tmp_path / "films/images/000001.png").touch()
    with pytest.raises(ValueError, match=r"films, which holds another data set"):
        write_phantom(config(tmp_path / "films"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"got the file .*file"):
        write_phantom(config(tmp_path / "file"))
    (tmp_path / "mine/phantom.json").write_text("[]")
    with pytest.raises(ValueError, match="phantom films of"):
        write_phantom(config(tmp_path / "mine"))
    assert json.loads((tmp_path / "mine/phantom.json").read_text()) == []


@pytest.mark.parametrize(
    "field, changes",
    [
        ("out", {"out": ""}),
        ("count", {"count": 0, "val": 0, "test": 0}),
        ("count", {"val": 12, "test": 12}),
        ("seed", {"seed": -1}),
        ("size", {"size": 55}),
        ("size", {"size": 10_000}),
        ("val", {"val": -1}),
        ("test", {"test": -1}),
        ("bits", {"bits": 12}),
        ("bits", {"bits": 16, "dicom": True}),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, field, changes):
    with pytest.raises(ValueError, match=rf"^{field}: want .*; got "):
        config(tmp_path, **changes)


def test_too_few_films_for_whole_patients(tmp_path):
    with pytest.raises(ValueError, match=r"count: want more films to hold out 1 \+ 1"):
        write_phantom(config(tmp_path, count=3, val=1, test=1))


def test_dicom_without_pydicom(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install pydicom"):
        write_phantom(config(tmp_path, dicom=True))
    assert not list(tmp_path.iterdir())


def test_contact_sheet(tmp_path):
    write_phantom(config(tmp_path), workers=1)
    contact_sheet(tmp_path, tmp_path / "sheet.png", columns=4, rows=2, side=112, first=3)
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert sheet.width == 4 * (112 + 6) + 6
    seen = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert tuple(int(COLOURS[0][at : at + 2], 16) for at in (1, 3, 5)) in seen
    with pytest.raises(ValueError, match="want more than 24 films"):
        contact_sheet(tmp_path, tmp_path / "none.png", first=24)
