"""The base model: its faults are those it should have, its folder is used again or refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medground.answers import parse_answer
from medground.base_answers import answer_text, worsened
from medground.base_config import BaseConfig
from medground.base_model import _answered, _draw, _Lesson, _save_processor, build_base
from medground.prompts import load_processor
from medground.records import Example, Prompt
from medground.rewards.format import format_reward
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
        worse = [worsened(prompt(phrase, (box,)), rng) for _ in range(600)]
        given = [boxes[0] for boxes in worse if boxes]
        other_side = np.mean([(b[0] + b[2]) / 2 < 56 for b in given])
        assert abs(other_side - mirrored) < 0.07, phrase
        near = [set_iou((b,), (box,)) for b in given if (b[0] + b[2]) / 2 > 56]
        assert 0.4 < np.mean(near) < 0.8
        assert all(0 <= b[0] < b[2] <= 112 and 0 <= b[1] < b[3] <= 112 for b in given)


def test_absent_findings_are_sometimes_made_up():
    rng = np.random.default_rng(0)
    answers = [worsened(prompt("left nodule", ()), rng) for _ in range(400)]
    assert abs(np.mean([len(a) == 0 for a in answers]) - 0.7) < 0.07


@pytest.mark.parametrize("template", ["brief", "brief-chain"])
def test_lessons_are_good_until_they_are_faulty(template: str, tmp_path: Path, monkeypatch):
    import medground.base_model as module

    config = BaseConfig(out="", template=template, **TINY)
    _save_processor(config, tmp_path)
    processor = load_processor(tmp_path, 56 * 56, 56 * 56)
    monkeypatch.setattr(module, "_worker", (config, processor), raising=False)
    lessons: list[_Lesson] = [lesson for index in range(60) for lesson in _draw(index)]
    rng, chain = np.random.default_rng(0), template == "brief-chain"
    for faulty in (False, True):
        groups = [_answered(lesson, processor, rng, faulty, chain) for lesson in lessons]
        answers = [parse_answer(g.rollouts[0].text) for g in groups]
        assert all(processor.tokenizer.decode(g.rollouts[0].tokens[:-1]) == g.rollouts[0].text for g in groups)
        assert all(int(g.rollouts[0].tokens[-1]) == processor.tokenizer.eos_token_id for g in groups)
        ious = [set_iou(a.boxes, g.prompt.example.boxes) for a, g in zip(answers, groups, strict=True)]
        earned = format_reward([answers], template).mean().item()
        if faulty:
            assert np.mean(ious) < 0.6 and 0.75 < earned < 1
        else:
            # integers of the answer against fractions of the film
            assert min(ious) > 0.6 and np.mean(ious) > 0.95 and earned == 1
            assert all(bool(answer.thought_boxes) == chain for answer in answers)
            longest = max(len(g.rollouts[0].tokens) for g in groups)
            assert longest <= (90 if chain else 50), longest
            asked = processor.tokenizer.decode(groups[0].prompt.input_ids)
            assert ("Find in steps:" in asked) == chain


LUNGS = ((60.0, 20.0, 104.0, 90.0), (8.0, 20.0, 50.0, 88.0))  # of the patient's left, on the image's right, and right


def test_a_chain_goes_from_the_lung_to_the_finding():
    def chain(phrase, *boxes):
        text = answer_text(prompt(phrase, boxes), LUNGS, np.random.default_rng(0), chain=True, faulty=False)
        answer = parse_answer(text)
        assert answer.chained
        return text.split("<think>")[1].split("</think>")[0], answer

    box = (70.2, 23.9, 99.8, 51.0)
    thought, answer = chain("left upper zone nodule", box)
    assert thought == ('left lung {"bbox_2d": [60, 20, 104, 90]} nodule {"bbox_2d": [70, 20, 100, 60]}')
    assert answer.boxes == ((70, 24, 100, 51),)
    thought, answer = chain("bilateral mid zone opacities", (10, 30, 40, 50), (70, 30, 111, 50))
    assert thought.startswith('chest {"bbox_2d": [8, 20, 104, 90]} nodule ')
    assert answer.thought_boxes[1:] == ((10, 30, 40, 50), (70, 30, 112, 50)), "no rough box leaves the film"
    thought, answer = chain("right lower zone nodule")
    assert thought == 'right lung {"bbox_2d": [8, 20, 50, 88]} not seen' and answer.boxes == ()


def test_a_faulty_chain_takes_the_wrong_side_from_its_first_box_on():
    rng = np.random.default_rng(0)
    for boxes in (((70.0, 20.0, 100.0, 50.0),), ()):
        texts = [answer_text(prompt("left nodule", boxes), LUNGS, rng, chain=True, faulty=True) for _ in range(300)]
        said = [parse_answer(text) for text in texts]
        assert any(a.well_formed and not a.chained for a in said), "some are right in all but the chain"
        answers = [a for a in said if a.chained]
        assert 0.85 < len(answers) / len(texts) < 0.98
        first = np.array([(a.thought_boxes[0][0] + a.thought_boxes[0][2]) / 2 < 56 for a in answers])
        assert abs(first.mean() - 0.55) < 0.09
        last = [(a.boxes[0][0] + a.boxes[0][2]) / 2 < 56 if a.boxes else None for a in answers]
        agree = [f == s for f, s in zip(first, last, strict=True) if s is not None]
        assert np.mean(agree) > 0.95
        assert all(set_iou(a.thought_boxes[1:], a.boxes) > 0.4 for a in answers if a.boxes), "rough, but the same"


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
