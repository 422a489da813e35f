"""Read an image from its file, the same for training, evaluation and prediction: 8-bit RGB out.

PNG and JPEG here, DICOM in `dicom.py`, slices of NIfTI volumes in `volumes.py`. Images of more than 8 bits are mapped
to 8 by a window, the file's own where it names one and else from the darkest to the brightest pixel; their low bits
are never just cut. Pixels stay where the file has them (an EXIF orientation is not applied), since boxes are in pixels
of the file; only volumes have a fixed orientation.
"""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from medground.datasets import dicom, volumes
from medground.datasets.grey import as_grey

_FORMATS = ("PNG", "JPEG")
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def read_image(path: str | Path, slice_index: int | None = None, window: volumes.Window = "auto") -> Image.Image:
    """The picture in a file.

    Args:
        path: PNG or JPEG of 8 bits, grey or colour; grey PNG of 16 bits; DICOM of one grey frame; NIfTI volume.
        slice_index: of a volume, lowest first; None for files of one picture.
        window: of a volume: Hounsfield units that are black and white; `auto` for percentiles of the volume.

    Returns:
        PIL image of mode RGB, as wide and high as `image_size` says; bright is dense, MONOCHROME1 inverted.

    Raises:
        ValueError: no such file, not such an image, truncated, too large, or of several frames; names the file.
    """
    path = Path(path)
    try:
        if volumes.is_volume(path):
            return volumes.read_slice(path, slice_index, window)
        if slice_index is not None:
            raise ValueError(f"slice: want none, since it is no volume; got {slice_index}")
        with path.open("rb") as file:
            if not _is_dicom(path, file):
                return _read_picture(file)
        return dicom.read_dicom(path)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise _named(path, error) from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file in pixels, from its header alone; of a volume, those of a slice.

    Raises:
        ValueError: as `read_image`, except for damage that only its pixels show.
    """
    try:
        if volumes.is_volume(path):
            return volumes.volume_size(Path(path))
        with open(path, "rb") as file:  # once, and no Path: a data set of 100,000 images asks this of each
            if not _is_dicom(path, file):
                with _open(file) as image:
                    return image.size
        return dicom.dicom_size(Path(path))
    except Exception as error:
        raise _named(Path(path), error) from error


def read_whole_volume(path: str | Path) -> volumes.Volume:
    """All slices of a volume at once, for who needs many.

    Raises:
        ValueError: as `read_image`; names the file.
    """
    try:
        return volumes.read_volume(Path(path))
    except Exception as error:
        raise _named(Path(path), error) from error


def _named(path: Path, error: Exception) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path}: no such image file")
    if isinstance(error, ModuleNotFoundError) and error.name in (dicom.NEEDS, volumes.NEEDS):
        kind = "DICOM" if error.name == dicom.NEEDS else "NIfTI"
        return ValueError(f"{path}: want {error.name} to read {kind}: pip install {error.name}")
    if isinstance(error, Image.UnidentifiedImageError):
        return ValueError(f"{path}: want a PNG, JPEG or DICOM image; got something else")
    return ValueError(f"{path}: cannot read the image: {error or type(error).__name__}")


def _is_dicom(path: str | Path, file: BinaryIO) -> bool:
    head = file.read(132)
    file.seek(0)
    return head[128:] == b"DICM" or str(path).lower().endswith((".dcm", ".dicom"))


def _open(file: BinaryIO) -> Image.Image:
    with warnings.catch_warnings():  # the lower of PIL's two limits, which only warns, is a limit here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=_FORMATS)
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        image.close()
        raise ValueError(f"want one frame; got {frames}")
    return image


def _read_picture(file: BinaryIO) -> Image.Image:
    with _open(file) as image:
        raw = str(getattr(image, "tile", ""))  # names the form of the pixels in the file
        if image.mode not in _WIDE_MODES and ";16" in raw:  # PIL would cut these to their high bytes
            raise ValueError(f"want 8 bits a channel, or 16 bits and grey; got 16-bit {image.mode}")
        image.load()
        if image.mode in _WIDE_MODES:
            pixels = np.asarray(image).astype(np.float64)
            return as_grey(pixels, float(pixels.min()), float(pixels.max()))
        return image.convert("RGB")
