"""An image with boxes drawn on it and, below, what they are: numbers, phrases, colours."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from medground.records import Box

LEAST_SIDE = 512  # smaller images are enlarged, so that words can be read
PAPER, INK = (16, 21, 28), (232, 237, 244)
COLORS = ((76, 194, 255), (255, 159, 67), (61, 220, 151), (242, 122, 153), (217, 193, 74), (180, 140, 240))


def draw_overlay(image: Image.Image, items: Sequence[tuple[str, Sequence[Box], str]]) -> Image.Image:
    """Draw boxes on a copy of an image, enlarged by a whole number where it is small.

    Args:
        image: RGB.
        items: (phrase, boxes in the image's pixels, words on the answer); each has its number and colour.

    Returns:
        RGB image, as wide as the (enlarged) one and higher by the lines of text.
    """
    scale = max(1, -(-LEAST_SIDE // max(image.size)))
    width, height = image.width * scale, image.height * scale
    points = max(13, max(width, height) // 48)
    font = ImageFont.load_default(points)
    measure = ImageDraw.Draw(image)
    legend = [
        (number, line)
        for number, (phrase, _, words) in enumerate(items, 1)
        for line in _wrapped(measure, f"{number}. {phrase}: {words}", font, width - points)
    ]
    step = round(1.4 * points)
    sheet = Image.new("RGB", (width, height + step * len(legend) + points), PAPER)
    sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC) if scale > 1 else image)
    draw = ImageDraw.Draw(sheet)
    for number, (_, boxes, _) in enumerate(items, 1):
        for box in boxes:
            _draw_box(draw, box, scale, (width, height), number, font)
    for at, (number, line) in enumerate(legend):
        draw.text((points / 2, height + points / 2 + at * step), line, color_of(number), font)
    return sheet


def color_of(number: int) -> tuple[int, int, int]:
    """The colour of an item, counted from 1."""
    return COLORS[(number - 1) % len(COLORS)]


def _draw_box(
    draw: ImageDraw.ImageDraw,
    box: Box,
    scale: int,
    size: tuple[int, int],
    number: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    xs, ys = sorted((box[0], box[2])), sorted((box[1], box[3]))  # a model may name corners in any order
    # a pixel's area is [x, x + 1]: the box's last pixel is the one before its edge
    left, right = (min(max(x * scale, 0), size[0] - 1) for x in (xs[0], xs[1] - 1 / scale))
    top, bottom = (min(max(y * scale, 0), size[1] - 1) for y in (ys[0], ys[1] - 1 / scale))
    right, bottom = max(left, right), max(top, bottom)
    draw.rectangle((left, top, right, bottom), outline=color_of(number), width=max(2, max(size) // 400))
    corner = draw.textbbox((0, 0), str(number), font)
    w, h = corner[2] + 6, corner[3] + 4
    x, y = min(left, size[0] - w), top - h if top >= h else min(bottom, size[1] - h)
    draw.rectangle((x, y, x + w, y + h), fill=color_of(number))
    draw.text((x + 3, y + 2), str(number), PAPER, font)


def _wrapped(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """All of the text in lines that fit; a word that is wider than a line is cut into several."""
    lines = [""]
    for word in text.split():
        if lines[-1] and draw.textlength(f"{lines[-1]} {word}", font) > width:
            lines.append("")
        for letter in f" {word}" if lines[-1] else word:
            if lines[-1] and draw.textlength(lines[-1] + letter, font) > width:
                lines.append("")
            lines[-1] += letter
    return lines
