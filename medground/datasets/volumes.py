"""NIfTI volumes -> axial slices in one orientation, with square pixels, by a window of CT numbers.

Whatever order the file has its voxels in, a slice is shown as a frontal film is: the patient's left on the image's
right, the front on top; slice 0 is the lowest. Volumes whose axes are oblique take the nearest of the 48 orders.
Needs nibabel, which is imported at the first volume.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medground.datasets.grey import as_grey

NEEDS = "nibabel"
SUFFIXES = (".nii", ".nii.gz")
Window = Literal["lung", "soft-tissue", "bone", "auto"]
WINDOWS = {"lung": (-1350.0, 150.0), "soft-tissue": (-160.0, 240.0), "bone": (-500.0, 1300.0)}
"""Black and white in Hounsfield units: level -600 width 1500, 40 and 400, 400 and 1800, as CT viewers have them."""
AUTO_PERCENTILES = (0.5, 99.5)  # of the whole volume: those of M3D-RefSeg's own preparation
MAX_VOXELS = 2**30
_AXES = ("L", "P", "S")  # voxel indices grow towards the patient's left, back and head


@dataclass(frozen=True)
class Volume:
    """A volume in the fixed orientation.

    Attributes:
        raw: [left, back, up], voxels as stored.
        slope: values are raw * slope + intercept.
        intercept: see slope.
        spacing: mm between voxels along the three axes.
        affine: [4, 4], voxel indices -> mm in the scanner's space.
    """

    raw: NDArray[Any]
    slope: float
    intercept: float
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]

    @property
    def slice_size(self) -> tuple[int, int]:
        """(width, height) of a slice in square pixels."""
        return _square(self.raw.shape, self.spacing)

    def values(self, index: int) -> NDArray[np.float64]:
        """Slice `index` as values (CT: Hounsfield units), [rows, columns], from front to back; pixels not square."""
        return self.raw[:, :, index].T.astype(np.float64) * self.slope + self.intercept

    def limits(self, window: Window) -> tuple[float, float]:
        """The values that are black and white."""
        if window != "auto":
            return WINDOWS[window]
        low, high = np.percentile(self.raw, AUTO_PERCENTILES)
        return float(low) * self.slope + self.intercept, float(high) * self.slope + self.intercept

    def image(self, index: int, limits: tuple[float, float]) -> Image.Image:
        """Slice `index` as RGB, in square pixels."""
        shown = as_grey(self.values(index), *limits)
        return shown if shown.size == self.slice_size else shown.resize(self.slice_size, Image.Resampling.BICUBIC)


def is_volume(path: str | Path) -> bool:
    """Whether the name is a NIfTI file's."""
    return str(path).lower().endswith(SUFFIXES)


def read_volume(path: Path) -> Volume:
    """Read a whole volume.

    Raises:
        ValueError: not a NIfTI file of three dimensions, too large, without spacing, or with voxels that are no
            numbers.
    """
    nifti, order = _open(path)
    import nibabel as nib

    raw = np.asanyarray(nifti.dataobj.get_unscaled()).reshape(nifti.shape[:3])
    if raw.dtype.kind not in "iuf":
        raise ValueError(f"datatype: want whole numbers or floats; got {raw.dtype}")
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        raise ValueError("voxels: want finite numbers; got NaN or infinity")
    affine = nifti.affine @ nib.orientations.inv_ornt_aff(order, raw.shape)
    slope, intercept = nifti.dataobj.slope, nifti.dataobj.inter
    return Volume(
        nib.orientations.apply_orientation(raw, order), float(slope), float(intercept), _spacing(affine), affine
    )


def volume_size(path: Path) -> tuple[int, int]:
    """(width, height) of a slice in square pixels, from the header.

    Raises:
        ValueError: as `read_volume`.
    """
    nifti, order = _open(path)
    import nibabel as nib

    shape = nifti.shape[:3]
    turned = np.zeros(3, int)
    turned[order[:, 0].astype(int)] = shape
    return _square(tuple(turned), _spacing(nifti.affine @ nib.orientations.inv_ornt_aff(order, shape)))


def read_slice(path: Path, index: int | None, window: Window) -> Image.Image:
    """One slice of a volume as RGB, in square pixels.

    Raises:
        ValueError: as `read_volume`, or there is no such slice; `index` may be None for a volume of one.
    """
    if window not in (*WINDOWS, "auto"):
        raise ValueError(f"window: want one of {', '.join((*WINDOWS, 'auto'))}; got {window!r}")
    volume = read_volume(path)
    slices = volume.raw.shape[2]
    if index is None and slices == 1:
        index = 0
    if index is None or not 0 <= index < slices:
        raise ValueError(f"slice: want one from 0 to {slices - 1} (lowest first); got {index}")
    return volume.image(index, volume.limits(window))


def _open(path: Path) -> tuple[Any, NDArray[np.float64]]:
    import nibabel as nib

    nifti = nib.load(path)
    if not isinstance(nifti, nib.Nifti1Image):  # NIfTI-2 is a subclass
        raise ValueError(f"want a NIfTI file; got {type(nifti).__name__}")
    shape = tuple(int(n) for n in nifti.shape)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or min(shape) < 1:
        raise ValueError(f"dim: want three dimensions; got {' x '.join(map(str, shape))}")
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise ValueError(f"dim: want at most {MAX_VOXELS} voxels; got {' x '.join(map(str, shape))}")
    affine = nifti.affine
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError("affine: want three directions with a spacing each; got none")
    orientations = nib.orientations
    order = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(_AXES))
    return nifti, order


def _spacing(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(0)).tolist()
    return x, y, z


def _square(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> tuple[int, int]:
    side = min(spacing[:2])
    width, height = max(1, round(shape[0] * spacing[0] / side)), max(1, round(shape[1] * spacing[1] / side))
    if (limit := Image.MAX_IMAGE_PIXELS) is not None and width * height > limit:
        raise ValueError(f"pixdim: want at most {limit} square pixels a slice; got {width} x {height}")
    return width, height
