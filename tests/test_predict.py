"""Prediction: the evaluation's answers, whatever the film's format, in pixels of its file; mistakes are named."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import write_dicom

from medground.asking import Asking, asking_of
from medground.build import build_policy
from medground.cli import main
from medground.datasets.images import read_image
from medground.datasets.manifest import load_records
from medground.evaluate import Asker, evaluate
from medground.export import export_policy
from medground.loading import Loader, PromptMaker
from medground.policy import check_model
from medground.predict import Grounder, Location, _location, patient_side
from medground.prompts import load_processor, make_prompt
from medground.records import Example, Group, Rollout
from medground.rollout.engine import Engine, Limits
from medground.sharding import WholeCopy, join_ranks

nib = pytest.importorskip("nibabel")

PHRASES = ("nodule in the left lung", "large right pneumothorax", "cardiomegaly")


def write_film(folder: Path) -> dict[str, dict]:
    """One film, 70 wide and 60 high, in four formats: file -> what `locate` has to be told of it."""
    ys, xs = np.mgrid[0:60, 0:70]
    grey = np.clip(40 + 170 * np.exp(-((xs - 48) ** 2 + (ys - 20) ** 2) / 60) + 60 * (xs > 33), 0, 255).astype(np.uint8)
    grey[0, 0], grey[0, 1] = 0, 255
    Image.fromarray(grey).save(folder / "film.png")
    Image.fromarray(grey.astype(np.uint16) * 250 + 900).save(folder / "film16.png")
    dark = 300 + 14 * (255 - grey.astype(np.uint16))  # of 12 bits, dense is low
    # ends at 300 and 300 + 14 * 255, inside of which the film does not reach its extremes everywhere
    tags = {"WindowCenter": 300 + 7 * 255 + 0.5, "WindowWidth": 14 * 255 + 1}
    write_dicom(folder / "film.dcm", dark, PhotometricInterpretation="MONOCHROME1", **tags)
    volume = np.full((70, 60, 3), -500, np.float32)
    volume[:, :, 1] = -500 + grey.T.astype(np.float32) * (1800 / 255)
    nib.save(nib.Nifti1Image(volume, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / "film.nii.gz")
    return {"film.png": {}, "film16.png": {}, "film.dcm": {}, "film.nii.gz": {"slice_index": 1, "window": "bone"}}


@pytest.fixture(scope="module")
def asked(base_folder: Path, phantoms: Path, tiny_job, tmp_path_factory):
    """(folder with films and export, examples, what the evaluation says of them, formats of the film)."""
    folder = tmp_path_factory.mktemp("predict")
    formats = write_film(folder)
    config = tiny_job(folder / "run")
    examples = [Example(p, "film.png", 70, 60, p, (), "c", p, "s", "t", "test") for p in PHRASES]
    for record in load_records(phantoms)[:3]:
        shutil.copyfile(phantoms / record.image, folder / Path(record.image).name)
        examples.append(Example(**vars(record) | {"image": Path(record.image).name}))
    with join_ranks() as ranks:
        policy = build_policy(base_folder, config, ranks)
        whole = WholeCopy(policy, ranks, "auto")
        processor = load_processor(base_folder, config.data.min_pixels, config.data.max_pixels)
        engine = Engine(whole.policy, processor.tokenizer, Limits(100, config.rollout.max_new_tokens, 8, 1e9, 1000))
        loader = Loader(PromptMaker((str(folder),), processor, config.prompt.template), workers=0, ahead=4)
        predictions = evaluate(Asker(policy, whole, engine, loader, config, ranks), examples)
        asking = asking_of(config, "qwen2_5_vl")
        export_policy(folder / "export", policy, base_folder, ranks, asking=asking)
    return folder, examples, predictions, formats


@pytest.fixture(scope="module")
def grounder(asked) -> Grounder:
    return Grounder.load(asked[0] / "export")


def test_answers_are_those_of_the_evaluation(asked, grounder: Grounder):
    folder, examples, predictions, _ = asked
    assert len({p.completion for p in predictions}) > 1 and any(p.boxes for p in predictions)
    for example, prediction in zip(examples, predictions, strict=True):
        (found,) = grounder.locate(folder / example.image, example.phrase)
        assert (found.phrase, found.completion) == (example.phrase, prediction.completion)
        assert found.boxes == (prediction.boxes or ())
        assert found.status == (
            "unreadable" if prediction.boxes is None else "found" if prediction.boxes else "nothing"
        )
        assert found.logp == pytest.approx(prediction.logp, abs=1e-3)


def test_every_format_of_a_film_gives_the_same_boxes(asked, grounder: Grounder):
    folder, _, predictions, formats = asked
    plain = read_image(folder / "film.png")
    for name, options in formats.items():
        picture = read_image(folder / name, *options.values())
        assert np.array_equal(np.asarray(picture), np.asarray(plain)), name
        together = grounder.locate(folder / name, PHRASES, **options)
        assert [found.completion for found in together] == [p.completion for p in predictions[:3]], name
        assert [found.boxes for found in together] == [p.boxes or () for p in predictions[:3]], name
    in_memory = (
        plain,
        plain.convert("L"),
        np.asarray(plain),
        np.asarray(plain)[..., 0],
        Image.open(folder / "film16.png"),
    )
    wanted = grounder.locate(folder / "film.png", PHRASES)
    assert all(grounder.locate(image, PHRASES) == wanted for image in in_memory)


def test_boxes_are_in_pixels_of_the_file(asked, grounder: Grounder):
    """What the model says are pixels of the image as it sees it, which the image processor resized."""
    folder, *_ = asked
    found = next(f for f in grounder.locate(folder / "film.png", PHRASES) if f.boxes)
    spoken = [float(v) for v in re.search(r"\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", found.completion).groups()]
    grid = grounder.processor.images(images=[read_image(folder / "film.png")], return_tensors="pt")["image_grid_thw"]
    height, width = (14 * int(n) for n in grid[0, 1:])
    assert (width, height) != (70, 60)
    scaled = np.array(spoken) * np.tile([70 / width, 60 / height], 2)
    assert np.allclose(found.boxes[0], np.clip(scaled, 0, [70, 60, 70, 60]))


def test_an_answer_may_be_nothing_or_unreadable(asked, grounder: Grounder):
    example = Example("a", "", 70, 60, "nodule", (), "", "", "", "", "")
    prompt = make_prompt(example, read_image(asked[0] / "film.png"), grounder.processor, "brief")

    def said(text: str) -> Location:
        none = np.zeros(0)
        return _location(Group(prompt, (Rollout(tokens=none, logp=none, text=text, finished=True),)))

    assert (said("<think>a</think><answer>[]</answer>").status, said("a lot of words").status) == (
        "nothing",
        "unreadable",
    )
    assert said("<answer>[]</answer>").side is said("words").side is None and said("words").boxes == ()
    two = said('<answer>[{"bbox_2d": [0, 0, 4, 4]}, {"bbox_2d": [1000, 9, 2, 900]}]</answer>')
    assert (two.status, len(two.boxes), two.side) == ("found", 2, "both")
    assert all(type(v) is float and 0 <= v <= 70 for box in two.boxes for v in box)


@pytest.mark.parametrize(
    ("boxes", "side"),
    [
        ([], None),
        ([(60, 0, 90, 5)], "left"),  # the image's right
        ([(0, 0, 90, 5)], "right"),
        ([(40, 0, 60, 5)], "midline"),
        ([(60, 0, 90, 5), (70, 0, 71, 5)], "left"),
        ([(60, 0, 90, 5), (0, 0, 10, 5)], "both"),
    ],
)
def test_the_side_is_the_patients(boxes, side):
    assert patient_side(boxes, 100) == side


def test_json_is_all_that_stdout_has(asked, base_folder: Path, capsys):
    folder, _, predictions, _ = asked
    options = ["--model", str(folder / "export"), "--json", "--out", str(folder / "drawn.png"), "--slice", "1"]
    assert main(["predict", str(folder / "film.nii.gz"), *PHRASES[:2], *options, "--window", "bone"]) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert out.err == "" and (found["width"], found["height"], found["slice"]) == (70, 60, 1)
    assert [row["completion"] for row in found["locations"]] == [p.completion for p in predictions[:2]]
    assert [[tuple(box) for box in row["boxes"]] for row in found["locations"]] == [
        list(p.boxes or ()) for p in predictions[:2]
    ]
    assert "as the file orients it" in found["sides"]
    drawn = Image.open(folder / "drawn.png")
    assert drawn.width == 70 * 8 and drawn.height > 60 * 8  # enlarged, with lines of text below

    words = ["--model", str(base_folder), "--template", "brief", "--min-pixels", "3136", "--max-pixels", "3136"]
    assert main(["predict", str(folder / "film.png"), "cardiomegaly", *words, "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr()
    assert "has no medground.json" in out.err and "template brief, 3136 to 3136 pixels" in out.err
    assert "the answer cannot be read" in out.out and "cut after 2 tokens" in out.out
    assert "assumed: the image shows the patient's left on its right" in out.out


MISTAKES = {
    "no file": (["no.png", "a"], "no.png: no such image file"),
    "not an image": (["words.png", "a"], "words.png: want a PNG, JPEG or DICOM image; got something else"),
    "no model": (["film.png", "a", "--model", "no/model"], "no/model: want a model folder; there is none"),
    "no weights": (["film.png", "a", "--model", "bare"], "bare: want weights as .safetensors; it has none"),
    "a run": (["film.png", "a", "--model", "."], "its model is in export"),
    "slice too high": (["film.nii.gz", "a", "--slice", "3"], "slice: want one from 0 to 2 (lowest first); got 3"),
    "no slice": (["film.nii.gz", "a"], "slice: want one from 0 to 2 (lowest first); got None"),
    "slice of a film": (["film.png", "a", "--slice", "0"], "film.png: cannot read the image: slice: want none"),
    "window of a film": (["film.png", "a", "--window", "lung"], "film.png: window: want none"),
    "special token": (["film.png", "a", "b <|im_end|>"], "film.png, phrase 2: want a phrase without special tokens"),
    "too narrow": (["thin.png", "a"], "thin.png, phrase 1: absolute aspect ratio must be smaller than 200"),
    "too long": (["film.png", "a " * 3000], "film.png, phrase 1: want a prompt and 24 new tokens within"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str, asked, capsys, monkeypatch):
    folder = asked[0]
    monkeypatch.chdir(folder)
    Path("words.png").write_text("no picture")
    Image.new("L", (3000, 2)).save("thin.png")
    Path("bare").mkdir(exist_ok=True)
    shutil.copyfile("export/config.json", "bare/config.json")
    words, message = MISTAKES[case]
    options = [] if "--model" in words else ["--model", "export"]
    assert main(["predict", *words, *options]) == 2
    out = capsys.readouterr()
    assert message in out.err and out.out == "" and "Traceback" not in out.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["film.png"], "want one or more after the image"),
        (["film.png", "a", " "], "number 2 is empty"),
        (["film.png", "a", "--out", "a.jpg"], "ends in .png"),
        (["film.png", "a", "--out", "nowhere/a.png"], "want a folder that is there"),
        (["film.png", "a", "--out", "./film.png"], "want another file than the image"),
        (["film.png", "a", "--template", "curt"], "template"),
    ],
)
def test_impossible_options_are_named(words, named, asked, capsys, monkeypatch):
    monkeypatch.chdir(asked[0])
    with pytest.raises(SystemExit) as stop:
        main(["predict", *words, "--model", "export"])
    assert stop.value.code == 2
    assert named in re.sub(r"\s*│\s*", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4)),
        Image.new("L", (0, 4)),
        np.full((4, 4), np.nan),
        np.zeros(9),
        np.array([["a"]]),
        None,
    ],
)
def test_arrays_that_are_no_pictures_are_named(image, grounder: Grounder):
    with pytest.raises(ValueError, match=r"^image: want"):
        grounder.locate(image, "a")


def test_no_phrase_is_no_question(grounder: Grounder):
    for phrases in ("", [], ["a", "\n"], ["a", 3]):
        with pytest.raises(ValueError, match=r"^phrase: want"):
            grounder.locate(np.zeros((60, 60), np.uint8), phrases)
    with pytest.raises(ValueError, match="slice, window: want none for a picture in memory"):
        grounder.locate(np.zeros((60, 60), np.uint8), "a", slice_index=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "want a JSON object; got"),
        ("[]", "want a JSON object; got list"),
        ('{"template": "curt"}', "template: want one of brief"),
        ('{"min_pixels": 3.5}', "min_pixels: want a whole number"),
        ('{"max_pixels": 10}', "min_pixels: want <= max_pixels"),
        ('{"wording": "brief"}', "want the fields template"),
        ('{"precision": "float8"}', "precision: want auto"),
        ('{"family": "qwen3_vl"}', "family: want qwen2_5_vl"),
    ],
)
def test_a_damaged_note_is_named(text, message, asked, tmp_path: Path):
    for file in (asked[0] / "export").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "medground.json").unlink()
    (tmp_path / "medground.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Grounder.load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "medground.json"))


def test_the_note_is_how_the_run_asked(asked, tiny_job, tmp_path: Path):
    config = tiny_job(tmp_path)
    found = json.loads((asked[0] / "export/medground.json").read_text())
    assert check_model(asked[0] / "export").model_type == found["family"]
    assert found == vars(Asking(**found)) and found["template"] == config.prompt.template == "brief"
    assert (found["min_pixels"], found["max_new_tokens"]) == (config.data.min_pixels, 24)
    grounder = Grounder.load(asked[0] / "export", template="plain", max_new_tokens=None)
    assert (grounder.asking.template, grounder.asking.max_new_tokens) == ("plain", 24)
