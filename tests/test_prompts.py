"""Prompts against transformers' own processing, and coordinates there and back."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from medground.policy import load_policy
from medground.prompts import (
    FAMILIES,
    IMAGE_TOKEN,
    TEMPLATES,
    load_processor,
    make_prompt,
    mrope_positions,
    prompt_tokens,
    question_text,
    spoken_coordinates,
    to_original,
    to_processed,
    to_spoken,
)
from medground.records import Example


def example(width=100, height=80, phrase="small left nodule"):
    return Example("r", "r.png", width, height, phrase, ((10.0, 20.0, 30.0, 60.0),), "nodule", "p", "s", "t", "test")


@pytest.mark.parametrize("size", [(56, 56), (100, 80), (640, 533), (33, 500)])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_prompt_has_one_placeholder_per_merged_patch(base_folder: Path, size, template):
    processor = load_processor(base_folder, 56 * 56, 112 * 112)
    prompt = make_prompt(example(*size), Image.new("RGB", size), processor, template)
    t, h, w = prompt.image_grid_thw[0].tolist()
    image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert int((prompt.input_ids == image_id).sum()) == t * h * w // 4
    assert len(prompt.pixel_values) == t * h * w
    assert (prompt.processed_width, prompt.processed_height) == (w * 14, h * 14)
    assert prompt.processed_width * prompt.processed_height <= 112 * 112 * 1.2
    assert "small left nodule" in processor.tokenizer.decode(prompt.input_ids)


@pytest.mark.parametrize("size", [(56, 56), (200, 40), (33, 500), (1000, 900)])
def test_tokens_are_counted_without_the_image(base_folder: Path, size):
    processor = load_processor(base_folder, 28 * 28, 200 * 200)
    for template in TEMPLATES:
        prompt = make_prompt(example(*size), Image.new("RGB", size), processor, template)
        images = int((prompt.input_ids == processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum())
        assert prompt_tokens(example(*size), processor, template) == (len(prompt.input_ids) - images, images)
    with pytest.raises(ValueError, match=r"record r: .*aspect ratio"):
        prompt_tokens(example(9000, 20), processor, "brief")


def test_images_are_named_by_their_pixels(base_folder: Path):
    processor = load_processor(base_folder, 28 * 28, 200 * 200)
    black, white = (Image.new("RGB", (56, 56), colour) for colour in ("black", "white"))
    keys = [make_prompt(example(), image, processor, "brief").image_keys for image in (black, white, black.copy())]
    assert keys[0] == keys[2] != keys[1]


def test_positions_are_those_of_transformers(base_folder: Path):
    processor = load_processor(base_folder, 56 * 56, 168 * 168)
    model: Qwen2_5_VLForConditionalGeneration = load_policy(base_folder).vlm
    for size in [(56, 56), (150, 60), (60, 150)]:
        prompt = make_prompt(example(*size), Image.new("RGB", size), processor, "plain")
        is_image = (prompt.input_ids == model.config.image_token_id).int()[None]
        want, _ = model.model.get_rope_index(prompt.input_ids[None], is_image, prompt.image_grid_thw)
        assert torch.equal(prompt.position_ids, want[:, 0])


def test_positions_of_text_alone_and_of_two_images():
    assert torch.equal(
        mrope_positions(torch.zeros(3, dtype=torch.bool), torch.zeros(0, 3)), torch.arange(3).expand(3, -1)
    )
    flags = torch.tensor([False, True, True, False, True, False])
    got = mrope_positions(flags, torch.tensor([[1, 1, 2], [1, 1, 1]]))
    assert got.tolist() == [[0, 1, 1, 3, 4, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_a_phrase_cannot_smuggle_in_special_tokens(base_folder: Path):
    processor = load_processor(base_folder, 56 * 56, 112 * 112)
    for token in (IMAGE_TOKEN, "<|im_end|>"):
        with pytest.raises(ValueError, match="record r: want a phrase without special tokens"):
            make_prompt(example(phrase=f"nodule {token} here"), Image.new("RGB", (100, 80)), processor, "brief")


def as_on_the_hub(base_folder: Path, folder: Path) -> Path:
    """The base model's processor files in the form that Qwen2.5-VL's have on the hub."""
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    del settings["size"]
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings | {"min_pixels": 3136, "max_pixels": 12845056})
    )
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_pixel_limits_hold_for_files_of_the_hub(base_folder: Path, tmp_path: Path):
    processor = load_processor(as_on_the_hub(base_folder, tmp_path / "hub"), 112 * 112, 224 * 224)
    large = make_prompt(example(1500, 1250), Image.new("RGB", (1500, 1250)), processor, "plain")
    assert large.processed_width * large.processed_height <= 224 * 224
    small = make_prompt(example(30, 30), Image.new("RGB", (30, 30)), processor, "plain")
    assert small.processed_width * small.processed_height >= 112 * 112
    fresh = load_processor(base_folder, 56 * 56, 56 * 56)
    assert make_prompt(example(), Image.new("RGB", (100, 80)), fresh, "brief").processed_width <= 84


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_folder_without_processor_is_named(base_folder: Path, tmp_path: Path, missing):
    for file in base_folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{tmp_path}: want .*(processor|tokenizer|chat template)"):
        load_processor(tmp_path, 56 * 56, 112 * 112)


@given(
    st.integers(20, 4000), st.integers(20, 4000), st.integers(1, 60), st.integers(1, 60),
    st.tuples(*[st.floats(0, 1)] * 4),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_boxes_come_back_from_the_processed_image(width, height, columns, rows, corners):
    from medground.records import Prompt

    none = torch.empty(0)
    x1, x2 = sorted(c * width for c in corners[:2])
    y1, y2 = sorted(c * height for c in corners[2:])
    for spoken in ("processed", "thousandths"):
        prompt = Prompt(example(width, height), none, none, none, none, (), columns * 28, rows * 28, spoken)
        said = to_spoken((x1, y1, x2, y2), prompt)
        assert to_original(said, prompt) == pytest.approx((x1, y1, x2, y2), abs=1e-6 * max(width, height))
        if spoken == "processed":
            assert said == to_processed((x1, y1, x2, y2), prompt)
        rounded = to_original(tuple(map(round, said)), prompt)  # an answer's whole numbers: half a unit at most
        units = (1000, 1000) if spoken == "thousandths" else (columns * 28, rows * 28)
        for got, want, size, unit in zip(rounded, (x1, y1, x2, y2), (width, height) * 2, units * 2, strict=True):
            assert abs(got - want) <= 0.5 * size / unit + 1e-6 * size


def test_boxes_outside_the_image_are_clipped_to_it():
    from medground.records import Prompt

    none = torch.empty(0)
    prompt = Prompt(example(100, 80), none, none, none, none, (), 112, 84)
    assert to_original((-5, -1e9, 200, 1e30), prompt) == (0, 0, 100, 80)


def test_thousandths_are_of_each_side():
    from medground.records import Prompt

    none = torch.empty(0)
    prompt = Prompt(example(200, 80), none, none, none, none, (), 112, 84, "thousandths")
    assert to_spoken((20, 20, 200, 80), prompt) == (100, 250, 1000, 1000)
    assert to_original((100, 250, 1000, 1000), prompt) == (20, 20, 200, 80)
    assert to_processed((20, 20, 200, 80), prompt) == pytest.approx((11.2, 21, 112, 84))


def test_families_speak_what_the_table_says(base_folder: Path, tmp_path: Path):
    assert load_processor(base_folder, 56 * 56, 112 * 112).coordinates == FAMILIES["qwen2_5_vl"] == "processed"
    for file in base_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    processor = load_processor(tmp_path, 56 * 56, 112 * 112)
    prompt = make_prompt(example(), Image.new("RGB", (100, 80)), processor, "plain")
    assert prompt.coordinates == "thousandths" and to_spoken((0, 0, 50, 80), prompt) == (0, 0, 500, 1000)
    for text, wanted in [
        ('{"model_type": "llava"}', "got 'llava'"),
        ("[]", "config.json; got none"),
        ("{", "none that"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=wanted):
            spoken_coordinates(tmp_path)


def test_templates_say_what_they_are_for():
    plain, sides, chain = (question_text("left {nodule}", name) for name in ("plain", "patient-side", "chain-of-box"))
    assert plain == (
        "Please provide the bounding box coordinate of the region this sentence describes: left {nodule}. First output "
        "the thinking process in <think> </think> tags and then output the final answer in <answer> </answer> tags. "
        "Output the final answer in JSON format."
    )
    assert "the patient's left is on the image's right" in sides and "the patient's left" in chain
    assert '{"bbox_2d": [x1, y1, x2, y2], "label": "region"}' in chain


def test_the_command_shows_the_whole_chat(base_folder: Path, tmp_path: Path, capsys):
    from medground.cli import main

    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    words = ["prompt", "--template", "chain-of-box", "--phrase", "left nodule", "--max-pixels", "12544"]
    assert main([*words, "--image", str(tmp_path / "a.png"), "--model", str(base_folder)]) == 0
    out = capsys.readouterr().out
    prompt = make_prompt(
        example(phrase="left nodule"), Image.new("RGB", (100, 80)), load_processor(base_folder, 3136, 12544),
        "chain-of-box",
    )  # fmt: skip
    assert f"{len(prompt.input_ids)} tokens, " in out and "<|image_pad|> * " in out and "describes: left nodule." in out
    assert f"the whole image is [0, 0, {prompt.processed_width}, {prompt.processed_height}]" in out
    assert main(words) == 0
    assert question_text("left nodule", "chain-of-box") in capsys.readouterr().out
    assert main([*words, "--image", str(tmp_path / "a.png")]) == 2
    assert "want a model folder with --image" in capsys.readouterr().err
