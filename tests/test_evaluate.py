"""Coordinates of the evaluation."""

from dataclasses import replace
from pathlib import Path

import torch

from medground.evaluate import read_answer
from medground.records import Example, Prompt


def example(i: int, patient: str) -> Example:
    return Example(str(i), f"{i}.png", 100, 50, "x", ((0.0, 0.0, 1.0, 1.0),), "c", patient, "s", "t", "test")


def test_answers_come_in_original_pixels():
    none = torch.empty(0)
    prompt = Prompt(example(0, "p"), none, none, none, none, (), processed_width=200, processed_height=25)
    text = '<think>a</think><answer>{"bbox_2d": [20, 5, 400, 20]}</answer>'
    answer = read_answer(text, prompt)
    assert answer.boxes == ((10.0, 10.0, 100.0, 40.0),) and answer.well_formed
    assert read_answer("nothing", prompt).boxes is None


def test_a_second_image_size_changes_the_answer_alone(phantoms: Path, base_folder: Path):
    """An image of another size than the record's says where in *it* the box is."""
    from medground.datasets.images import read_image
    from medground.datasets.manifest import load_records
    from medground.prompts import load_processor, make_prompt

    record = load_records(phantoms)[0]
    processor = load_processor(base_folder, 56 * 56, 112 * 112)
    image = read_image(phantoms / record.image).resize((112, 56))
    prompt = make_prompt(replace(record, width=1000, height=300), image, processor, "brief")
    answer = read_answer('<answer>{"bbox_2d": [0, 0, 56, 28]}</answer>', prompt)
    assert answer.boxes == ((0.0, 0.0, 500.0, 150.0),)
