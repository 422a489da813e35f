"""Read a film from its file: PNG, JPEG or DICOM in, an 8-bit RGB image out.

Films of more than 8 bits are mapped to 8 by a window, the file's own where it names one and else from
the darkest to the brightest pixel; their low bits are never just cut. Pixels stay where the file has them
(an EXIF orientation is not applied), since boxes are in pixels of the file.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FORMATS = ("PNG", "JPEG")
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file.

    Args:
        path: PNG or JPEG of 8 bits, grey or colour; grey PNG of 16 bits; DICOM of one grey frame.

    Returns:
        PIL image of mode RGB, as wide and high as the file says; bright is dense, MONOCHROME1 inverted.

    Raises:
        ValueError: no such file, not such an image, truncated, too large, or of several frames; names the file.
    """
    path = Path(path)
    try:
        return _read_dicom(path) if _is_dicom(path) else _read_picture(path)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise _named(path, error) from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file in pixels, from its header alone.

    Raises:
        ValueError: as `read_image`, except for damage that only its pixels show.
    """
    path = Path(path)
    try:
        if _is_dicom(path):
            header = _dicom_header(path)
            return int(header.Columns), int(header.Rows)
        with _open(path) as image:
            return image.size
    except Exception as error:
        raise _named(path, error) from error


def _named(path: Path, error: Exception) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path}: no such image file")
    if isinstance(error, ModuleNotFoundError):
        return ValueError(f"{path}: want pydicom to read DICOM: pip install pydicom")
    if isinstance(error, Image.UnidentifiedImageError):
        return ValueError(f"{path}: want a PNG, JPEG or DICOM image; got something else")
    return ValueError(f"{path}: cannot read the image: {error or type(error).__name__}")


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def _open(path: Path) -> Image.Image:
    with warnings.catch_warnings():  # the lower of PIL's two limits, which only warns, is a limit here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=_FORMATS)
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        image.close()
        raise ValueError(f"want one frame; got {frames}")
    return image


def _read_picture(path: Path) -> Image.Image:
    with _open(path) as image:
        raw = str(getattr(image, "tile", ""))  # names the form of the pixels in the file
        if image.mode not in _WIDE_MODES and ";16" in raw:  # PIL would cut these to their high bytes
            raise ValueError(f"want 8 bits a channel, or 16 bits and grey; got 16-bit {image.mode}")
        image.load()
        if image.mode in _WIDE_MODES:
            pixels = np.asarray(image).astype(np.float64)
            return _grey(pixels, float(pixels.min()), float(pixels.max()))
        return image.convert("RGB")


def _grey(pixels: NDArray[np.float64], low: float, high: float) -> Image.Image:
    # a flat image has no window: black; high < low comes from a negative rescale slope
    scaled = np.clip((pixels - low) * (255 / (high - low)), 0, 255) if high != low else np.zeros_like(pixels)
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _dicom_header(path: Path) -> Any:
    import pydicom

    names = ["Rows", "Columns", "NumberOfFrames"]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=names)
    if int(getattr(header, "NumberOfFrames", None) or 1) != 1:
        raise ValueError(f"want one frame; got {header.NumberOfFrames}")
    if "Rows" not in header or "Columns" not in header:
        raise ValueError("want an image; got a DICOM file without rows and columns")
    pixels, limit = int(header.Rows) * int(header.Columns), Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ValueError(f"want at most {limit} pixels; got {pixels}")
    return header


def _read_dicom(path: Path) -> Image.Image:
    _dicom_header(path)
    import pydicom
    from pydicom.pixels import apply_modality_lut

    dataset = pydicom.dcmread(path)
    kind = str(dataset.get("PhotometricInterpretation", "nothing"))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"want MONOCHROME1 or MONOCHROME2; got {kind}")
    image = _grey(*_shown(dataset, apply_modality_lut(dataset.pixel_array, dataset)))
    return image.point(lambda value: 255 - value) if kind == "MONOCHROME1" else image


def _shown(dataset: Any, pixels: NDArray[Any]) -> tuple[NDArray[np.float64], float, float]:
    # the film as a viewer shows it, and what black and white are there: not its own extremes, which may lie
    # well inside the window
    from pydicom.pixels import apply_voi_lut, apply_windowing

    if tables := dataset.get("VOILUTSequence"):
        # not pydicom's: it wraps the pixel values at 256 where the table's entries have 8 bits
        entries, first, bits = (int(value) for value in tables[0].LUTDescriptor)
        data = tables[0].LUTData
        table = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(data)
        at = np.clip(pixels.astype(np.int64) - first, 0, (entries or 65536) - 1)
        return table[at].astype(np.float64), 0.0, float(2**bits - 1)
    shown = apply_voi_lut(pixels, dataset).astype(np.float64)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        black, white = apply_windowing(np.array([-1e9, 1e9]), dataset)
        return shown, float(black), float(white)
    return shown, float(shown.min()), float(shown.max())
