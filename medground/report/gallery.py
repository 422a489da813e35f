"""Films of the test records with their true and predicted boxes: which are shown, and their HTML.

Phrases, categories and completions come from data and models: everything passes `escape` or `safe_json`.
"""

import base64
import io
import json
import random
from collections.abc import Sequence
from html import escape
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from medground.datasets.folders import image_path
from medground.datasets.images import read_image
from medground.records import Box
from medground.report.run_files import Film, Row, RunFiles, drawable

EACH = 16  # films of each kind
KINDS = {"random": "drawn at random", "gain": "largest gains", "failure": "lowest IoU"}
IMAGE_BUDGET = 2_800_000  # characters of all embedded images together
SIDES = (448, 352, 288, 224)  # longest side of an embedded image, in pixels: the first that keeps the budget
LOSSLESS = 200  # images up to this side are embedded without loss
MOST_TEXT = 3000  # characters of a completion


def choose(films: list[Film], each: int = EACH, seed: int = 0) -> list[tuple[Film, tuple[str, ...]]]:
    """The films to show, each with the kinds (keys of KINDS) that it was chosen for.

    The random ones are drawn from all films, so that they stand for the whole; gains are among films with a true box,
    since an absent finding goes from 0 to 1 at once. A film may be of several kinds.

    Returns:
        At most 3 * each, in the order random, gains, failures.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(films, len(films))  # ties among gains and failures fall at random
    kinds: dict[int, list[str]] = {}
    chosen = {"random": shuffled[:each]}
    if any(film.after for film in films):
        gains = sorted((film for film in shuffled if film.truth and film.gain > 0), key=lambda film: -film.gain)
        lowest = sorted((film for film in shuffled if film.after), key=lambda film: (film.after or {})["iou"])
        chosen |= {"gain": gains[:each], "failure": lowest[:each]}
    order = {id(film): film for some in chosen.values() for film in some}
    for kind, some in chosen.items():
        for film in some:
            kinds.setdefault(id(film), []).append(kind)
    return [(film, tuple(kinds[key])) for key, film in order.items()]


def gallery(run: RunFiles, data: Sequence[str]) -> str:
    """Controls, cards, and the completions as JSON for the page's script.

    Args:
        run: as `read_run` gives it.
        data: folders of the records.

    Raises:
        ValueError: an image is missing, unreadable, or outside of them; names it.
    """
    chosen = choose(run.films)
    if not chosen:
        return '<p class="nothing">No predictions on the test records yet.</p>'
    pictures = _embedded([image_of(film, data) for film, _ in chosen])
    cards = [_card(i, *item, picture) for i, (item, picture) in enumerate(zip(chosen, pictures, strict=True))]
    films = [_texts(film) for film, _ in chosen]
    return (
        f"{_controls(chosen, len(run.films))}"
        f'<div class="gallery" id="gallery">{"".join(cards)}</div>'
        '<dialog id="completions" aria-label="completions"></dialog>'
        f'<script type="application/json" id="film-texts">{safe_json(films)}</script>'
    )


def image_of(film: Film, data: Sequence[str]) -> Image.Image:
    """The film's image, RGB.

    Raises:
        ValueError: it cannot be read, or its path leaves its folder.
    """
    name = PurePosixPath(film.record["image"])
    if name.is_absolute() or ".." in name.parts:
        record = film.record
        raise ValueError(f"record {record['id']!r}: want an image inside its data folder; got {record['image']!r}")
    return read_image(image_path(data, str(name)))


def safe_json(value: Any) -> str:
    """JSON that may stand in a `<script>` element: no character that could end it, ASCII only, no NaN."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _embedded(images: list[Image.Image]) -> list[str]:
    encoded: list[str] = []
    for side in SIDES:
        encoded = [_data_url(image, side) for image in images]
        if sum(map(len, encoded)) <= IMAGE_BUDGET:
            break
    return encoded


