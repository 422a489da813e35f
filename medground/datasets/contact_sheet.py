"""A contact sheet: films of a data set in rows, their boxes in colour, their phrases underneath."""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.records import Example

COLOURS = ("#ffb000", "#40c4ff", "#ff5fa2", "#7ddc5a")  # of a film's first phrase, its second, ...
_GROUND = "#101418"
_GREYS = 24
_GAP, _LINE = 6, 13  # pixels between films, and of a line of text


def contact_sheet(
    folder: str | Path, path: str | Path, columns: int = 6, rows: int = 4, side: int = 224, first: int = 0
) -> None:
    """Draw films of a data set with their boxes and phrases.

    Args:
        folder: of the data set.
        path: of the PNG to write.
        columns: films in a row.
        rows: rows of films.
        side: longest side of a film on the sheet, in pixels.
        first: number of the first film, counted from 0 in the order of the records.

    Raises:
        ValueError: as `load_records` and `read_image`, or the data set has too few films.
    """
    films = films_of(load_records(folder))[first : first + columns * rows]
    if not films:
        raise ValueError(f"{folder}: want more than {first} films; got fewer")
    draw_sheet(folder, films, columns, side).save(path, optimize=True)


def films_of(examples: Iterable[Example]) -> list[list[Example]]:
    """Records that follow one another on one image, image by image."""
    return [list(some) for _, some in groupby(examples, lambda example: example.image)]


def draw_sheet(
    folder: str | Path, films: Sequence[Sequence[Example]], columns: int = 6, side: int = 224
) -> Image.Image:
    """Draw these films, each one image's records, as a picture of few colours.

    Raises:
        ValueError: as `read_image`.
    """
    font = ImageFont.load_default(size=10)
    wide = max(8, int(side / font.getlength("a usual phrase") * len("a usual phrase")))
    texts = [[line for example in some for line in _lines(example, wide)] for some in films]
    step_x, step_y = side + _GAP, side + _GAP + _LINE * max(len(text) for text in texts)
    sheet = Image.new("RGB", (columns * step_x + _GAP, -(-len(films) // columns) * step_y + _GAP), _GROUND)
    draw = ImageDraw.Draw(sheet)
    for number, some in enumerate(films):
        x, y = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        film = read_image(Path(folder) / some[0].image)
        scale = side / max(film.size)
        size = max(1, round(film.width * scale)), max(1, round(film.height * scale))
        sheet.paste(film.resize(size, Image.Resampling.BICUBIC), (x, y))
        below = y + side + 1
        for colour, example in zip(COLOURS * len(some), some, strict=False):
            for x1, y1, x2, y2 in example.boxes:
                # of a box of less than a pixel on the sheet, the one pixel
                left, top = x + x1 * scale, y + y1 * scale
                corners = left, top, max(left, x + x2 * scale - 1), max(top, y + y2 * scale - 1)
                draw.rectangle(corners, outline=colour)
            for line in _lines(example, wide):
                draw.text((x + 2, below), line, fill=colour, font=font)
                below += _LINE
    return sheet.quantize(palette=_palette(), dither=Image.Dither.NONE)


def _palette() -> Image.Image:
    # the colours and few greys: films are noise to a PNG, and 256 greys would triple the file
    colours = [value for colour in (_GROUND, *COLOURS) for value in ImageColor.getrgb(colour)]
    greys = [value for step in range(_GREYS) for value in [round(255 * step / (_GREYS - 1))] * 3]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours + greys)
    return palette


def _lines(example: Example, wide: int) -> list[str]:
    return textwrap.wrap(example.phrase + ("" if example.boxes else " (absent)"), wide)
