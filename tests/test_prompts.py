"""Prompts against transformers' own processing, answers in many dresses, and coordinates there and back."""

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
    IMAGE_TOKEN,
    TEMPLATES,
    load_processor,
    make_prompt,
    mrope_positions,
    parse_answer,
    prompt_tokens,
    render_answer,
    to_original,
    to_processed,
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
    prompt = Prompt(example(width, height), none, none, none, none, (), columns * 28, rows * 28)
    x1, x2 = sorted(c * width for c in corners[:2])
    y1, y2 = sorted(c * height for c in corners[2:])
    back = to_original(to_processed((x1, y1, x2, y2), prompt), prompt)
    assert back == pytest.approx((x1, y1, x2, y2), abs=1e-6 * max(width, height))


def test_boxes_outside_the_image_are_clipped_to_it():
    from medground.records import Prompt

    none = torch.empty(0)
    prompt = Prompt(example(100, 80), none, none, none, none, (), 112, 84)
    assert to_original((-5, -1e9, 200, 1e30), prompt) == (0, 0, 100, 80)


GOOD = [
    ('{"bbox_2d": [1, 2, 3, 4]}', ((1, 2, 3, 4),)),
    ('{"bbox_2d": [1.5, -2, 3e1, 4.25], "label": "nodule"}', ((1.5, -2, 30, 4.25),)),
    ('[{"bbox_2d": [1, 2, 3, 4]}]', ((1, 2, 3, 4),)),
    ('[{"bbox_2d": [1, 2, 3, 4]}, {"label": "x", "bbox_2d": [5, 6, 7, 8]}]', ((1, 2, 3, 4), (5, 6, 7, 8))),
    ('\n```json\n{"bbox_2d": [1, 2, 3, 4]}\n```\n', ((1, 2, 3, 4),)),
    ("[]", ()),
]
BAD = [
    "",
    "nothing",
    '{"bbox_2d": [1, 2, 3]}',
    '{"bbox_2d": [1, 2, 3, 4, 5]}',
    '{"bbox_2d": [1, 2, 3, "4"]}',
    '{"bbox_2d": [1, 2, 3, true]}',
    '{"bbox_2d": [1, 2, 3, NaN]}',
    '{"bbox_2d": [1, 2, 3, Infinity]}',
    '{"bbox_2d": [1, 2, 3, 1e400]}',
    '{"bbox_2d": [1, 2, 3, ' + "9" * 400 + "]}",
    '{"box": [1, 2, 3, 4]}',
    "[1, 2, 3, 4]",
    '[{"bbox_2d": [1, 2, 3, 4]}, 7]',
    "[" * 100_000,
    "9" * 100_000,
]


@pytest.mark.parametrize(("answer", "boxes"), GOOD)
def test_good_answers(answer, boxes):
    got = parse_answer(f"<think>by the hilum</think>\n<answer>{answer}</answer>")
    assert got.boxes == boxes and got.well_formed


@pytest.mark.parametrize("answer", BAD)
def test_bad_answers(answer):
    got = parse_answer(f"<think></think><answer>{answer}</answer>")
    assert got.boxes is None and not got.well_formed


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("<answer>[]</answer>", True),
        ("<think>a<think>b</think></think><answer>[]</answer>", True),
        ("<think>a</think><answer>[]</answer> and more", True),
        ("well: <think>a</think><answer>[]</answer>", True),
        ("<think>a<answer>[]</answer></think>", True),
        ("<think>a</think><answer>[]</answer><answer>[]</answer>", False),
        ("<think>a</think><answer>[]", False),
        ("[]", False),
        ("", False),
    ],
)
def test_other_structures_are_not_well_formed(text, readable):
    got = parse_answer(text)
    assert not got.well_formed
    assert (got.boxes == ()) == readable


@given(st.text(alphabet="<>/thinkaswer[]{}\"'bo_2d:,0123456789.-e \n\\", max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_parser(text):
    for wrapped in (text, f"<answer>{text}</answer>", f"<think>{text}</think><answer>{text}</answer>"):
        got = parse_answer(wrapped)
        assert got.boxes is None or all(len(box) == 4 for box in got.boxes)


@given(st.lists(st.tuples(*[st.integers(0, 2000)] * 4), max_size=4))
@settings(max_examples=100, deadline=None)
def test_rendered_answers_are_read_back(boxes):
    text = render_answer(tuple(tuple(map(float, box)) for box in boxes), "upper left")
    got = parse_answer(text)
    assert got.well_formed and got.boxes == tuple(boxes)
    json.loads(text.partition("<answer>")[2].partition("</answer>")[0])
