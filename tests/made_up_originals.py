"""Miniature trees of original data sets, in their layouts and headers; every row and pixel is made up."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

MS_CXR_HEADER = "dicom_id,subject_id,study_id,path,category_name,label_text,x,y,w,h,image_width,image_height"
NIH_BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
NIH_ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
M3D_HEADER = "Image,Mask,Mask_ID,Question_Type,Question,Answer"


def paint(path: Path, size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Path:
    """A dark film with bright rectangles, in the format that the name says."""
    pixels = np.full((size[1], size[0]), 20, np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 220
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 100} if path.suffix == ".jpg" else {"compress_level": 1}))
    return path


def edges(grey: np.ndarray) -> tuple[float, float, float, float]:
    """xyxy of the one bright rectangle on a dark ground, [height, width], to a fraction of a pixel."""
    grey = grey.astype(float)
    bright = grey > (grey.max() + grey.min()) / 2
    row, column = int(np.median(np.nonzero(bright)[0])), int(np.median(np.nonzero(bright)[1]))
    (x1, x2), (y1, y2) = _ends(grey[row]), _ends(grey[:, column])
    return x1, y1, x2, y2


def _ends(profile: np.ndarray) -> tuple[float, float]:
    """Where a line of pixels crosses half its height, up and down; pixel k reaches from k to k + 1."""
    values = np.concatenate([[profile.min()], profile, [profile.min()]]).astype(float)
    half = (values.max() + values.min()) / 2
    above = np.nonzero(values > half)[0]
    first, last = int(above[0]), int(above[-1])
    up = first - (values[first] - half) / (values[first] - values[first - 1])
    down = last + (values[last] - half) / (values[last] - values[last + 1])
    # values[k] stands at k - 0.5; an edge between two pixels is half a level in between
    return up - 0.5, down - 0.5


def ms_cxr_row(image: str, patient: int, phrase: str, category: str, box, size=(200, 240), split="") -> str:
    path = f"files/p{str(patient)[:2]}/p{patient}/s{patient + 40000000}/{image}.jpg"
    cells = [image, patient, patient + 40000000, path, category, f'"{phrase}"', *box, *size]
    return ",".join(map(str, cells)) + (f",{split}" if split else "")


def ms_cxr(root: Path, with_split: bool = True, size=(200, 240)) -> tuple[Path, Path]:
    """(CSV, folder of images): three patients, four images; a phrase of two boxes, its rows apart."""
    rows = [
        ("img-a", 10000001, "small left pleural effusion", "Pleural Effusion", (120, 150, 40, 50), "train"),
        ("img-a", 10000001, "opacities, both sides", "Lung Opacity", (20, 60, 30, 40), "train"),
        ("img-b", 10000001, "cardiomegaly", "Cardiomegaly", (70, 120, 80, 70), "train"),
        ("img-a", 10000001, "opacities, both sides", "Lung Opacity", (130, 60, 30, 40), "train"),
        ("img-c", 10000002, "right apical pneumothorax", "Pneumothorax", (30, 20, 40, 30), "val"),
        ("img-d", 10000003, "left basal atelectasis", "Atelectasis", (120, 180, 50, 30), "test"),
    ]
    lines = [
        ms_cxr_row(image, patient, phrase, category, box, size, split if with_split else "")
        for image, patient, phrase, category, box, split in rows
    ]
    root.mkdir(parents=True, exist_ok=True)
    version = "1.1.0" if with_split else "1.0.0"
    table = root / f"MS_CXR_Local_Alignment_v{version}.csv"
    header = MS_CXR_HEADER + (",split" if with_split else "")
    table.write_text("\n".join([header, *lines]) + "\n")
    images = root / "MIMIC-CXR-JPG"
    boxes: dict[str, list] = {}
    for line, (_, _, _, _, (x, y, w, h), _) in zip(lines, rows, strict=True):
        boxes.setdefault(line.split(",")[3], []).append((x, y, x + w, y + h))
    for path, some in boxes.items():
        paint(images / path, size, *some)
    return table, images


def nih(root: Path) -> tuple[Path, Path, Path]:
    """(box list, entries, folder of images): three films of two patients, one of them in an unpacked archive."""
    boxes = [
        ("00000007_000.png", "Infiltrate", 100.5, 200.25, 300.0, 150.5),
        ("00000007_001.png", "Effusion", 600, 700, 200, 100),
        ("00000007_001.png", "Effusion", 100, 700, 200, 100),
        ("00000007_001.png", "Mass", 400, 100, 80, 90),
        ("00000019_000.png", "Cardiomegaly", 350, 500, 400, 250),
    ]
    entries = [
        ("00000007_000.png", "Infiltration|Nodule", "7"),
        ("00000007_001.png", "Effusion", "7"),
        ("00000019_000.png", "Cardiomegaly", "19"),
        ("00000031_000.png", "No Finding", "31"),
    ]
    root.mkdir(parents=True, exist_ok=True)
    table = root / "BBox_List_2017.csv"
    table.write_text("\n".join([NIH_BOX_HEADER, *(",".join(map(str, row)) + ",,," for row in boxes)]) + "\n")
    entry_lines = [f"{image},{labels},0,{patient},50,M,PA,2500,2048,0.14,0.14," for image, labels, patient in entries]
    (root / "Data_Entry_2017.csv").write_text("\n".join([NIH_ENTRY_HEADER, *entry_lines]) + "\n")
    for image in ("00000007_000.png", "00000007_001.png"):
        paint(root / "images" / image, (1024, 1024))
    paint(root / "images/images_002/images/00000019_000.png", (1024, 1024))
    return table, root / "Data_Entry_2017.csv", root / "images"


def nifti(path: Path, values: np.ndarray, codes: str = "LPS", spacing=(1.0, 1.5, 5.0)) -> Path:
    """Write [left, back, up] values as a file whose voxel axes run as `codes` says."""
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(image.affine), wanted)
    nib.save(image.as_reoriented(turn), path)
    return path


def m3d(root: Path, codes: tuple[str, str] = ("RAS", "LPI")) -> tuple[list[Path], Path]:
    """(CSV files, folder of volumes): two anisotropic cases in two orientations, masks with two numbers each."""
    volumes = root / "M3D_RefSeg"
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for case, code, name in (("s0001", codes[0], "train"), ("s0002", codes[1], "test")):
        ct, mask = np.full((40, 30, 8), -800, np.int16), np.zeros((40, 30, 8), np.uint8)
        mask[24:34, 6:12, 2:4] = 1
        mask[24:36, 6:14, 3] = 1  # its largest slice
        mask[24:26, 6:8, 4] = 1  # less than a tenth of that
        mask[5:9, 20:25, 5] = 2
        mask[12:16, 20:25, 5] = 2  # a second part
        mask[30, 2, 5] = 2  # a speck
        ct[mask > 0] = 60 if case == "s0001" else 90
        nifti(volumes / case / "ct.nii.gz", ct, code)
        nifti(volumes / case / "mask.nii.gz", mask, code)
        texts = {"1": "Nodule in the left lung.", "2": "Two small lesions in the right lung."}
        (volumes / case / "text.json").write_text(json.dumps(texts))
        for mask_id in ("1", "2"):
            for kind in ("0", "1"):
                question = f"Where is finding {mask_id} of kind {kind}?"
                path = f"M3D_RefSeg/{case}"
                lines[name].append(f'{path}/ct.nii.gz,{path}/mask.nii.gz,{mask_id},{kind},"{question}","[SEG]."')
    tables = []
    for name, some in lines.items():
        tables.append(root / f"M3D_RefSeg_{name}.csv")
        tables[-1].write_text("\n".join([M3D_HEADER, *some]) + "\n")
    return tables, volumes


def rows_of(folder: Path, name: str = "records.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
