"""Crops against PIL's, and images put together again from their patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.prompts import load_processor, make_prompt
from medground.rewards.crops import CHUNK, crops_of, images_of, squares


def by_pil(image, box, size):
    """The crop as PIL cuts it from a black frame wide enough for whatever lies outside."""
    frame = 200
    wide = torch.zeros(3, image.shape[1] + 2 * frame, image.shape[2] + 2 * frame)
    wide[:, frame : frame + image.shape[1], frame : frame + image.shape[2]] = image
    place = [v + frame for v in box]
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((size, size), Image.Resampling.BILINEAR, box=place))
        for plane in wide
    ]
    # PIL cuts its filter off at the box's edge
    return torch.tensor(np.stack(planes))


@pytest.mark.parametrize("size", [7, 32])
def test_crops_are_those_of_pil(size):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 60, 90)
    images[1, :, 40:] = 0
    boxes = [
        (0, 0, 90, 60),
        (10.5, 3.25, 74.5, 59.25),
        (-30, -20, 60, 70),
        (80, 50, 88, 58),
        (5, 5, 6, 6),
        (1, 2, 150, 190),
    ]
    which = torch.tensor([0, 1, 0, 1, 0, 1])
    got = crops_of(images, which, torch.tensor(boxes, dtype=torch.float32), size)
    for crop, index, (x1, y1, x2, y2) in zip(got, which.tolist(), boxes, strict=True):
        want = by_pil(images[index], (x1, y1, x2, y2), size)
        margin = slice(1, -1)  # away from the edges, where PIL forgets what lies beyond the box
        torch.testing.assert_close(crop[:, margin, margin], want[:, margin, margin], atol=2e-3, rtol=0)


def test_a_flat_image_stays_flat_and_outside_is_black():
    image = torch.full((1, 3, 40, 40), 0.7)
    inside, outside, half = crops_of(
        image, torch.zeros(3, dtype=torch.int64), torch.tensor([[4.0, 4, 36, 36], [50, 50, 70, 70], [20, 0, 60, 40]]), 8
    )
    torch.testing.assert_close(inside, torch.full_like(inside, 0.7))
    assert not outside.any()
    torch.testing.assert_close(half[:, 1:-1, :3], torch.full((3, 6, 3), 0.7))
    assert not half[:, :, 5:].any()


def test_more_crops_than_are_cut_at_once():
    torch.manual_seed(0)
    images, n = torch.rand(3, 3, 20, 20), CHUNK + 5
    which, start = torch.randint(3, (n,)), torch.rand(n, 2) * 10
    regions = torch.cat([start, start + 8], 1)
    got = crops_of(images, which, regions, 4)
    for i in (0, CHUNK - 1, CHUNK, n - 1):
        torch.testing.assert_close(got[i : i + 1], crops_of(images, which[i : i + 1], regions[i : i + 1], 4))
    assert crops_of(images, which[:0], regions[:0], 4).shape == (0, 3, 4, 4)
    many = crops_of(images[:1], torch.zeros(n, dtype=torch.int64), regions, 4)
    torch.testing.assert_close(many[-1:], crops_of(images[:1], which[:1] * 0, regions[-1:], 4))


def test_squares_keep_the_centre_and_the_longer_side():
    got = squares(torch.tensor([[10.0, 20, 30, 30]]), 1.5)
    assert got.tolist() == [[5, 10, 35, 40]]


def test_images_come_back_from_their_patches(phantoms: Path, base_folder: Path):
    processor = load_processor(base_folder, 28 * 28, 112 * 112)
    record = load_records(phantoms)[0]
    pictures = [read_image(phantoms / record.image), Image.effect_noise((84, 112), 90).convert("RGB")]
    prompts = [make_prompt(record, picture, processor, "brief") for picture in pictures]
    got = images_of(prompts, "cpu")
    assert torch.equal(images_of(prompts, "cpu", 1), got[:, :1])
    height, width = got.shape[2:]
    assert (width, height) == (max(p.processed_width for p in prompts), max(p.processed_height for p in prompts))
    for image, prompt, picture in zip(got, prompts, pictures, strict=True):
        w, h = prompt.processed_width, prompt.processed_height
        want = torch.tensor(np.asarray(picture.resize((w, h), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
        assert (image[:, :h, :w] - want).abs().max() < 0.02
        assert not image[:, h:].any() and not image[:, :, w:].any()
