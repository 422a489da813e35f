"""The metrics of medground/scoring/measures.py once more, a record at a time, in plain Python: what tests compare with.

Matchings are found by trying them all, so that sets have to be small.
"""

import itertools
import math
import re


def valid(box):
    return all(math.isfinite(v) for v in box) and box[0] < box[2] and box[1] < box[3] and math.isfinite(area(box))


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def slow_iou(a, b):
    if not valid(a) or not valid(b):
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = width * height if width > 0 and height > 0 else 0.0
    return shared / (area(a) + area(b) - shared)


def slow_giou(a, b):
    if not valid(a) or not valid(b):
        return -1.0
    around = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    union = area(a) + area(b) - (width * height if width > 0 and height > 0 else 0.0)
    return slow_iou(a, b) - (around - union) / around


def vlm_r1_iou(a, b):
    """As VLM-R1 writes it; 0 where it divides by zero."""
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2] - 1, b[2] - 1), min(a[3] - 1, b[3] - 1)
    shared = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


def best_sum(pred, truth, worth):
    """Largest sum of `worth` over all ways to pair the smaller set with boxes of the larger."""
    few, many = sorted((pred, truth), key=len)
    return max(
        sum(worth(few[i], many[j]) for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(len(many)), len(few))
    )


def set_scores(p):
    """(set IoU, set GIoU, matched boxes) of a prediction."""
    pred, truth = p.boxes, p.truth
    if pred is None:
        return 0.0, -1.0, 0
    if not pred or not truth:
        return (1.0, 1.0, 0) if len(pred) == len(truth) else (0.0, -1.0, 0)
    larger, left_over = max(len(pred), len(truth)), abs(len(pred) - len(truth))
    iou = best_sum(pred, truth, slow_iou) / larger
    giou = (best_sum(pred, truth, slow_giou) - left_over) / larger
    return iou, giou, best_sum(pred, truth, lambda a, b: slow_iou(a, b) > 0.5)


def centre(boxes):
    if not boxes or not valid(boxes[0]):
        return None
    return (boxes[0][0] + boxes[0][2]) / 2, (boxes[0][1] + boxes[0][3]) / 2


def side_of(p):
    """1 where the answer is on the truth's side, 0 where not, None where there is no such question."""
    words = set(re.findall("[a-z]+", p.phrase.lower())) & {"left", "right"}
    truth, answer = centre(p.truth), centre(p.boxes)
    if len(words) != 1 or truth is None or truth[0] == p.width / 2:
        return None
    if answer is None or answer[0] == p.width / 2:
        return 0
    return int((answer[0] < p.width / 2) == (truth[0] < p.width / 2))


def hit(p):
    point = centre(p.boxes)
    return point is not None and any(b[0] <= point[0] <= b[2] and b[1] <= point[1] <= b[3] for b in p.truth)


def slow_metrics(predictions):
    """{metric: (value, n)}, value None where n is 0."""
    present = [p for p in predictions if p.truth]
    every = [set_scores(p) for p in predictions]
    scores = [score for p, score in zip(predictions, every, strict=True) if p.truth]
    matched = sum(count for _, _, count in every)
    predicted = sum(len(p.boxes or ()) for p in predictions)
    true = sum(len(p.truth) for p in predictions)
    lists = {
        "miou": [iou for iou, _, _ in scores],
        "acc@0.3": [iou > 0.3 for iou, _, _ in scores],
        "acc@0.5": [iou > 0.5 for iou, _, _ in scores],
        "acc@0.7": [iou > 0.7 for iou, _, _ in scores],
        "side": [side for p in present if (side := side_of(p)) is not None],
        "centre_hit": [hit(p) for p in present],
        "absent": [p.boxes == () for p in predictions if not p.truth],
        "false_empty": [p.boxes == () for p in present],
        "parse_failures": [p.boxes is None for p in predictions],
        "giou": [giou for _, giou, _ in scores],
    }
    found = {name: (sum(values) / len(values) if values else None, len(values)) for name, values in lists.items()}
    for name, over, below in (
        ("precision@0.5", matched, predicted),
        ("recall@0.5", matched, true),
        ("f1@0.5", 2 * matched, predicted + true),
    ):
        found[name] = (over / below if below else None, below)
    return found


def slow_size(p):
    """small, medium, large or None."""
    if not p.truth:
        return None
    share = sum(area(box) for box in p.truth) / len(p.truth) / (p.width * p.height)
    return "small" if share < 0.01 else "medium" if share < 0.1 else "large"
