"""Write a phantom film as a DICOM file: 12 bits in 16, a window, MONOCHROME1 for every other film or so."""

import importlib.util
from pathlib import Path
from zlib import crc32

import numpy as np

from medground.datasets.phantom_film import Pixels
from medground.records import Example

_BLACK, _WHITE = 200, 3800  # stored values of 0 and 1: inside the 12 bits, so that only the window finds them


def require_pydicom() -> None:
    """Raises ValueError when pydicom is not installed."""
    if importlib.util.find_spec("pydicom") is None:
        raise ValueError("dicom: want pydicom to write DICOM files; got none: pip install pydicom")


def write_dicom(pixels: Pixels, path: Path, seed: int, example: Example) -> None:
    """Write a film as computed radiography.

    Args:
        pixels: [size, size], 0 to 1, bright where dense.
        path: of the file.
        seed: of the data set; with the example it fixes the identifiers, so that equal films are equal files.
        example: whose patient and study the file names.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["film", example.study])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study", example.study])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["series", example.study])
    dataset.PatientID, dataset.PatientName = example.patient, f"Phantom^{example.patient}"
    dataset.StudyID, dataset.Modality, dataset.ViewPosition = example.study[-16:], "CR", "PA"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dark_is_high = crc32(f"{seed} {example.study}".encode()) % 2 == 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if dark_is_high else "MONOCHROME2"
    # the window's ends are _BLACK and _WHITE: PS3.3 C.11.2.1.2.1 takes half a unit off the centre, one off the width
    dataset.WindowCenter, dataset.WindowWidth = (_BLACK + _WHITE + 1) / 2, _WHITE - _BLACK + 1
    shown = 1 - pixels if dark_is_high else pixels
    dataset.PixelData = np.rint(_BLACK + shown * (_WHITE - _BLACK)).astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
