"""Parser and rewards on text that was never meant to be read: no exception, and never slower than a bound.

    python -m bench.fuzz_answers --count 1000000 --seed 0

Strings are random, or valid answers of every template that were mutated (pieces cut, doubled, swapped, characters
replaced), or pathological: deep nesting, long digits, open quotes and braces, many tags and many boxes. Every one is
read, and its boxes scored by every spatial reward and the format reward against a truth. A parse may take 1 ms for each
begun KB; what took longer is read twice more and the fastest counts, since the machine has other work.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm

from medground.answers import parse_answer, render_answer
from medground.config import RewardConfig
from medground.evaluate import read_answer
from medground.records import Example, Group, Prompt, Rollout
from medground.rewards.total import Scorer

BOUND = 1e-3
"""Seconds for each begun KB."""
GROUP = 64
LONGEST = 20_000  # characters of a pathological string
TRUTH = ((10.0, 10.0, 60.0, 50.0),)
PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "{", "}", "[", "]", '"bbox_2d"', "'bbox_2d'", ":", ",", '"', "'",
    "\\", "```json", "```", "no finding", "null", "NaN", "-Infinity", "1e999", "-0", "true", " ", "\n", "\x00",
    "\u2028", "\ud800", "9" * 30, '{"bbox_2d": [1, 2, 3, 4]}', "0.5", "label", "<", ">", "/",
)  # fmt: skip


class Found(NamedTuple):
    """What a run came to: how many strings, and of the slowest its seconds for each begun KB and its beginning."""

    count: int
    slowest: float
    text: str


def strings(count: int, seed: int) -> Iterator[str]:
    """The strings, by the seed."""
    draw = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (_random, _pieces, _mutated, _mutated, _mutated)
    for number in range(count):
        # one of fifty is pathological: they are long
        yield _pathological(draw) if number % 50 == 0 else draw.choice(kinds)(draw)


def fuzz(count: int, seed: int = 0, bound: float = BOUND) -> Found:
    """Read and score them all.

    Args:
        count: of strings.
        seed: that they come from.
        bound: seconds that a parse may take for each begun KB.

    Raises:
        ValueError: a parse raised, took too long, or a reward left its range; names the string's beginning.
    """
    scorers = [Scorer(RewardConfig(spatial=kind), "chain-of-box", 512) for kind in ("soft", "giou", "stepped")]
    slowest, slow, texts = 0.0, "", []
    with tqdm(total=count, desc="strings", unit="string") as bar:
        for number, text in enumerate(strings(count, seed)):
            took = _seconds(text)
            if took > bound:  # others run on this machine, too
                took = min(took, _seconds(text), _seconds(text))
            if took > bound:
                raise ValueError(f"seed {seed}, string {number}: want {bound} s a KB; got {took:.4f}: {text[:200]!r}")
            if took > slowest:
                slowest, slow = took, text[:80]
            texts.append(text)
            if len(texts) == GROUP or number == count - 1:
                _score(texts, scorers, seed, number)
                bar.update(len(texts))
                texts = []
    return Found(count, slowest, slow)


def _seconds(text: str) -> float:
    """Of a parse, for each begun KB."""
    start = time.thread_time()
    parse_answer(text)
    return (time.thread_time() - start) / (len(text) // 1024 + 1)


def _score(texts: list[str], scorers: list[Scorer], seed: int, number: int) -> None:
    none = torch.empty(0)
    example = Example("r", "a.png", 100, 80, "left mass", TRUTH, "mass", "p", "s", "t", "train")
    prompt = Prompt(example, none, none, none, none, (), 112, 84)
    group = Group(prompt, tuple(Rollout(none, none, text, True) for text in texts))
    answers = [[read_answer(text, prompt) for text in texts]]
    for scorer in scorers:
        rewards = scorer([group], answers)
        if not ((rewards.total >= 0) & (rewards.total <= 2)).all():
            worst = int(rewards.total.sub(1).abs().nan_to_num(torch.inf).argmax())
            raise ValueError(
                f"seed {seed}, up to string {number}: want 0..2; got {rewards.total[0, worst]}: {texts[worst]!r}"
            )


def _random(draw: random.Random) -> str:
    if draw.random() < 0.5:
        return "".join(draw.choices(string.printable, k=draw.randrange(200)))
    return "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(60)))


def _pieces(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randrange(40)))


def _valid(draw: random.Random) -> str:
    boxes = tuple(
        tuple(draw.uniform(-1e7, 1e7) if draw.random() < 0.02 else draw.uniform(-50, 200) for _ in range(4))
        for _ in range(draw.choice((0, 1, 1, 1, 2, 5)))
    )
    thought = draw.choice(("by the hilum", 'at {"bbox_2d": [1, 2, 3, 4], "label": "heart"}', ""))
    return render_answer(boxes, thought)  # type: ignore[arg-type]


def _mutated(draw: random.Random) -> str:
    text = _valid(draw)
    for _ in range(draw.choice((0, 1, 1, 2, 5))):
        a = draw.randrange(len(text) + 1)
        b = min(a + draw.choice((1, 2, 8, 200)), len(text))
        change = draw.randrange(5)
        if change == 0:
            text = text[:a] + text[b:]
        elif change == 1:
            text = text[:b] + text[a:b] + text[b:]
        elif change == 2:
            text = text[:a] + draw.choice(PIECES) + text[a:]
        elif change == 3:
            text = text[:a] + draw.choice(string.printable) + text[a + 1 :]
        else:
            text = text[a:b] + text[:a] + text[b:]
    return text


def _pathological(draw: random.Random) -> str:
    n = draw.randrange(1, LONGEST)
    unit = draw.choice(
        (*PIECES, '{"a":', "[[", "{'", '\\"', "'\\", ",]", ", ", "\t ,", '{"bbox_2d": [', "<think", "1e")
    )
    core = unit * max(1, n // len(unit))
    return draw.choice(
        (
            core,
            f"<answer>{core}</answer>",
            f"<think>{core}</think><answer>{core}</answer>",
            f'<think>a</think><answer>{{"bbox_2d": [{core}]}}</answer>',
            f"<think>{core}</think><answer>[{', '.join([str(draw.randrange(99))] * 8)}]</answer>",
            "<answer>[" + ", ".join(['{"bbox_2d": [1, 2, 30, 40]}'] * min(n // 30 + 1, 60)) + "]</answer>",
        )
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_answers", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    found = fuzz(args.count, args.seed)
    print(
        f"{found.count} strings, no exception; the slowest took {found.slowest * 1e3:.3f} ms a KB ({found.text!r}); "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
