"""Completion text -> Answer: the only parser, for training and evaluation alike.

Reading is lenient, so that a box is scored wherever one can be read; everything that departs from the form is listed
(`Answer.problems`), and the format reward looks at that list. Every step is one pass over the text: find, split, or a
regular expression without a way back, so that time grows with the length and with nothing else.
"""

import json
import re
from collections.abc import Iterator

from medground.records import Answer, Box, Problem

LARGEST = 1e6
"""Coordinates are smaller than this, in pixels; larger ones, NaN and infinities are no coordinates."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_TAGS = ("<think>", "</think>", _OPEN, _CLOSE)
_NOTHING = ("no finding", "no findings")
_TOKEN = re.compile(  # what lenient reading changes: strings in single quotes, commas before a bracket
    r"""("[^"\\]*+(?:\\.[^"\\]*+)*+"?)|'([^'\\]*+(?:\\.[^'\\]*+)*+)'?|,(?=\s*+[\]}])""", re.DOTALL
)
_BARE_NUMBERS = re.compile(r"\[\s*+[-+.\d]")


def parse_answer(text: str) -> Answer:
    """Read a completion; never raises, in time linear in its length.

    The answer is what stands between the one pair of <answer> tags: JSON, bare or fenced, of one object
    {"bbox_2d": [x1, y1, x2, y2], "label": "..."} or a list of such; the empty list, or the words "no finding", say
    that there is nothing. Other keys of an object are ignored. Single quotes and trailing commas are read, too, but
    are no JSON. Two answers are no answer. Boxes may be inverted or lie outside the image: the spatial reward sees to
    that.

    Returns:
        Boxes as they were said, in the coordinates that the model speaks.
    """
    problems: list[Problem] = []
    block = _answer_block(text, problems)
    boxes, labels = _read_block(block, problems) if block is not None else (None, ())
    thought = _thought(text, problems)
    if thought is None:
        thought = text.partition("<think>")[2].partition("</think>")[0]
    return Answer(boxes, labels, tuple(_thought_boxes(thought, problems)), tuple(dict.fromkeys(problems)))


def render_answer(boxes: tuple[Box, ...], thought: str) -> str:
    """The completion that `parse_answer` reads back: boxes in the model's coordinates, rounded to integers."""
    items = ", ".join(map(render_box, boxes))
    answer = items if len(boxes) == 1 else f"[{items}]"
    return f"<think>{thought}</think><answer>{answer}</answer>"


def render_box(box: Box) -> str:
    """A box as answers and thoughts name it: in the model's coordinates, rounded to integers."""
    return '{"bbox_2d": [' + ", ".join(str(round(v)) for v in box) + "]}"


def _answer_block(text: str, problems: list[Problem]) -> str | None:
    """What stands in the one pair of <answer> tags."""
    start = text.find(_OPEN)
    end = text.find(_CLOSE, start)
    if start < 0 or end < 0:
        problems.append("no answer")
        return None
    if text.find(_OPEN, start + len(_OPEN)) >= 0:
        problems.append("several answers")
        return None
    return text[start + len(_OPEN) : end]


def _thought(text: str, problems: list[Problem]) -> str | None:
    """What was thought, of a text that is <think>...</think><answer>...</answer> and nothing else; else None."""
    text = text.strip()
    thought, ended, answer = text.removeprefix("<think>").partition("</think>")
    answer = answer.lstrip()
    framed = text.startswith("<think>") and ended and answer.startswith(_OPEN) and answer.endswith(_CLOSE)
    if not framed or any(tag in thought for tag in _TAGS) or "<" in answer[len(_OPEN) : -len(_CLOSE)]:
        problems.append("structure")
        return None
    return thought


def _read_block(block: str, problems: list[Problem]) -> tuple[tuple[Box, ...] | None, tuple[str, ...]]:
    """Boxes and labels of an answer; (None, ()) where it has no meaning."""
    block = _unfenced(block.strip())
    value = _load(block)
    if value is None:
        problems.append("not JSON")
        value = _load(_TOKEN.sub(_as_json, block))
    if (value if isinstance(value, str) else block).strip(" \t\n.\"'").lower() in _NOTHING:
        problems.append("not JSON")
        return (), ()
    items = value if isinstance(value, list) else [value]
    found = [_read_box(item) for item in items]
    boxes = tuple(box for box in found if box is not None)
    if len(boxes) < len(found):
        problems.append("no box")
        return None, ()
    said = (item.get("label") if isinstance(item, dict) else None for item in items)
    return boxes, tuple(label if isinstance(label, str) else "" for label in said)


def _unfenced(block: str) -> str:
    if len(block) >= 6 and block.startswith("```") and block.endswith("```"):
        return block[3:-3].removeprefix("json").strip()
    return block


def _load(text: str) -> object:
    """The value of a JSON text; None where it is not JSON, or null."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # too deep, too many digits
        return None


def _as_json(token: re.Match[str]) -> str:
    double, single = token.groups()
    if double is not None:
        return double
    if single is not None:
        return '"' + single.replace("\\'", "'").replace('"', '\\"') + '"'
    return ""  # a trailing comma


def _read_box(item: object) -> Box | None:
    box = item.get("bbox_2d") if isinstance(item, dict) else None
    if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):
        return None
    if not all(abs(v) < LARGEST for v in box):
        return None
    x1, y1, x2, y2 = (float(v) for v in box)
    return (x1, y1, x2, y2)


def _thought_boxes(thought: str, problems: list[Problem]) -> Iterator[Box]:
    """The boxes named while thinking: objects as in an answer, each of positive width and height.

    Anything else that looks like a box is a malformed one: another object, numbers in brackets of their own, a key
    without its object. No braces may stand in a label.
    """
    prose, *objects = thought.split("{")
    rest, count = [prose], 0
    for text in objects:
        body, closed, after = text.partition("}")
        rest.append(after)
        box = _read_box(_load("{" + body + "}")) if closed else None
        if box is None or not (box[0] < box[2] and box[1] < box[3]):
            problems.append("malformed thought box")
        else:
            count += 1
            yield box
    if any("bbox_2d" in part or "}" in part or _BARE_NUMBERS.search(part) for part in rest):
        problems.append("malformed thought box")
    if not count:
        problems.append("no thought box")
