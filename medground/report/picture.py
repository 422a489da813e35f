"""One PNG with a few test films, before and after training: for a README or a slide."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from medground.records import Box
from medground.report.gallery import image_of
from medground.report.run_files import Film, Row, drawable, read_run

MOST_BYTES = 300_000
# side of a film in pixels and colours of the palette: the first that are small enough
SIZES = ((300, 256), (300, 96), (260, 80), (220, 80), (180, 64), (140, 48), (100, 32))
POINTS = 14  # font size at a side of 300 pixels
COLORS = {"truth": (61, 220, 151), "before": (255, 159, 67), "after": (76, 194, 255)}
PAPER, INK, MUTED = (23, 29, 38), (232, 237, 244), (152, 164, 181)


def before_after_picture(run: Path, data: Sequence[str], out_png: Path, count: int = 6) -> None:
    """Draw `count` test films with the true box and the boxes before and after training.

    The films stand evenly from the best to the worst IoU after training, among those with a true box, so that the
    picture neither flatters nor blames.

    Args:
        run: folder of a run that has its evaluation after training.
        data: folders of the run's records.
        out_png: file to write, below 300 kB.
        count: films, >= 1; fewer when the test split has fewer.

    Raises:
        ValueError: the run has no evaluation after training, no film has a box, count < 1, or an image cannot be read.
    """
    if count < 1:
        raise ValueError(f"want count >= 1; got {count}")
    films = [film for film in read_run(Path(run)).films if film.truth and film.before and film.after]
    if not films:
        raise ValueError(f"{run}: want evaluations before and after training with a true box; got none")
    chosen = evenly(films, count)
    images = [image_of(film, data) for film in chosen]
    png = b""
    for side, colors in SIZES:
        png = _png(_sheet(chosen, images, side), colors)
        if len(png) <= MOST_BYTES:
            break
    Path(out_png).write_bytes(png)


def evenly(films: list[Film], count: int) -> list[Film]:
    """`count` films at even distances from the best to the worst IoU after training; of each image the first record."""
    first = {film.record["image"]: film for film in reversed(films)}
    ranked = sorted(first.values(), key=lambda film: (-_iou(film.after), film.record["id"]))
    count = min(count, len(ranked))
    return [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]


def _iou(answer: Row | None) -> float:
    return answer["iou"] if answer else 0.0


def _sheet(films: list[Film], images: list[Image.Image], side: int) -> Image.Image:
    points = POINTS * side / 300
    font = ImageFont.load_default(points)
    line, gap = round(1.35 * points), side // 20
    columns = min(3, len(films))
    rows = -(-len(films) // columns)
    cell = side + 3 * line + gap
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * cell + 2 * gap + line), PAPER)
    draw = ImageDraw.Draw(sheet)
    x = gap
    for name, color in COLORS.items():
        text = {"truth": "true box", "before": "before training", "after": "after training"}[name]
        draw.rectangle((x, gap + line * 0.1, x + line, gap + line * 0.75), outline=color, width=2)
        draw.text((x + 1.4 * line, gap), text, INK, font)
        x += round(2.4 * line + draw.textlength(text, font))
    for i, (film, image) in enumerate(zip(films, images, strict=True)):
        corner = (gap + i % columns * (side + gap), 2 * gap + line + i // columns * cell)
        sheet.paste(_film(film, image, side), corner)
        words = _wrapped(draw, film.record["phrase"], font, side)
        words += [f"IoU {_iou(film.before):.2f} before, {_iou(film.after):.2f} after"]
        for j, text in enumerate(words):
            draw.text((corner[0], corner[1] + side + j * line + 3), text, MUTED if j == len(words) - 1 else INK, font)
    return sheet


def _film(film: Film, image: Image.Image, side: int) -> Image.Image:
    """The film in a black square, its boxes on it."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square = Image.new("RGB", (side, side))
    square.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
    draw = ImageDraw.Draw(square)
    for name, row in (("truth", film.truth), ("before", film.before), ("after", film.after)):
        for box in row if isinstance(row, tuple) else drawable(row["boxes"] if row else None):
            draw.rectangle(_scaled(box, scale, left, top, side), outline=COLORS[name], width=max(2, side // 120))
    return square


def _scaled(box: Box, scale: float, left: int, top: int, side: int) -> tuple[float, float, float, float]:
    # a box that leaves the film ends at its edge
    x1, y1, x2, y2 = (min(max(v * scale + at, 0), side - 1) for v, at in zip(box, (left, top, left, top), strict=True))
    return x1, y1, x2, y2


def _wrapped(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """At most two lines; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 2:
        lines = [lines[0], lines[1] + " ..."]
    for i, line in enumerate(lines):
        while draw.textlength(line, font) > width and len(line) > 4:
            line = line.removesuffix("...")[:-1].rstrip() + "..."
        lines[i] = line
    return lines


def _png(sheet: Image.Image, colors: int) -> bytes:
    buffer = io.BytesIO()
    # a palette without dithering: films are grey, and dithered noise does not compress
    sheet.quantize(colors, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()
