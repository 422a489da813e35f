"""The picture of a run: small, with the films that it promises."""

import numpy as np
import pytest
from made_up_run import evaluation, finish_run, prediction, start_run, write_evaluation
from PIL import Image

from medground.report.picture import before_after_picture, evenly
from medground.report.run_files import read_run


def test_the_picture_is_small_and_shows_the_films(tmp_path):
    run, data = start_run(tmp_path)
    finish_run(run)
    rng = np.random.default_rng(1)
    for i in range(5):  # of the size that they are drawn in: no smoothing, the worst case
        noise = rng.integers(0, 256, (300, 300), dtype=np.uint8)
        Image.fromarray(noise).save(data / f"images/{i}.png", compress_level=1)
    out = run / "picture.png"
    before_after_picture(run, [data], out, count=6)
    assert out.stat().st_size < 300_000
    with Image.open(out) as picture:
        assert picture.width > picture.height > 200  # five images, so five films: two rows of three
    before_after_picture(run, [data], out, count=1)
    with Image.open(out) as picture:
        assert picture.height > picture.width


def test_the_picture_needs_both_evaluations(tmp_path):
    run, data = start_run(tmp_path)
    with pytest.raises(ValueError, match="evaluations before and after"):
        before_after_picture(run, [data], tmp_path / "x.png")
    with pytest.raises(ValueError, match="count >= 1; got 0"):
        before_after_picture(run, [data], tmp_path / "x.png", count=0)


def test_the_films_stand_evenly_from_best_to_worst(tmp_path):
    run, _ = start_run(tmp_path)
    rows = [prediction(i % 11, i / 100, []) | {"id": f"r{i}", "image": f"{i}.png"} for i in range(100)]
    write_evaluation(run, "step-000000", evaluation(0, 0.5), rows)
    write_evaluation(run, "step-000004", evaluation(4, 0.5), rows)
    films = read_run(run).films
    assert [film.after["iou"] for film in evenly(films, 5)] == [0.89, 0.69, 0.49, 0.29, 0.09]
    assert len(evenly(films[:3], 5)) == 3
    same = [film for film in films if film.record["image"] in ("0.png", "1.png")]
    assert len(evenly(same + same, 5)) == 2


def test_boxes_before_and_after_are_drawn(tmp_path):
    run, data = start_run(tmp_path)
    finish_run(run)
    out = tmp_path / "x.png"
    before_after_picture(run, [data], out)
    with Image.open(out) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    for wanted in ((61, 220, 151), (255, 159, 67), (76, 194, 255)):
        assert min(max(abs(a - b) for a, b in zip(wanted, color, strict=True)) for color in colors) < 25
