"""Augmented images keep the truth: an object is painted, changed with its box, and found again in the pixels."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from medground.augmentation import augment, never_mirrored, swap_sides
from medground.config import AugmentConfig
from medground.records import Box, Example

SIZE = (211, 160)
OBJECT = (30.0, 44.0, 75.0, 90.0)


def case(*boxes: Box, phrase: str = "left nodule", size: tuple[int, int] = SIZE) -> tuple[Example, Image.Image]:
    """Bright boxes on black."""
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[int(y1) : int(y2), int(x1) : int(x2)] = 255
    example = Example("a", "a.png", *size, phrase, boxes, "nodule", "p", "s", "t", "train")
    return example, Image.fromarray(pixels).convert("RGB")


def found(image: Image.Image) -> Box:
    """Where the one bright box is, from areas: exact where an edge lies within a pixel."""
    grey = np.asarray(image)[..., 0] / 255
    along = grey.max(0), grey.max(1)
    widths = [profile.sum() for profile in along]
    middles = [(profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum() for profile in along]
    (w, h), (x, y) = widths, middles
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def test_the_finder_itself():
    assert found(case(OBJECT)[1]) == pytest.approx(OBJECT)


OPTIONS = {
    "nothing": AugmentConfig(),
    "flip": AugmentConfig(flip=1.0),
    "shift": AugmentConfig(shift=0.2),
    "scale": AugmentConfig(scale=0.3),
    "all": AugmentConfig(flip=0.5, shift=0.3, scale=0.3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_box_is_where_the_object_is(options):
    places = set()
    for position in range(60):
        example, image = augment(*case(OBJECT), options, seed=1, position=position)
        (box,) = example.boxes
        assert image.size == SIZE and (example.width, example.height) == SIZE
        assert max(abs(a - b) for a, b in zip(found(image), box, strict=True)) < 0.35, position
        places.add(tuple(round(v, 3) for v in box))
    assert len(places) == {"nothing": 1, "flip": 1}.get(next(n for n, o in OPTIONS.items() if o is options), 60)


@pytest.mark.parametrize("touching", [(0.0, 0.0, 40.0, 30.0), (150.0, 100.0, 211.0, 160.0), (0.0, 0.0, 211.0, 160.0)])
def test_boxes_stay_whole_at_the_edge(touching):
    for position in range(40):
        example, image = augment(*case(touching), OPTIONS["all"], seed=2, position=position)
        x1, y1, x2, y2 = example.boxes[0]
        assert 0 <= x1 < x2 <= SIZE[0] and 0 <= y1 < y2 <= SIZE[1]
        scale = (x2 - x1) / (touching[2] - touching[0])
        assert scale == pytest.approx((y2 - y1) / (touching[3] - touching[1])) and 0.7 <= scale <= 1.3
        assert max(abs(a - b) for a, b in zip(found(image), example.boxes[0], strict=True)) < 0.5, position


def test_several_boxes_move_together():
    second = (120.0, 20.0, 150.0, 60.0)
    for position in range(20):
        example, image = augment(*case(OBJECT, second), OPTIONS["all"], seed=3, position=position)
        for box in example.boxes:
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            assert np.asarray(image)[int(y), int(x), 0] == 255
        grey = np.asarray(image)[..., 0] / 255
        area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in example.boxes)
        assert grey.sum() == pytest.approx(area, rel=0.03)


def test_shifts_and_scales_reach_as_far_as_they_may_and_no_farther():
    small = (100.0, 75.0, 110.0, 85.0)
    boxes = [augment(*case(small), OPTIONS["shift"], 0, p)[0].boxes[0] for p in range(200)]
    shifts = np.array(boxes)[:, :2] - small[:2]
    assert np.abs(shifts[:, 0]).max() == pytest.approx(0.2 * SIZE[0], rel=0.05)
    assert np.abs(shifts[:, 1]).max() == pytest.approx(0.2 * SIZE[1], rel=0.05)
    assert np.abs(shifts).max(0)[0] <= 0.2 * SIZE[0] and abs(shifts.mean(0)).max() < 5
    boxes = [augment(*case(small), OPTIONS["scale"], 0, p)[0].boxes[0] for p in range(200)]
    scales = [(box[2] - box[0]) / 10 for box in boxes]
    assert 0.7 <= min(scales) < 0.72 and 1.28 < max(scales) <= 1.3


def test_an_absent_finding_stays_absent():
    example, image = augment(*case(), OPTIONS["all"], seed=0, position=3)
    assert example.boxes == () and image.size == SIZE


def test_intensity_moves_no_pixel():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (9, 1))).convert("RGB")
    example = replace(case(OBJECT)[0], width=256, height=9)
    seen = []
    for position in range(40):
        same, image = augment(example, ramp, AugmentConfig(intensity=0.2), seed=0, position=position)
        assert same == example
        row = np.asarray(image)[4].astype(int)
        assert (row == row[:, :1]).all() and (np.diff(row[:, 0]) >= 0).all()
        assert abs(row[:, 0] - np.arange(256)).max() <= 0.2 * 127.5 * 2 + 1
        seen.append(tuple(row[::64, 0]))
    assert len(set(seen)) == 40


def test_a_change_is_a_function_of_seed_and_position():
    def of(seed: int, position: int) -> tuple[Example, bytes]:
        example, image = augment(*case(OBJECT), replace(OPTIONS["all"], intensity=0.3), seed, position)
        return example, image.tobytes()

    assert of(5, 9) == of(5, 9)
    assert of(5, 9) != of(5, 10) and of(5, 9) != of(6, 9)


def test_a_share_of_the_prompts_is_mirrored():
    mirrored = [augment(*case(OBJECT), AugmentConfig(flip=0.25), 0, p)[0].phrase == "right nodule" for p in range(500)]
    assert 0.19 < np.mean(mirrored) < 0.31


SWAPPED = {
    "left nodule": "right nodule",
    "Right-sided pneumothorax": "Left-sided pneumothorax",
    "nodules in the left and right lungs": "nodules in the right and left lungs",
    "tube shifted leftward": "tube shifted rightward",
    "bilateral opacities": "bilateral opacities",
    "small apical pneumothorax": "small apical pneumothorax",
}
NEVER = [
    "enlarged cardiac silhouette", "cardiomegaly", "Cardiomegaly on the left", "the heart", "situs inversus",
    "dextrocardia", "aortic knob", "left ventricle", "right middle lobe opacity", "lingular consolidation",
    "consolidation in the RUL", "opacity in the L lung", "SVC line", "liver lesion", "hepatic cyst", "splenic lesion",
    "stomach bubble", "upright film, left nodule", "elevated left hemidiaphragm", "lésion gauche", "Knoten links",
    "gauche", "mediastinal shift", "left lung, seen at 3 o'clock", "LEFT LUNG NODULE",
]  # fmt: skip


def test_sides_are_swapped_where_that_is_safe():
    for phrase, swapped in SWAPPED.items():
        assert swap_sides(phrase) == swapped
        assert swap_sides(swapped) == phrase


@pytest.mark.parametrize("phrase", NEVER)
def test_what_is_not_safe_is_never_mirrored(phrase):
    assert swap_sides(phrase) is None
    example, image = case(OBJECT, phrase=phrase)
    same, picture = augment(example, image, AugmentConfig(flip=1.0), 0, 0)
    assert same == example and picture.tobytes() == image.tobytes()


def test_records_that_are_never_mirrored_are_counted():
    assert never_mirrored([case(phrase=phrase)[0] for phrase in (*SWAPPED, *NEVER)]) == len(NEVER)


def test_either_convention_of_sides_stays_true():
    """On the patient's left is on the image's right, or the words mean the image's sides."""
    options = AugmentConfig(flip=0.5, shift=0.1, scale=0.1)
    for box, away in (((150.0, 50.0, 180.0, 80.0), False), (OBJECT, True)):
        phrases = set()
        for position in range(30):
            example, image = augment(*case(box), options, 0, position)
            x1, _, x2, _ = found(image)
            on_the_right = x1 + x2 > SIZE[0]
            assert (example.phrase == "left nodule") == (on_the_right != away)
            phrases.add(example.phrase)
        assert phrases == {"left nodule", "right nodule"}
