"""A sample of what `python -m bench.fuzz_answers` reads and scores; nothing here looks at how fast anything was."""

import math

import pytest

from bench.fuzz_answers import fuzz, strings
from medground.answers import parse_answer


def test_text_that_was_never_meant_to_be_read():
    found = fuzz(10_000, seed=1, bound=math.inf)
    assert found.count == 10_000 and found.slowest > 0


def test_the_strings_are_of_all_kinds():
    some = list(strings(2000, seed=0))
    assert some == list(strings(2000, seed=0)) != list(strings(2000, seed=1))
    answers = [parse_answer(text) for text in some]
    assert sum(answer.boxes is None for answer in answers) > 500 and sum(bool(a.boxes) for a in answers) > 300
    problems = {problem for answer in answers for problem in answer.problems}
    assert len(problems) == 7 and any(len(a.boxes or ()) > 30 for a in answers) and max(map(len, some)) > 10_000


def test_what_is_too_slow_is_named():
    with pytest.raises(ValueError, match=r"seed 0, string 0: want 0.0 s a KB; got "):
        fuzz(10, bound=0.0)
