"""The semantic reward with an encoder that can be seen through: it tells how bright a crop is."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medground.config import RewardConfig
from medground.prompts import load_processor, make_prompt
from medground.records import Answer, Example, Group, Rollout
from medground.rewards.batch import batch_of
from medground.rewards.encoders import Encoder
from medground.rewards.semantic import Prior, prior_of, semantic_reward

BRIGHT, DARK = (20.0, 20.0, 60.0, 60.0), (100.0, 100.0, 140.0, 140.0)
WHOLE = (0.0, 0.0, 168.0, 168.0)


class Brightness(Encoder):
    """A crop's angle is its brightness; `bright` lies at 1, `dark` and all else at 0."""

    size, scale = 8, 5.0

    def __init__(self):
        super().__init__([0.0] * 3, [1.0] * 3, "cpu")
        self.encoded = []

    def encode_images(self, pixels):
        self.encoded.append(pixels)
        angle = pixels.mean((1, 2, 3)) * math.pi / 2
        return 3 * torch.stack([angle.cos(), angle.sin()], 1)

    def encode_texts(self, texts):
        self.encoded.append(texts)
        return torch.tensor([[0.0, 2.0] if text == "bright" else [2.0, 0.0] for text in texts])


def example(phrase="bright", boxes=(BRIGHT,), category="b"):
    return Example("r", "r.png", 168, 168, phrase, boxes, category, "p", "s", "t", "train")


@pytest.fixture(scope="module")
def ask(base_folder: Path):
    """ask(box sets, example): a batch of one group about a film with a bright square on black."""
    processor = load_processor(base_folder, 28 * 28, 168 * 168)
    film = Image.new("RGB", (168, 168))
    film.paste((255, 255, 255), (20, 20, 60, 60))

    def make(*groups):
        made, answers = [], []
        for record, sets in groups:
            rollouts = tuple(Rollout(torch.zeros(1), torch.zeros(1), "", True) for _ in sets)
            made.append(Group(make_prompt(record, film, processor, "brief"), rollouts))
            # as `to_original` gives them
            answers.append([Answer(boxes and tuple(tuple(map(np.float64, box)) for box in boxes)) for boxes in sets])
        return batch_of(made, answers)

    return make


COSINE = RewardConfig(semantic_weight=1.0, encoder="phantom:x", semantic="cosine", crop_context=1.0)
CONTRAST = RewardConfig(semantic_weight=1.0, encoder="phantom:x", crop_context=1.0)
PRIOR = Prior({"b": "bright", "d": "dark"}, {"b": (1600 / 168**2, 3200 / 168**2)})


def test_cosine_of_the_crop(ask):
    half = (40.0, 20.0, 80.0, 60.0)
    sets = [
        (BRIGHT,),
        (DARK,),
        (half,),
        (BRIGHT, DARK),
        (),
        None,
        ((60.0, 60.0, 20.0, 20.0),),
        ((200.0, 0.0, 300.0, 9.0),),
    ]
    got = semantic_reward(ask((example(), sets)), Brightness(), COSINE, PRIOR)[0]
    want = torch.tensor([1, 0, math.sqrt(0.5), 0.5, 0, 0, 0, 0])
    torch.testing.assert_close(got, want, atol=0.02, rtol=0)


def test_context_widens_the_crop(ask):
    wide = RewardConfig(semantic_weight=1.0, encoder="phantom:x", semantic="cosine", crop_context=2.0)
    got = semantic_reward(ask((example(), [(BRIGHT,)])), Brightness(), wide, PRIOR)
    assert got[0, 0] == pytest.approx(math.sin(math.pi / 8), abs=0.02)  # a quarter of the crop is bright


def test_contrast_takes_a_better_fit_than_the_whole_image_of_the_right_size(ask):
    tiny = (38.0, 38.0, 42.0, 42.0)
    got = semantic_reward(ask((example(), [(BRIGHT,), (DARK,), (WHOLE,), (tiny,)])), Brightness(), CONTRAST, PRIOR)[0]

    def fit(brightness):
        angle = brightness * math.pi / 2
        bright, dark = math.exp(5 * math.sin(angle)), math.exp(5 * math.cos(angle))
        return bright / (bright + 2 * dark)  # against "dark" and "no bright"

    whole = fit(1600 / 168**2)
    want = [(1 + fit(1) - whole) / 2, (1 + fit(0) - whole) / 2, 0.5 * 3200 / 168**2, 0.01 * (1 + fit(1) - whole) / 2]
    torch.testing.assert_close(got, torch.tensor(want), atol=5e-3, rtol=0)


def test_what_the_whole_image_says_already_is_taken_off(ask):
    prior = Prior({"b": "bright", "d": "dark"}, {})
    got = semantic_reward(ask((example("dark", category="d"), [(DARK,), (BRIGHT,)])), Brightness(), CONTRAST, prior)
    # the film as a whole is dark: "dark" and "no dark" share it, "bright" has next to nothing
    assert got[0].tolist() == pytest.approx([0.5, 0.25], abs=0.02)


def test_what_is_not_there_earns_by_saying_so(ask):
    for config in (COSINE, CONTRAST):
        batch = ask((example(boxes=()), [(), (BRIGHT,), None]), (example(), [(BRIGHT,), (), ()]))
        got = semantic_reward(batch, Brightness(), config, PRIOR)
        assert got[0].tolist() == [1, 0, 0] and got[1, 0] > 0.9 and got[1, 1:].tolist() == [0, 0]
        nothing = ask((example(), [None, ()]))
        encoder = Brightness()
        assert semantic_reward(nothing, encoder, config, PRIOR).tolist() == [[0, 0]] and not encoder.encoded


def test_all_crops_of_a_step_go_through_at_once_and_phrases_once(ask):
    encoder = Brightness()
    batch = ask(*[(example(), [(BRIGHT,), (DARK, BRIGHT)])] * 3)
    first = semantic_reward(batch, encoder, CONTRAST, PRIOR)
    # two boxes of three completions each, once; the whole images; three phrases
    assert [len(part) for part in encoder.encoded] == [3 * 2 + 3, 3]
    assert torch.equal(first, first[:1].expand(3, -1))
    semantic_reward(batch, encoder, CONTRAST, PRIOR)
    assert len(encoder.encoded) == 3


@pytest.mark.parametrize("config", [COSINE, CONTRAST])
def test_a_box_said_twice_earns_nothing_the_second_time(ask, config):
    batch = ask((example(), [(BRIGHT,), (BRIGHT,) * 4, (BRIGHT, DARK), (BRIGHT, DARK, DARK)]))
    once, four, two, again = semantic_reward(batch, Brightness(), config, PRIOR)[0].tolist()
    assert four == pytest.approx(once / 4) and again == pytest.approx(two * 2 / 3)


def test_the_prior_of_training_records():
    records = [example(boxes=((0.0, 0.0, 16.8, 16.8 * (1 + i)),)) for i in range(5)]
    records += [example("dim", category="d"), example("dark", category="d"), example("dark", boxes=(), category="d")]
    prior = prior_of(records)
    assert prior.phrases == {"b": "bright", "d": "dark"}
    assert prior.areas["b"] == pytest.approx((0.012, 0.048)) and prior_of([]) == Prior({}, {})
