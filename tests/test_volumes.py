"""Volumes: in whatever order a file has its voxels, a slice shows the patient's left on the right, the front on top."""

import itertools

import numpy as np
import pytest

from medground.datasets import volumes
from medground.datasets.images import image_size, read_image
from medground.datasets.volumes import read_volume

nib = pytest.importorskip("nibabel")

# [left, back, up]: a body of -800, a bright block in the left front, a dim one at the back, at the right, higher up
WORLD = np.full((30, 20, 6), -800, np.int16)
WORLD[20:26, 3:7, 1] = 1000
WORLD[4:8, 14:18, 4] = 40
SPACING = (1.0, 1.5, 5.0)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # nibabel's space is RAS


def write(path, order=(0, 1, 2), flips=(1, 1, 1), spacing=SPACING, values=WORLD, slope=None, intercept=None):
    """WORLD in a file whose voxel axes are `order` of the fixed ones, each forward or backward."""
    affine = LPS @ np.diag([*spacing, 1.0])
    oriented = nib.Nifti1Image(values, affine)
    letters = [("R", "L"), ("A", "P"), ("I", "S")]
    codes = [letters[axis][flip > 0] for axis, flip in zip(order, flips, strict=True)]
    wanted = nib.orientations.axcodes2ornt(codes)
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), wanted)
    image = oriented.as_reoriented(turn)
    assert nib.aff2axcodes(image.affine) == tuple(codes)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    nib.save(image, path)
    return path


def grey(image):
    return np.asarray(image)[..., 0].astype(int)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_voxels_shows_the_same_slice(tmp_path, order):
    wanted = read_image(write(tmp_path / "plain.nii"), 1, "bone")
    for flips in itertools.product((1, -1), repeat=3):
        path = write(tmp_path / "a.nii.gz", order, flips)
        volume = read_volume(path)
        assert np.array_equal(volume.raw, WORLD) and volume.spacing == pytest.approx(SPACING)
        assert image_size(path) == (30, 30)
        assert np.array_equal(grey(read_image(path, 1, "bone")), grey(wanted))
        # the voxel's place in the scanner's space does not depend on the order either
        assert np.allclose(volume.affine @ [7, 5, 2, 1], LPS @ np.diag([*SPACING, 1.0]) @ [7, 5, 2, 1], atol=1e-4)


def test_left_is_on_the_right_front_on_top_and_pixels_are_square(tmp_path):
    path = write(tmp_path / "a.nii", (2, 0, 1), (-1, 1, -1))
    shown = grey(read_image(path, 1, "bone"))
    assert shown.shape == (30, 30)  # 20 rows of 1.5 mm beside 30 columns of 1 mm
    rows, columns = np.nonzero(shown > 120)
    assert (columns.min(), columns.max()) == (20, 25)
    assert abs(rows.min() - 3 * 1.5) <= 1 and abs(rows.max() + 1 - 7 * 1.5) <= 1
    rows, columns = np.nonzero(grey(read_image(path, 4, "soft-tissue")) > 60)
    assert columns.max() < 15 and rows.min() > 15


@pytest.mark.parametrize("window, low, high", [("lung", -1350, 150), ("soft-tissue", -160, 240), ("bone", -500, 1300)])
def test_a_window_is_in_hounsfield_units(tmp_path, window, low, high):
    ramp = np.linspace(-1500, 1500, 30 * 20).reshape(30, 20, 1)
    stored = np.rint((ramp + 1024) * 2).astype(np.int16)
    path = write(tmp_path / "a.nii.gz", values=stored, spacing=(1, 1, 1), slope=0.5, intercept=-1024)
    wanted = np.clip((ramp[..., 0].T - low) * 255 / (high - low), 0, 255)
    assert np.abs(grey(read_image(path, None, window)) - wanted).max() <= 1


def test_the_automatic_window_is_that_of_the_volume(tmp_path):
    path = write(tmp_path / "a.nii", spacing=(1, 1, 1))
    low, high = np.percentile(WORLD, [0.5, 99.5])
    wanted = np.clip((WORLD[:, :, 4].T - low) * 255 / (high - low), 0, 255)
    assert read_volume(path).limits("auto") == (low, high)
    assert np.abs(grey(read_image(path, 4)) - wanted).max() <= 1


def test_floats_and_a_fourth_axis_of_one(tmp_path):
    nib.save(nib.Nifti1Image(WORLD[..., None].astype(np.float32), LPS), tmp_path / "a.nii")
    assert np.array_equal(read_volume(tmp_path / "a.nii").raw, WORLD)


def save(path, values, affine=LPS):
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def cut(path):
    data = write(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


FLOATS = WORLD.astype(np.float32)
BROKEN = {
    "four axes": (lambda f: save(f / "a.nii", np.zeros((4, 4, 4, 2), np.int16)), "dim: want three dimensions; got 4 x"),
    "two axes": (lambda f: save(f / "a.nii", np.zeros((4, 4), np.int16)), "dim: want three dimensions; got 4 x 4"),
    "NaN": (lambda f: save(f / "a.nii", np.where(FLOATS > 0, np.nan, FLOATS)), "voxels: want finite numbers"),
    "text": (lambda f: (f / "a.nii.gz").write_text("no volume") and f / "a.nii.gz", "a.nii.gz: cannot read"),
    "cut": (lambda f: cut(f / "a.nii.gz"), "a.nii.gz: cannot read"),
    "missing": (lambda f: f / "a.nii", "no such image file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_volume_that_cannot_be_read_is_named(tmp_path, case):
    make, message = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_image(path, 0)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("index", [None, -1, 6])
def test_a_slice_has_to_be_there(tmp_path, index):
    with pytest.raises(ValueError, match=rf"slice: want one from 0 to 5 \(lowest first\); got {index}"):
        read_image(write(tmp_path / "a.nii"), index)


def test_windows_and_slices_of_other_files(tmp_path):
    from PIL import Image

    with pytest.raises(ValueError, match="window: want one of lung, soft-tissue, bone, auto; got 'brain'"):
        read_image(write(tmp_path / "a.nii"), 0, "brain")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .*slice: want none, since it is no volume; got 0"):
        read_image(tmp_path / "a.png", 0)


def test_too_large_for_a_volume(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz")
    monkeypatch.setattr(volumes, "MAX_VOXELS", 3599)
    for read in (image_size, read_image):
        with pytest.raises(ValueError, match="dim: want at most 3599 voxels; got 30 x 20 x 6"):
            read(path)


def test_volumes_without_nibabel(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii")
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(ValueError, match=r"a\.nii: want nibabel to read NIfTI: pip install nibabel"):
        read_image(path, 0)
