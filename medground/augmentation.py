"""Changes of a training image under which its phrase and boxes stay true: mirrored, moved, scaled, other contrast.

All is an exact function of (seed, position in the training order). The image keeps its size. Boxes follow, and are
always whole: a shift or a scale goes only as far as leaves every box inside the image.

A mirrored image swaps `left` and `right` in the phrase, whichever convention the phrase has, the patient's sides or the
image's. A phrase that speaks of what a body has on one side only, or of sides in a form that is not sure to be
understood (RUL, LV, "L lung", other languages), is never mirrored. The film itself then has its heart on the other
side: mirroring is for findings of lungs and bones.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from medground.config import AugmentConfig
from medground.records import Box, Example

_SIDE = re.compile(r"\b(left|right)(?=(?:wards?)?\b)", re.IGNORECASE)
_ONE_SIDED = re.compile(
    r"""situs | dextr | sinist | levo | laevo | invers | mirror | heart | cardi | aort | atri(?:al|um|a)\b | ventric
    | mitral | tricuspid | valv | vena\b | cava | azyg | mediastin | thymus | esophag | oesophag
    | lingula | middle\s+lobe | fissure | chilaid | thoracic\s+duct
    | liver | hepat | biliar | gall | portal | spleen | splen | stomach | gastr | pancrea | duoden | append
    | ca?ecum | caecal | cecal | ileo | colon | sigmoid | rectosig | bowel | abdom | diaphragm
    | clockwise | o'clock | marker | label
    | recht | links | droit | gauche | izquierd | derech | destr[ao] | esquerd | direit""",
    re.IGNORECASE | re.VERBOSE,
)
_SHORT = re.compile(r"\b(?:[A-Z]{2,}s?|[LRlr])\b")  # RUL, SVC, ETT, "R lung"; a phrase all in capitals, too
_HALF_WORD = re.compile(r"left|right", re.IGNORECASE)


def swap_sides(phrase: str) -> str | None:
    """The phrase of the mirrored image; None where it is not sure to be true."""
    if not phrase.isascii() or _ONE_SIDED.search(phrase) or _SHORT.search(phrase):
        return None
    if len(_SIDE.findall(phrase)) != len(_HALF_WORD.findall(phrase)):  # "upright", "leftover"
        return None
    return _SIDE.sub(lambda found: _other(found[1]), phrase)


def mirrored(example: Example, image: Image.Image, phrase: str) -> tuple[Example, Image.Image]:
    """The film in a mirror, with the phrase that speaks of it there; boxes in pixels of the image that comes back."""
    boxes = tuple(mirror_box(box, image.width) for box in example.boxes)
    return replace(example, phrase=phrase, boxes=boxes), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def mirror_box(box: Box, width: int) -> Box:
    """A box on an image `width` pixels wide, in the mirror; and back again."""
    x1, y1, x2, y2 = box
    return width - x2, y1, width - x1, y2


def never_mirrored(examples: Sequence[Example]) -> int:
    """How many records have a phrase that is left as it is."""
    return sum(swap_sides(example.phrase) is None for example in examples)


def augment(
    example: Example, image: Image.Image, options: AugmentConfig, seed: int, position: int
) -> tuple[Example, Image.Image]:
    """The example and its image, changed as `options` allow.

    Args:
        example: a record; its boxes are in pixels of `image`.
        image: RGB.
        options: how far each change may go.
        seed: of the run.
        position: in the training order.

    Returns:
        An example of the same id, its phrase and boxes true of the image that comes with it, of the same size.
    """
    # drawn in any case, so that one option does not change what another one does
    flip, scale, dx, dy, contrast, brightness = np.random.default_rng([seed, position, 11]).uniform(-1, 1, 6).tolist()
    swapped = swap_sides(example.phrase)
    if (flip + 1) / 2 < options.flip and swapped is not None:
        example, image = mirrored(example, image, swapped)
    if options.scale or options.shift:
        shift = options.shift * dx * image.width, options.shift * dy * image.height
        example, image = _moved(example, image, 1 + options.scale * scale, shift)
    if options.intensity:
        grey = (np.arange(256) - 127.5) * (1 + options.intensity * contrast) + 127.5 * (
            1 + options.intensity * brightness
        )
        image = image.point(np.clip(np.rint(grey), 0, 255).astype(np.uint8).tolist() * 3)
    return example, image


def _other(side: str) -> str:
    other = "right" if side.lower() == "left" else "left"
    return other.capitalize() if side[0].isupper() else other


def _moved(
    example: Example, image: Image.Image, scale: float, shift: tuple[float, float]
) -> tuple[Example, Image.Image]:
    """Scaled about its middle and shifted; black where there was no image."""
    size = image.size
    if example.boxes:
        x1, y1 = (min(box[i] for box in example.boxes) for i in (0, 1))
        x2, y2 = (max(box[i] for box in example.boxes) for i in (2, 3))
        scale = min(scale, size[0] / (x2 - x1), size[1] / (y2 - y1))
    else:
        x1, y1, x2, y2 = size[0] / 2, size[1] / 2, size[0] / 2, size[1] / 2
    offsets = []
    for low, high, side, by in zip((x1, y1), (x2, y2), size, shift, strict=True):
        middle = side / 2 * (1 - scale)
        nearest = -scale * low
        offsets.append(min(max(middle + by, nearest), max(side - scale * high, nearest)))
    (ox, oy), back = offsets, 1 / scale
    # from each pixel of the new image to its place in the old one
    moved = image.transform(
        size, Image.Transform.AFFINE, (back, 0, -ox * back, 0, back, -oy * back), Image.Resampling.BILINEAR
    )
    boxes = tuple(
        _inside((scale * a + ox, scale * b + oy, scale * c + ox, scale * d + oy), size) for a, b, c, d in example.boxes
    )
    return replace(example, boxes=tuple(_inside(box, size) for box in boxes)), moved


def _inside(box: Box, size: tuple[int, int]) -> Box:
    """Without what rounding puts outside."""
    x1, y1, x2, y2 = box
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
