"""Answers in many dresses, what is said of each, and text that was never meant to be read."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medground.answers import parse_answer, render_answer

GOOD = [
    ('{"bbox_2d": [1, 2, 3, 4]}', ((1, 2, 3, 4),)),
    ('{"bbox_2d": [1.5, -2, 3e1, 4.25], "label": "nodule"}', ((1.5, -2, 30, 4.25),)),
    ('[{"bbox_2d": [1, 2, 3, 4]}]', ((1, 2, 3, 4),)),
    ('[{"bbox_2d": [1, 2, 3, 4]}, {"label": "x", "bbox_2d": [5, 6, 7, 8]}]', ((1, 2, 3, 4), (5, 6, 7, 8))),
    ('\n```json\n{"bbox_2d": [1, 2, 3, 4]}\n```\n', ((1, 2, 3, 4),)),
    ("[]", ()),
    ('```\n[{"bbox_2d": [1, 2, 3, 4]}]```', ((1, 2, 3, 4),)),
    ('{"bbox_2d": [-1.5E-1, 2, 3, 4e+2], "label": "it\'s, ]"}', ((-0.15, 2, 3, 400),)),
]
LOOSE = [  # readable, and no JSON
    ("{'bbox_2d': [1, 2, 3, 4], 'label': 'left \\'upper\\' \"zone\"'}", ((1, 2, 3, 4),)),
    ('{"bbox_2d": [1, 2, 3, 4,], }', ((1, 2, 3, 4),)),
    ("[{'bbox_2d': [1, 2, 3, 4 , ]},\n{'bbox_2d': [5, 6, 7, 8]},\n]", ((1, 2, 3, 4), (5, 6, 7, 8))),
    ('```json {"bbox_2d": [1, 2, 3, 4], "label": "a, ]",}```', ((1, 2, 3, 4),)),
    ("no finding", ()),
    ("No findings.", ()),
    ('"no finding"', ()),
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
    "null",
    "{'bbox_2d': [1, 2, 3, 4]",
    "{'bbox_2d: [1, 2, 3, 4]}",
    '{"bbox_2d": [1, 2, 3, 4]} {"bbox_2d": [1, 2, 3, 4]}',
    '{"bbox_2d": [1, 2, 3, 1000000]}',
    '{"bbox_2d": [1, 2, 3, -1e6]}',
    "[" * 100_000,
    "9" * 100_000,
]


@pytest.mark.parametrize(("answer", "boxes"), GOOD)
def test_good_answers(answer, boxes):
    got = parse_answer(f"<think>by the hilum</think>\n<answer>{answer}</answer>")
    assert got.boxes == boxes and got.well_formed


@pytest.mark.parametrize(("answer", "boxes"), LOOSE)
def test_loose_answers_are_read_and_are_not_the_form(answer, boxes):
    got = parse_answer(f"<think>by the hilum</think><answer>{answer}</answer>")
    assert got.boxes == boxes and not got.well_formed and "not JSON" in got.problems


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


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", {"no answer", "structure", "no thought box"}),
        ("<answer>[]", {"no answer", "structure", "no thought box"}),
        ("<think>a</think><answer>[]</answer>", {"no thought box"}),
        ("<think>a</think><answer>[]</answer> <answer>", {"several answers", "structure", "no thought box"}),
        ("<think>a</think><answer>{}</answer>", {"no box", "no thought box"}),
        ("<think>a</think><answer>[1,]</answer>", {"not JSON", "no box", "no thought box"}),
        ("a</think><answer>[]</answer>", {"structure", "no thought box"}),
        ("<think>a<answer>[]</answer>", {"structure", "no thought box"}),
        ("<think>a</think> so <answer>[]</answer>", {"structure", "no thought box"}),
        ("<think>a</answer></think><answer>[]</answer>", {"structure", "no thought box"}),
        ("<think>a</think><answer><b>[]</answer>", {"structure", "no box", "not JSON", "no thought box"}),
    ],
)
def test_problems_are_named(text, problems):
    assert set(parse_answer(text).problems) == problems


def test_labels_are_kept():
    items = (
        '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4], "label": 7}]'
    )
    assert parse_answer(f"<answer>{items}</answer>").labels == ("a", "", "")


def chained(thought):
    return parse_answer(f'<think>{thought}</think><answer>{{"bbox_2d": [1, 2, 3, 4]}}</answer>')


BOX = '{"bbox_2d": [5, 6, 7.5, 8], "label": "heart"}'


def test_boxes_of_the_thought():
    got = chained(f"the heart {BOX} and, [sic], the base {BOX}.")
    assert got.thought_boxes == ((5, 6, 7.5, 8),) * 2 and got.chained and got.well_formed
    assert got.boxes == ((1, 2, 3, 4),)
    without = chained("the heart")
    assert without.thought_boxes == () and without.well_formed and not without.chained


@pytest.mark.parametrize(
    "thought",
    [
        "{'bbox_2d': [5, 6, 7, 8]}",
        '{"bbox_2d": [5, 6, 7]}',
        '{"bbox_2d": [7, 6, 5, 8]}',
        '{"bbox_2d": [5, 8, 7, 8]}',
        '{"box": [5, 6, 7, 8]}',
        '{"bbox_2d": [5, 6, 7, 8]',
        '"bbox_2d": [5, 6, 7, 8]}',
        "[5, 6, 7, 8]",
        "[ -5, 6, 7, 8]",
        "bbox_2d",
        "}",
        "{}",
    ],
)
def test_a_malformed_box_in_the_thought_is_seen(thought):
    for text in (f"{BOX} {thought}", f"{thought} {BOX}"):
        got = chained(text)
        assert "malformed thought box" in got.problems and got.well_formed and not got.chained, text
        assert got.boxes == ((1, 2, 3, 4),)


def test_a_box_in_the_thought_is_no_answer():
    got = parse_answer(f"<think>{BOX}</think>")
    assert got.boxes is None and got.thought_boxes == ((5, 6, 7.5, 8),)


def sane(text):
    got = parse_answer(text)
    boxes = (got.boxes or ()) + got.thought_boxes
    assert all(len(box) == 4 and all(type(v) is float and math.isfinite(v) for v in box) for box in boxes)
    assert len(got.labels) == len(got.boxes or ()) and len(set(got.problems)) == len(got.problems)
    assert got.boxes is not None or got.problems
    return got


@given(st.text(alphabet="<>/thinkaswer[]{}\"'bo_2d:,0123456789.-e \n\\`", max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_parser(text):
    for wrapped in (text, f"<answer>{text}</answer>", f"<think>{text}</think><answer>{text}</answer>"):
        sane(wrapped)


PARTS = ["<think>", "</think>", "<answer>", "</answer>", "```", "```json", '{"bbox_2d":', "[1, 2, 3, 4]", "}", "{", "]"]
PARTS += ["[", ",", "'", '"', "\\", " ", "\n", "1e999", "-", "NaN", "label", "\x00", "\ud800", "no finding", "\uff19"]


def test_random_and_mutated_answers():
    random.seed(0)
    good = f'<think>the heart {BOX}</think>\n<answer>[{BOX}, {{"bbox_2d": [1, 2, 3, 4]}}]</answer>'
    assert sane(good).chained
    for _ in range(20_000):
        text = list(good) if random.random() < 0.6 else random.choices(PARTS, k=random.randrange(30))
        for _ in range(random.randrange(1, 5)):
            at = random.randrange(len(text) + 1)
            text[at : at + random.randrange(3)] = random.choices(PARTS, k=random.randrange(2))
        sane("".join(text))


SEEDS = [
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "[",
    "{",
    '"',
    "'",
    '\\"',
    "\\'",
    ",",
    ", ",
    " ",
    "\n",
    "9",
    "[1",
    "-",
]
SEEDS += ["[ ", "```", "{}", '{"bbox_2d": [1, 2, 3, 4]}', '"bbox_2d"', "{'a',", '",', "[1,", "<", "1e5,", "\t,\t"]


@pytest.mark.parametrize("frame", ["<think>{}</think><answer>{}</answer>", "<answer>'{}"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_megabyte_is_read(seed, frame):
    # a tenth of a second; what grows with the square of the length would take hours
    text = seed * (2**19 // len(seed))
    got = parse_answer(frame.replace("{}", text))
    assert got.boxes is None or seed == '{"bbox_2d": [1, 2, 3, 4]}' or not text.strip()


@given(st.lists(st.tuples(*[st.integers(0, 2000)] * 4), max_size=4))
@settings(max_examples=100, deadline=None)
def test_rendered_answers_are_read_back(boxes):
    text = render_answer(tuple(tuple(map(float, box)) for box in boxes), "upper left")
    got = parse_answer(text)
    assert got.well_formed and got.boxes == tuple(boxes)
    json.loads(text.partition("<answer>")[2].partition("</answer>")[0])
