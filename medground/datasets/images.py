"""Read an image from its file, the same for training, evaluation and prediction: 8-bit RGB out.

PNG and JPEG here, DICOM in `dicom.py`, slices of NIfTI volumes in `volumes.py`. Images of more than 8 bits are mapped
to 8 by a window, the file's own where it names one and else from the darkest to the brightest pixel; their low bits
are never just cut. Pixels stay where the file has them (an EXIF orientation is not applied), since boxes are in pixels
of the file; only volumes have a fixed orientation.
"""

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
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


def picture_of(image: Image.Image | NDArray[Any]) -> Image.Image:
    """What `read_image` makes of a file, of an image in memory.

    Args:
        image: PIL image; or [height, width], 8 bits or numbers of any range, which are mapped from the darkest to the
            brightest; or [height, width, 3], 8 bits.

    Returns:
        PIL image of mode RGB.

    Raises:
        ValueError: of another shape or dtype, empty, or with numbers that are not finite.
    """
    if isinstance(image, Image.Image) and 0 not in image.size:
        pixels = np.asarray(image) if image.mode in _WIDE_MODES else None
    elif isinstance(image, np.ndarray) and image.size and image.dtype.kind in "uif":
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            return Image.fromarray(image).convert("RGB")
        pixels = image
    else:
        raise ValueError(f"image: want a PIL image or an array of numbers; got {_described(image)}")
    if pixels is None:
        return image.convert("RGB")  # type: ignore[union-attr]  # which only a PIL image comes to
    if pixels.ndim != 2:
        raise ValueError(f"image: want [height, width], or [height, width, 3] of 8 bits; got {_described(image)}")
    pixels = pixels.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("image: want finite numbers; got NaN or infinity")
    return as_grey(pixels, float(pixels.min()), float(pixels.max()))


def _described(image: Any) -> str:
    if isinstance(image, np.ndarray):
        return f"{image.dtype} [{', '.join(map(str, image.shape))}]"
    size = f" {image.width} x {image.height}" if isinstance(image, Image.Image) else ""
    return type(image).__name__ + size


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
        return picture_of(image)