def _data_url(image: Image.Image, side: int) -> str:
    pixels = np.asarray(image)
    if (pixels == pixels[..., :1]).all():  # grey: a third of the bytes
        image = image.convert("L")
    lossless = max(image.size) <= LOSSLESS
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if lossless else {"quality": 82}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _card(index: int, film: Film, kinds: tuple[str, ...], picture: str) -> str:
    record, after = film.record, film.after or film.before or film.record
    width, height = record["width"], record["height"]
    boxes = [_rects(_thoughts(row), f"thought {name}") for name, row in _answers(film)]  # shown where a film is opened
    boxes += [_rects(film.truth, "truth")]
    boxes += [_rects(drawable(row["boxes"]), name) for name, row in _answers(film)]
    return (
        f'<button type="button" class="film" data-index="{index}" data-category="{escape(record["category"])}" '
        f'data-kinds="{" ".join(kinds)}" data-iou="{after["iou"]:.4f}" data-gain="{film.gain:.4f}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="xMidYMid meet" aria-hidden="true">'
        f'<image href="{picture}" width="{width}" height="{height}" preserveAspectRatio="none"/>{"".join(boxes)}</svg>'
        f'<bdi class="phrase">{escape(record["phrase"])}</bdi>'
        f'<span class="scores">{_scores(film)}</span></button>'
    )


def _rects(boxes: tuple[Box, ...], style: str) -> str:
    return "".join(
        f'<rect class="{style}" x="{x1:.2f}" y="{y1:.2f}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}"/>'
        for x1, y1, x2, y2 in boxes
    )


def _answers(film: Film) -> list[tuple[str, Row]]:
    return [(name, row) for name, row in (("before", film.before), ("after", film.after)) if row]


def _thoughts(row: Row) -> tuple[Box, ...]:
    """Boxes named while thinking; older predictions have none."""
    return drawable(row.get("thought_boxes"))


def _scores(film: Film) -> str:
    parts = [f'<span class="{name}">{row["iou"]:.2f}</span>' for name, row in _answers(film)]
    remarks = [] if film.record["truth"] else ["absent"]
    if answers := _answers(film):
        boxes = answers[-1][1]["boxes"]
        remarks += ["unreadable"] if boxes is None else ["no box"] if not boxes and film.record["truth"] else []
    return f"<small>IoU</small> {' → '.join(parts)}{''.join(f'<em>{remark}</em>' for remark in remarks)}"


def _texts(film: Film) -> Row:
    """What the script shows of a film: no html in it, the script sets it as text."""
    answers = {}
    for name, row in _answers(film):
        text = row["completion"]
        if len(text) > MOST_TEXT:
            text = f"{text[:MOST_TEXT]}\n… ({len(text) - MOST_TEXT} more characters in the predictions file)"
        answers[name] = {"text": text, "iou": f"{row['iou']:.3f}", "boxes": _spoken(row["boxes"])}
        if thoughts := row.get("thought_boxes"):
            answers[name]["thoughts"] = _spoken(thoughts)
    record = film.record
    return {key: record[key] for key in ("id", "phrase", "category")} | {"truth": _spoken(record["truth"])} | answers


def _spoken(boxes: Any) -> str:
    if boxes is None:
        return "no readable answer"
    return ", ".join("[" + ", ".join(f"{v:.4g}" for v in box) + "]" for box in boxes) or "no box"


def _controls(chosen: list[tuple[Film, tuple[str, ...]]], total: int) -> str:
    categories = sorted({film.record["category"] for film, _ in chosen})
    counts = {kind: sum(kind in kinds for _, kinds in chosen) for kind in KINDS}
    kinds = "".join(f'<option value="{k}">{text} ({counts[k]})</option>' for k, text in KINDS.items() if counts[k])
    names = "".join(f'<option value="{escape(c)}">{escape(c)}</option>' for c in categories)
    layers = ["truth", *(name for name in ("before", "after") if any(getattr(film, name) for film, _ in chosen))]
    if any(_thoughts(row) for film, _ in chosen for _, row in _answers(film)):
        layers.append("thought")
    named = {"thought": "while thinking (opened)"}
    boxes = "".join(
        f'<label class="layer"><input type="checkbox" data-layer="{layer}" checked>'
        f'<i class="{layer}"></i>{named.get(layer, layer)}</label>'
        for layer in layers
    )
    return (
        f'<p class="small">{len(chosen)} of {total} test records. A click shows the completions; '
        "on a frontal film the patient's left is on the right.</p>"
        f'<form class="controls" id="controls"><span class="layers">{boxes}</span>'
        f'<label>show <select name="kind"><option value="">all chosen ({len(chosen)})</option>{kinds}</select></label>'
        f'<label>category <select name="category"><option value="">all</option>{names}</select></label>'
        '<label>sort by <select name="sort"><option value="">as chosen</option>'
        '<option value="high">highest IoU</option><option value="low">lowest IoU</option>'
        '<option value="gain">largest gain</option></select></label>'
        '<output name="count"></output></form>'
    )
