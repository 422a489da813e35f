"""Result files of VLM-R1 and MedGround-R1 -> columns, and whether their own figures follow from their boxes.

    {"accuracy": per cent, "results": [{"question", "ground_truth": [x1, y1, x2, y2], "model_output",
                                        "extracted_answer": [x1, y1, x2, y2] or null, "correct": 0 or 1}]}

`accuracy`, `model_output`, `correct` and `image` may be missing. An answer of four zeros is how VLM-R1 writes that it
found no box: unreadable. `question` is a text, or the example itself with `problem` and `image`. There are no image
sizes, so there is no `side` and no table by size; and no categories. Records are clustered by patient where `image` is
a path of MIMIC-CXR, else by image, else each is alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medground.datasets.faults import Faults
from medground.datasets.json_items import read_json
from medground.records import Box
from medground.scoring.columns import Builder
from medground.scoring.overlap import MATCHED, overlap
from medground.scoring.reading import Loaded

SHOWN = 20  # results that disagree, listed; the rest are counted
_PHRASE = re.compile(r"the region this sentence describes:\s*(.*?)\.?\s*(?:First output .*)?$", re.DOTALL)
_MIMIC = re.compile(r"(?:^|/)p(\d{8})/s\d{8}/")


def read_vlm_r1(path: Path) -> Loaded:
    """The results of a file; `claims` has its `accuracy` and `correct`, for `check_claims`.

    Raises:
        ValueError: no such file, or not in this form; names the results that are not.
    """
    value = read_json(path)
    results = value.get("results") if isinstance(value, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError(f"{path}: results: want an object with a list of results; got {_kind(value, results)}")
    faults, builder = Faults(), Builder()
    accuracy = value.get("accuracy")
    if accuracy is not None and type(accuracy) not in (int, float):
        faults.add(str(path), "accuracy", "a number, in per cent", accuracy)
    images = [_image(result) for result in results]
    cluster = "record" if not all(images) else "patient" if all(map(_MIMIC.search, images)) else "image"
    correct = []
    for index, (result, image) in enumerate(zip(results, images, strict=True)):
        where = f"{path}: results[{index}]"
        if not isinstance(result, dict):
            faults.add(where, "result", "an object", result)
            continue
        question, truth, boxes = _parse(where, result, faults)
        correct.append(_correct(where, result, faults))
        if not len(faults):
            mimic = _MIMIC.search(image)
            who = {"record": str(index), "image": image, "patient": mimic[1] if mimic else ""}[cluster]
            builder.add(f"results[{index}]", who, "", question, (0, 0), [truth], boxes)
    faults.raise_if_any(path, "docs/evaluation.md")
    notes = ["no image sizes in this format: no `side`, no table by size"]
    if cluster != "patient":
        notes.append(f"no patients in this file: intervals resample {cluster}s, and may be too narrow")
    return Loaded(builder.columns(), notes=notes, claims={"cluster": cluster, "accuracy": accuracy, "correct": correct})


def check_claims(loaded: Loaded) -> dict[str, Any]:
    """What the file says of itself beside what its boxes come to.

    Returns:
        {"accuracy": {"file", "boxes": acc@0.5 in per cent, "agrees", "text"}, "correct": {"disagree": how many results,
        "explained": how many of them VLM-R1's own IoU explains, "first": the first 20 as {"result", "correct", "iou"},
        "text"}}, each only where the file has it.
    """
    iou = overlap(loaded.columns).iou
    out: dict[str, Any] = {}
    accuracy, flags = loaded.claims["accuracy"], loaded.claims["correct"]
    if accuracy is not None:
        ours = 100 * float((iou > MATCHED).mean())
        agrees = abs(ours - accuracy) < 0.006  # two decimals
        text = f"{accuracy:.4f} %; its boxes give {ours:.4f} %{'' if agrees else ': they disagree'}"
        out["accuracy"] = {"file": accuracy, "boxes": ours, "agrees": agrees, "text": text}
    given = [index for index, flag in enumerate(flags) if flag is not None]
    if not given:
        return out
    claimed = np.array([bool(flags[index]) for index in given])
    off = np.flatnonzero(claimed != (iou[given] > MATCHED))
    simple = np.array([np.diff(at).max() <= 1 for at in (loaded.columns.boxes_at, loaded.columns.truth_at)]).all()
    legacy = overlap(loaded.columns, legacy=True).iou if simple else iou
    explained = int((claimed[off] == (legacy[given][off] > MATCHED)).sum())
    first = [
        {"result": given[i], "correct": int(claimed[i]), "iou": float(iou[given[i]])} for i in off[:SHOWN].tolist()
    ]
    text = f"agrees with its boxes in {len(given) - len(off)} of {len(given)} results"
    if first:
        text += f"; VLM-R1's own IoU explains {explained} of the other {len(off)}:"
        text += "".join(f"\n  results[{f['result']}] says {f['correct']}, IoU {f['iou']:.3f}" for f in first)
        text += f"\n  and {len(off) - SHOWN} more" if len(off) > SHOWN else ""
    out["correct"] = {"disagree": len(off), "explained": explained, "first": first, "text": text}
    return out


def _parse(where: str, result: Mapping[str, Any], faults: Faults) -> tuple[str, Box, Sequence[Box] | None]:
    for name in ("question", "ground_truth", "extracted_answer"):
        if name not in result:
            wanted = "question, ground_truth, extracted_answer"
            faults.say(f"{where}: {name}: missing; a result has {wanted}")
    question = result.get("question", "")
    question = question.get("problem", "") if isinstance(question, dict) else question
    if not isinstance(question, str):
        faults.add(where, "question", "a text, or an object with `problem`", question)
        question = ""
    phrase = _PHRASE.search(question)
    truth = _numbers(result.get("ground_truth", [0, 0, 1, 1]))
    if truth is None or not (truth[0] < truth[2] and truth[1] < truth[3]):
        faults.add(where, "ground_truth", "four numbers [x1, y1, x2, y2], x1 < x2, y1 < y2", result["ground_truth"])
    answer = result.get("extracted_answer")
    several = answer if isinstance(answer, list) and answer and isinstance(answer[0], list) else [answer]
    boxes = None if answer is None else [_numbers(box) for box in several]
    if boxes is not None and None in boxes:
        faults.add(where, "extracted_answer", "four numbers [x1, y1, x2, y2], a list of such, or null", answer)
    if boxes == [(0.0, 0.0, 0.0, 0.0)]:
        boxes = None
    return phrase[1] if phrase else question, truth or (0.0, 0.0, 1.0, 1.0), boxes  # type: ignore[return-value]


def _correct(where: str, result: Mapping[str, Any], faults: Faults) -> bool | None:
    value = result.get("correct")
    if value is not None and value not in (0, 1):
        faults.add(where, "correct", "0, 1, true or false", value)
        return None
    return None if value is None else bool(value)


def _numbers(value: Any) -> Box | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(type(v) in (int, float) and abs(v) < 1e9 for v in value):
        return None
    a, b, c, d = (float(v) for v in value)
    return a, b, c, d


def _image(result: Any) -> str:
    """The path of the image, "" where the file does not say."""
    if not isinstance(result, dict):
        return ""
    question = result.get("question")
    image = result.get("image", question.get("image") if isinstance(question, dict) else None)
    return image if isinstance(image, str) else ""


def _kind(value: Any, results: Any) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    return f"an object with {', '.join(map(repr, value)) or 'nothing'}" if results is None else repr(results)[:60]
