"""Numbers of any range -> a grey image of 8 bits, by the values of black and white."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def as_grey(pixels: NDArray[np.float64], black: float, white: float) -> Image.Image:
    """Pixels [height, width] -> RGB image, 0 at `black` and 255 at `white`; what lies beyond is cut.

    An image without a range (black == white) is black; white < black inverts, which a negative rescale slope asks for.
    """
    span = white - black
    scaled = np.clip((pixels - black) * (255 / span), 0, 255) if span else np.zeros_like(pixels, dtype=np.float64)
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
