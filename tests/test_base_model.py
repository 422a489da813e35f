"""The base model: its faults are those it should have, its folder is used again or refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medground.answers import parse_answer
from medground.base_config import BaseConfig
from medground.base_model import _answered, _draw, _Lesson, _worsen, build_base
from medground.prompts import load_processor
from medground.records import Example, Prompt
from medground.set_iou import set_iou

TINY = {"films": 100, "size": 56, "steps": 100, "batch_size": 16, "lr": 4e-3}


def prompt(phrase: str, boxes) -> Prompt:
    example = Example("r", "", 112, 112, phrase, boxes, "nodule", "p", "s", "phantom", "train")
    none = torch.empty(0)
    return Prompt(example, none, none, none, none, (), 112, 112)


def test_most_one_sided_boxes_are_mirrored():
    rng = np.random.default_rng(0)
    box = (70.0, 20.0, 100.0, 50.0)
    for phrase, mirrored in (("left nodule", 0.55), ("left and right nodule", 0.0), ("enlarged heart", 0.0)):
        worse = [_worsen(prompt(phrase, (box,)), rng) for _ in range(600)]
        given = [boxes[0] for boxes in worse if boxes]
        other_side = np.mean([(b[0] + b[2]) / 2 < 56 for b in given])
        assert abs(other_side - mirrored) < 0.07, phrase
        near = [set_iou((b,), (box,)) for b in given if (b[0] + b[2]) / 2 > 56]
        assert 0.4 < np.mean(near) < 0.8
        assert all(0 <= b[0] < b[2] <= 112 and 0 <= b[1] < b[3] <= 112 for b in given)


def test_absent_findings_are_sometimes_made_up():
    rng = np.random.default_rng(0)
    answers = [_worsen(prompt("left nodule", ()), rng) for _ in range(400)]
    assert abs(np.mean([len(a) == 0 for a in answers]) - 0.7) < 0.07


def test_lessons_are_good_until_they_are_faulty(base_folder: Path, monkeypatch):
    processor = load_processor(base_folder, 56 * 56, 56 * 56)
    import medground.base_model as module

    monkeypatch.setattr(module, "_worker", (BaseConfig(out="", **TINY), processor), raising=False)
    lessons: list[_Lesson] = [lesson for index in range(60) for lesson in _draw(index)]
    rng = np.random.default_rng(0)
    for faulty in (False, True):
        groups = [_answered(lesson, processor, rng, faulty) for lesson in lessons]
        answers = [parse_answer(g.rollouts[0].text) for g in groups]
        assert all(processor.tokenizer.decode(g.rollouts[0].tokens[:-1]) == g.rollouts[0].text for g in groups)
        assert all(int(g.rollouts[0].tokens[-1]) == processor.tokenizer.eos_token_id for g in groups)
        ious = [set_iou(a.boxes, g.prompt.example.boxes) for a, g in zip(answers, groups, strict=True)]
        broken = np.mean([not a.well_formed for a in answers])
        if faulty:
            assert np.mean(ious) < 0.6 and 0 < broken < 0.15
        else:
            # integers of the answer against fractions of the film
            assert min(ious) > 0.6 and np.mean(ious) > 0.95 and broken == 0


def test_the_same_recipe_is_there_already(base_folder: Path, capsys):
    before = (base_folder / "model.safetensors").stat().st_mtime_ns
    build_base(BaseConfig(out=str(base_folder), **TINY))
    assert "already there" in capsys.readouterr().out
    assert (base_folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds something else"):
        build_base(BaseConfig(out=str(tmp_path), **TINY))


def test_impossible_options_are_named():
    with pytest.raises(ValueError, match="batch_size"):
        BaseConfig(out="x", batch_size=0)
    with pytest.raises(ValueError, match="vocab_size"):
        BaseConfig(out="x", vocab_size=300)
