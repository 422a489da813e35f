"""Reading films: every depth and form gives the same picture, and a file that is none is named."""

import io

import numpy as np
import pytest
from PIL import Image

from medground.datasets.images import image_size, read_image

RAMP = np.linspace(0, 1, 40 * 30).reshape(30, 40)  # dark to bright, 40 wide, 30 high
EIGHT_BITS = np.rint(RAMP * 255).astype(np.uint8)


def grey(path):
    image = read_image(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def write_dicom(path, pixels, **tags):
    """A DICOM file of `pixels` [rows, columns], uint16 or int16; tags replace the plain ones."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    plain = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelData": pixels.tobytes(),
    }
    for name, value in (plain | tags).items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_png_of_8_bits(tmp_path, mode):
    Image.fromarray(EIGHT_BITS).convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(grey(tmp_path / "a.png"), EIGHT_BITS)
    assert image_size(tmp_path / "a.png") == (40, 30)


def test_jpeg(tmp_path):
    Image.fromarray(EIGHT_BITS).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(grey(tmp_path / "a.jpg") - EIGHT_BITS).max() <= 3
    assert image_size(tmp_path / "a.jpg") == (40, 30)


@pytest.mark.parametrize("black, white", [(0, 65535), (0, 4095), (0, 900), (31000, 33000)])
def test_png_of_16_bits_keeps_its_contrast(tmp_path, black, white):
    pixels = np.rint(black + RAMP * (white - black)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(grey(tmp_path / "a.png") - EIGHT_BITS).max() <= 1


def test_a_flat_film_is_black(tmp_path):
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "a.png")
    assert not grey(tmp_path / "a.png").any()


def test_dicom_without_a_window(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.rint(300 + RAMP * 3000).astype(np.uint16))
    assert np.abs(grey(path) - EIGHT_BITS).max() <= 1
    assert image_size(path) == (40, 30)


def test_dicom_needs_no_suffix(tmp_path):
    path = write_dicom(tmp_path / "IM0001", np.rint(RAMP * 3000).astype(np.uint16))
    assert np.abs(grey(path) - EIGHT_BITS).max() <= 1


def test_the_window_of_a_dicom_file_counts_not_its_extremes(tmp_path):
    pixels = np.rint(1000 + RAMP * 1000).astype(np.uint16)
    # black at 1000, white at 3000: the film's brightest pixel is a mid grey
    path = write_dicom(tmp_path / "a.dcm", pixels, WindowCenter=2000.5, WindowWidth=2001)
    assert np.abs(grey(path) - EIGHT_BITS / 2).max() <= 1
    # black at 1500, white at 2000: the darker half is cut
    path = write_dicom(tmp_path / "b.dcm", pixels, WindowCenter=[1750.5, 1.0], WindowWidth=[501, 1.0])
    assert np.abs(grey(path) - np.clip(2 * RAMP - 1, 0, 1) * 255).max() <= 1


@pytest.mark.parametrize("slope, intercept", [(2.0, -1024.0), (0.5, 10.0), (-1.0, 4000.0)])
def test_rescaling_comes_before_the_window(tmp_path, slope, intercept):
    shown = 1000 + RAMP * 1000
    pixels = np.rint((shown - intercept) / slope).astype(np.uint16)
    window = {"WindowCenter": 1500.5, "WindowWidth": 1001, "RescaleSlope": slope, "RescaleIntercept": intercept}
    path = write_dicom(tmp_path / "a.dcm", pixels, **window)
    assert np.abs(grey(path) - EIGHT_BITS).max() <= 1


def test_signed_values(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.rint(RAMP * 2000 - 1000).astype(np.int16))
    assert np.abs(grey(path) - EIGHT_BITS).max() <= 1


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}])
def test_monochrome1_is_inverted(tmp_path, window):
    pixels = np.rint((1 - RAMP) * 4095).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="MONOCHROME1", **window)
    assert np.abs(grey(path) - EIGHT_BITS).max() <= 1


@pytest.mark.parametrize("bits", [8, 12])
def test_a_table_maps_the_values(tmp_path, bits):
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [1001, 500, bits]  # entries, the first value they stand for, bits of an entry
    table.LUTData = np.rint(np.linspace(0, 1, 1001) ** 2 * (2**bits - 1)).astype(np.uint16).tolist()
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    pixels = np.rint(500 + RAMP * 1000).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, VOILUTSequence=[table])
    assert np.abs(grey(path) - RAMP**2 * 255).max() <= 1


def truncated(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def noise_file(path, format):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path, format)
    return path


def animated(path):
    frames = [Image.fromarray(EIGHT_BITS), Image.fromarray(255 - EIGHT_BITS)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])
    return path


def deep_colour(path):
    # PIL writes no 16-bit colour: a small PNG by hand
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + np.arange(24, dtype=">u2").tobytes() for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def gif(path):
    Image.fromarray(EIGHT_BITS).save(path, "GIF")
    return path


PIXELS = np.rint(RAMP * 4000).astype(np.uint16)
BROKEN = {
    "missing": (lambda folder: folder / "none.png", "no such image file"),
    "folder": (lambda folder: folder, "cannot read"),
    "text": (lambda folder: (folder / "a.png").write_text("no image") and folder / "a.png", "want a PNG, JPEG or"),
    "empty": (lambda folder: (folder / "a.jpg").touch() or folder / "a.jpg", "want a PNG, JPEG or DICOM"),
    "gif": (lambda folder: gif(folder / "a.gif"), "want a PNG, JPEG or DICOM"),
    "cut png": (lambda folder: truncated(noise_file(folder / "a.png", "PNG")), "cannot read"),
    "cut jpeg": (lambda folder: truncated(noise_file(folder / "a.jpg", "JPEG")), "truncated"),
    "cut dicom": (lambda folder: truncated(write_dicom(folder / "a.dcm", PIXELS)), "cannot read"),
    "text as dicom": (lambda folder: (folder / "a.dcm").write_text("no film") and folder / "a.dcm", "cannot read"),
    "frames": (lambda folder: animated(folder / "a.png"), "want one frame; got 2"),
    "dicom frames": (
        lambda folder: write_dicom(folder / "a.dcm", np.stack([PIXELS, PIXELS]), NumberOfFrames=2),
        "want one frame; got 2",
    ),
    "colour dicom": (
        lambda folder: write_dicom(folder / "a.dcm", PIXELS, PhotometricInterpretation="PALETTE COLOR"),
        "want MONOCHROME1 or MONOCHROME2; got PALETTE COLOR",
    ),
    "deep colour": (lambda folder: deep_colour(folder / "a.png"), "got 16-bit RGB"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_named(tmp_path, case):
    make, message = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("case", ["missing", "text", "gif", "text as dicom", "frames", "dicom frames"])
def test_a_header_that_cannot_be_read_is_named(tmp_path, case):
    make, message = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        image_size(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_size_needs_the_header_only(tmp_path):
    assert image_size(truncated(noise_file(tmp_path / "a.png", "PNG"), 0.1)) == (64, 64)
    assert image_size(truncated(write_dicom(tmp_path / "a.dcm", PIXELS))) == (40, 30)


@pytest.mark.parametrize("limit", [700, 300])  # PIL warns between its limit and twice that, and fails beyond
def test_images_too_large_to_be_films_are_refused(tmp_path, monkeypatch, limit):
    noise_file(tmp_path / "a.png", "PNG")
    write_dicom(tmp_path / "a.dcm", PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for name in ("a.png", "a.dcm"):
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match=rf"{name}: .*pixels"):
                read(tmp_path / name)


def test_dicom_without_pydicom(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a.dcm", PIXELS)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"a\.dcm: want pydicom .* pip install pydicom"):
        read_image(tmp_path / "a.dcm")


def test_boxes_stay_where_the_file_has_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    Image.fromarray(EIGHT_BITS).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == image_size(tmp_path / "a.jpg") == (40, 30)


def test_the_file_is_closed(tmp_path, recwarn):
    Image.fromarray(EIGHT_BITS).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    image.save(io.BytesIO(), "PNG")
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
