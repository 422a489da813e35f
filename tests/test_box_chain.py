"""Every box ends where it began: original -> record -> image that the model sees -> answer's text -> original.

An object is painted into the original; at each station it is found again in the pixels and compared with the box.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_originals import edges, paint, rows_of
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medground.answers import parse_answer, render_answer
from medground.datasets.films import scaled, shown_size
from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.datasets.own_csv import OwnCsvConfig, prepare_csv
from medground.prompts import load_processor, make_prompt, to_original, to_processed
from medground.records import Example, Prompt

SIZES = [
    (40, 60), (60, 40), (56, 56), (57, 83), (112, 112), (131, 97), (200, 240), (255, 512), (320, 320), (399, 640),
    (512, 300), (640, 640), (641, 777), (800, 600), (1000, 333), (1024, 1024), (1500, 1300), (2048, 2500), (2544, 3056),
    (3056, 2544),
]  # fmt: skip
LONGEST = (0, 640)
PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 640 * 640})


def box_in(size):
    """A box off the middle, its sides a fifth and a third of the image's."""
    w, h = size
    return w * 3 // 7, h // 5, w * 3 // 7 + w // 5, h // 5 + h // 3


@pytest.fixture(scope="module", params=LONGEST)
def prepared(request, tmp_path_factory):
    """The data folder, and its records by size of the original."""
    root = tmp_path_factory.mktemp("chain")
    lines = ["image,phrase,x1,y1,x2,y2,width,height"]
    for w, h in SIZES:
        name = f"{w}x{h}" + (".jpg" if w % 2 else ".png")
        paint(root / "films" / name, (w, h), box_in((w, h)))
        lines.append(",".join(map(str, (name, "object", *box_in((w, h)), w, h))))
    (root / "rows.csv").write_text("\n".join(lines))
    out = root / "out"
    prepare_csv(OwnCsvConfig(annotations=str(root / "rows.csv"), images=str(root / "films"), out=str(out),
                             longest_side=request.param, workers=1))  # fmt: skip
    originals = {row["image"]: (row["original_width"], row["original_height"]) for row in rows_of(out, "images.jsonl")}
    return out, {originals[record.image]: record for record in load_records(out)}


def seen(image):
    """What the model sees, put together again from its patches: [height, width]."""
    return together(PROCESSOR(images=[image], return_tensors="np"))


