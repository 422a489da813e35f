"""A contact sheet: films of a data set in rows, their boxes in colour, their phrases underneath."""

import textwrap
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
    films = [(image, list(some)) for image, some in groupby(load_records(folder), lambda example: example.image)]
    films = films[first : first + columns * rows]
    if not films:
        raise ValueError(f"{folder}: want more than {first} films; got fewer")
    font = ImageFont.load_default(size=10)
    wide = max(8, int(side / font.getlength("a usual phrase") * len("a usual phrase")))
    texts = [[line for example in some for line in _lines(example, wide)] for _, some in films]
    step_x, step_y = side + _GAP, side + _GAP + _LINE * max(len(text) for text in texts)
    sheet = Image.new("RGB", (columns * step_x + _GAP, -(-len(films) // columns) * step_y + _GAP), _GROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (image, some) in enumerate(films):
        x, y = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        film = read_image(Path(folder) / image)
        scale = side / max(film.size)
        size = round(film.width * scale), round(film.height * scale)
        sheet.paste(film.resize(size, Image.Resampling.BICUBIC), (x, y))
        below = y + side + 1
        for colour, example in zip(COLOURS * len(some), some, strict=False):
            for x1, y1, x2, y2 in example.boxes:
                corners = x + x1 * scale, y + y1 * scale, x + x2 * scale - 1, y + y2 * scale - 1
                draw.rectangle(corners, outline=colour)
            for line in _lines(example, wide):
                draw.text((x + 2, below), line, fill=colour, font=font)
                below += _LINE
    sheet.quantize(palette=_palette(), dither=Image.Dither.NONE).save(path, optimize=True)


def _palette() -> Image.Image:
    # the colours and few greys: films are noise to a PNG, and 256 greys would triple the file
    colours = [value for colour in (_GROUND, *COLOURS) for value in ImageColor.getrgb(colour)]
    greys = [value for step in range(_GREYS) for value in [round(255 * step / (_GREYS - 1))] * 3]
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours + greys)
    return palette


def _lines(example: Example, wide: int) -> list[str]:
    return textwrap.wrap(example.phrase + ("" if example.boxes else " (absent)"), wide)
