"""Controls of an evaluation: what is shown, what is read back, answers without a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medground.controls import _other_images, agreement, constant_answers, questions
from medground.datasets.manifest import load_records
from medground.evaluate import predictions_of
from medground.loading import PromptMaker, Question
from medground.prompts import load_processor, make_prompt
from medground.records import Example, Group, Prompt, Rollout
from medground.scoring import score


def example(i: int, patient: str) -> Example:
    return Example(str(i), f"{i}.png", 100, 50, "left x", ((0.0, 0.0, 10.0, 10.0),), "c", patient, "s", "t", "test")


def test_shuffled_images_are_another_patients():
    examples = [example(i, f"p{i // 3}") for i in range(11)]
    shown = _other_images(examples)
    patient_of = {e.image: e.patient for e in examples}
    assert all(patient_of[image] != e.patient for image, e in zip(shown, examples, strict=True))
    assert len(set(shown)) > 6
    assert [q.image for q in questions(examples, "shuffled")] == shown
    assert [q.image for q in questions(examples, "true")] == [e.image for e in examples]


def test_one_patient_cannot_be_shuffled():
    with pytest.raises(ValueError, match="two patients"):
        questions([example(i, "p") for i in range(3)], "shuffled")


@pytest.fixture(scope="module")
def make(phantoms: Path, base_folder: Path) -> PromptMaker:
    return PromptMaker((str(phantoms),), load_processor(base_folder, 56 * 56, 112 * 112), "brief")


def test_what_a_control_shows(make: PromptMaker, phantoms: Path, tmp_path: Path):
    """Prompts equal those of pictures that were changed by hand."""
    record = replace(load_records(phantoms)[0], phrase="Nodule in the left lung")
    pixels = np.asarray(Image.open(phantoms / record.image).convert("RGB"))

    def by_hand(phrase: str, image: np.ndarray) -> Prompt:
        return make_prompt(replace(record, phrase=phrase), Image.fromarray(image), make.processor, "brief")

    wanted = {
        "true": by_hand(record.phrase, pixels),
        "blank": by_hand(record.phrase, np.full_like(pixels, 128)),
        "flipped": by_hand("Nodule in the right lung", np.ascontiguousarray(pixels[:, ::-1])),
    }
    for control, want in wanted.items():
        [question] = questions([record], control)
        found = make(question)
        assert torch.equal(found.input_ids, want.input_ids), control
        assert torch.equal(found.pixel_values, want.pixel_values), control
    unsafe = make(questions([replace(record, phrase="left heart border")], "flipped")[0])
    assert torch.equal(unsafe.input_ids, by_hand("left heart border", pixels).input_ids), "as it is"
    assert torch.equal(unsafe.pixel_values, wanted["flipped"].pixel_values), "and mirrored all the same"


def group(record: Example, *texts: str) -> Group:
    none, logp = torch.empty(0), torch.tensor([-0.5, -0.25])
    prompt = Prompt(record, none, none, none, none, (), processed_width=200, processed_height=50)
    return Group(prompt, tuple(Rollout(none, logp, text, True) for text in texts))


def test_answers_to_a_mirrored_film_are_those_of_the_film():
    record = example(0, "p")
    text = '<think>{"bbox_2d": [0, 0, 20, 10]}</think><answer>{"bbox_2d": [20, 5, 60, 20]}</answer>'
    [plain] = predictions_of(Question(record, "0.png"), group(record, text))
    assert plain.boxes == ((10.0, 5.0, 30.0, 20.0),) and plain.thought_boxes == ((0.0, 0.0, 10.0, 10.0),)
    assert plain.logp == -0.75 and plain.sample is None
    asked = replace(record, phrase="right x", boxes=((90.0, 0.0, 100.0, 10.0),))  # as the loader hands it on
    [back] = predictions_of(Question(record, "0.png", change="flipped"), group(asked, text))
    assert back.boxes == ((70.0, 5.0, 90.0, 20.0),) and back.thought_boxes == ((90.0, 0.0, 100.0, 10.0),)
    assert (back.phrase, back.truth) == (record.phrase, record.boxes), "the film's own"
    several = predictions_of(Question(record, "0.png", change="flipped"), group(asked, text, "?"))
    assert [p.sample for p in several] == [0, 1] and several[1].boxes is None


def test_a_mirrored_film_answered_alike_agrees():
    record = example(0, "p")
    box = '<think>a</think><answer>{"bbox_2d": [%d, 5, %d, 20]}</answer>'
    here, there = group(record, box % (20, 60), "?"), group(record, box % (140, 180), box % (20, 60))
    plain = predictions_of(Question(record, "0.png"), here)
    flipped = predictions_of(Question(record, "0.png", change="flipped"), there)
    pairs = agreement(plain, flipped)
    assert len(pairs) == 1, "an unreadable answer leaves nothing to agree with"
    assert score(pairs)["metrics"]["miou"]["value"] == 1.0
    elsewhere = replace(flipped[1], sample=0)
    assert score(agreement(plain[:1], [elsewhere]))["metrics"]["miou"]["value"] == 0


def test_answers_without_a_model():
    examples = [example(0, "p"), replace(example(1, "q"), boxes=((25.0, 12.5, 75.0, 37.5),))]
    whole, centre = (constant_answers(examples, name) for name in ("whole", "centre"))
    assert [p.iou for p in whole] == [0.02, 0.25]
    assert [p.iou for p in centre] == [0.0, 1.0]
    assert centre[0].boxes == ((25.0, 12.5, 75.0, 37.5),)


def test_nothing_is_read_of_what_is_blank(make: PromptMaker):
    missing = example(0, "p")
    assert len(make(Question(missing, change="blank")).input_ids) > 0
    with pytest.raises(ValueError, match=r"record 0: .*0\.png"):
        make(Question(missing))