def together(patches):
    """Patches as a picture, [height, width], of one channel."""
    (_, rows, columns), m, p = patches["image_grid_thw"][0].tolist(), PROCESSOR.merge_size, PROCESSOR.patch_size
    pixels = patches["pixel_values"].reshape(rows // m, columns // m, m, m, 3, -1, p, p)[:, :, :, :, 0, 0]
    return pixels.transpose(0, 2, 4, 1, 3, 5).reshape(rows * p, columns * p)


def distance(a, b, scale=(1, 1)):
    return max(abs(x - y) / s for x, y, s in zip(a, b, [*scale, *scale], strict=True))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_box_ends_where_it_began(prepared, size):
    out, records = prepared
    record = records[size]
    (box,) = record.boxes
    picture = read_image(out / record.image)
    assert picture.size == (record.width, record.height)
    assert distance(edges(np.asarray(picture)[..., 0]), box) < 0.5

    shown = seen(picture)
    height, width = shown.shape
    none = np.zeros(0)
    prompt = Prompt(record, none, none, none, none, (), width, height)
    processed = to_processed(box, prompt)
    found = edges(shown)
    assert distance(found, processed) < 0.5

    # without rounding the way back is exact; an answer speaks whole pixels of what the model sees
    original = box_in(size)
    factor = (record.width / size[0], record.height / size[1])
    back = scaled(to_original(processed, prompt), (record.width, record.height), size)
    assert distance(back, original) < 1e-6 * max(size)
    answer = parse_answer(render_answer((found,), "seen"))
    assert answer.well_formed and len(answer.boxes) == 1
    assert distance(answer.boxes[0], found) <= 0.5
    back = scaled(to_original(answer.boxes[0], prompt), (record.width, record.height), size)
    pixel = size[0] / width, size[1] / height  # an answer's pixel in the original's
    assert distance(back, original, pixel) <= 1, (back, original)
    exact = parse_answer(f"<answer>{json.dumps({'bbox_2d': [float(v) for v in found]})}</answer>")
    back = scaled(to_original(exact.boxes[0], prompt), (record.width, record.height), size)
    assert distance(back, original, (max(1, pixel[0]), max(1, pixel[1]))) < 0.5, (factor, back, original)


BUDGETS = {"reduced": (56 * 56, 140 * 140), "enlarged": (700 * 700, 1280 * 28 * 28), "one size": (448 * 448, 448 * 448)}


@pytest.mark.parametrize("least, most", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("size", [(56, 56), (83, 210), (640, 400), (1000, 1333)], ids=str)
def test_boxes_go_through_every_pixel_budget_and_back(size, least, most, tmp_path, base_folder):
    box = box_in(size)
    picture = read_image(paint(tmp_path / "a.png", size, box))
    example = Example("a", "a.png", *size, "object", (box,), "a", "a", "a", "a", "test")
    prompt = make_prompt(example, picture, load_processor(base_folder, least, most), "brief")
    shown = together({"image_grid_thw": prompt.image_grid_thw, "pixel_values": prompt.pixel_values.numpy()})
    assert shown.shape == (prompt.processed_height, prompt.processed_width)
    slack = 1.2 if least == most else 1.0  # sides are multiples of 28: one number is met roughly
    assert least / slack <= shown.size <= most * slack
    found = edges(shown)
    assert distance(found, to_processed(box, prompt)) < 0.5
    pixel = size[0] / prompt.processed_width, size[1] / prompt.processed_height
    assert distance(to_original(found, prompt), box, pixel) < 0.5
    assert distance(to_original(to_processed(box, prompt), prompt), box) < 1e-9 * max(size)


SIDE = st.integers(1, 4000)
FRACTION = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(SIDE, SIDE, st.integers(0, 4000), st.tuples(FRACTION, FRACTION, FRACTION, FRACTION))
def test_scaled_boxes(width, height, longest, fractions):
    size = (width, height)
    to = shown_size(size, longest)
    assert max(to) == (min(longest, max(size)) if longest else max(size)) and min(to) >= 1
    if min(to) > 1:  # the shape is kept to within a pixel
        assert abs(to[0] / to[1] - width / height) <= 0.5 * (1 + width / height) / to[1]
    (x1, x2), (y1, y2) = sorted(fractions[:2]), sorted(fractions[2:])
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    there = scaled(box, size, to)
    assert 0 <= there[0] <= there[2] <= to[0] and 0 <= there[1] <= there[3] <= to[1]
    assert distance(scaled(there, to, size), box) < 1e-9 * max(size) + 1e-9
    assert scaled((0, 0, width, height), size, to) == (0, 0, *to)


@settings(max_examples=60, deadline=None)
@given(st.integers(28, 900), st.integers(28, 900), st.tuples(FRACTION, FRACTION, FRACTION, FRACTION))
def test_processed_boxes_come_back(width, height, fractions):
    (x1, x2), (y1, y2) = sorted(fractions[:2]), sorted(fractions[2:])
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    example = Example("a", "a.png", width, height, "a", (box,), "a", "a", "a", "a", "test")
    none = np.zeros(0)
    for processed in ((width, height), (28, 1400), (width * 2, height + 13)):
        prompt = Prompt(example, none, none, none, none, (), *processed)
        there = to_processed(box, prompt)
        assert 0 <= there[0] <= there[2] <= processed[0] * (1 + 1e-12) and there[3] <= processed[1] * (1 + 1e-12)
        assert distance(to_original(there, prompt), box) < 1e-9 * (width + height)


def test_the_finder_of_edges_itself():
    grey = np.zeros((30, 40))
    grey[5:15, 10:22] = 200
    assert edges(grey) == (10, 5, 22, 15)
    half = np.asarray(Image.fromarray(grey.astype(np.uint8)).resize((20, 15), Image.Resampling.BOX))
    assert distance(edges(half), (5, 2.5, 11, 7.5)) < 0.26
