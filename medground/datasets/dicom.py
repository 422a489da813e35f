"""DICOM: one grey frame -> 8 bits as a viewer shows it. Needs pydicom, which is imported at the first such file."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medground.datasets.grey import as_grey

NEEDS = "pydicom"


def dicom_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header.

    Raises:
        ValueError: several frames, no image, or one too large.
    """
    header = _header(path)
    return int(header.Columns), int(header.Rows)


def read_dicom(path: Path) -> Image.Image:
    """The frame as RGB: rescaled, by its VOI LUT or window, MONOCHROME1 inverted.

    Raises:
        ValueError: as `dicom_size`, or it is not grey.
    """
    _header(path)
    import pydicom
    from pydicom.pixels import apply_modality_lut

    dataset = pydicom.dcmread(path)
    kind = str(dataset.get("PhotometricInterpretation", "nothing"))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"PhotometricInterpretation: want MONOCHROME1 or MONOCHROME2; got {kind}")
    image = as_grey(*_shown(dataset, apply_modality_lut(dataset.pixel_array, dataset)))
    return image.point(lambda value: 255 - value) if kind == "MONOCHROME1" else image


def _header(path: Path) -> Any:
    import pydicom

    names = ["Rows", "Columns", "NumberOfFrames"]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=names)
    if int(getattr(header, "NumberOfFrames", None) or 1) != 1:
        raise ValueError(f"NumberOfFrames: want one frame; got {header.NumberOfFrames}")
    if "Rows" not in header or "Columns" not in header:
        raise ValueError("want an image; got a DICOM file without rows and columns")
    pixels, limit = int(header.Rows) * int(header.Columns), Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise ValueError(f"want at most {limit} pixels; got {pixels}")
    return header


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
