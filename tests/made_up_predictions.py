"""Files of predictions with made-up rows, as tests of scoring read them."""

import json


def row(name="a", truth=((10, 10, 50, 50),), boxes=((10, 10, 50, 50),), **others):
    """A line of a predictions file (docs/run_folder.md)."""
    truth, boxes = [list(box) for box in truth], None if boxes is None else [list(box) for box in boxes]
    line = {"id": name, "image": "images/a.png", "width": 100, "height": 80, "phrase": "left nodule"}
    line |= {"category": "nodule", "patient": f"patient of {name}", "truth": truth, "boxes": boxes}
    return line | others


def write_rows(path, rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def some_rows():
    """Twelve answers of all kinds."""
    rows = [row(f"r{i}", boxes=((10 + i, 10, 50 + i, 50),), patient=f"p{i // 2}", phrase=p) for i, p in enumerate(
        ("left nodule", "right mass", "mass", "left effusion")
    )]  # fmt: skip
    rows += [row("two", ((0, 0, 20, 20), (50, 50, 90, 70)), ((50, 50, 90, 70),), category="effusion")]
    rows += [row("more", boxes=((10, 10, 50, 50), (60, 60, 70, 70)), category="effusion")]
    rows += [row("absent", (), ()), row("false alarm", (), ((1, 2, 30, 40),)), row("empty", boxes=())]
    rows += [row("unreadable", boxes=None), row("inverted", boxes=((50, 50, 10, 10),)), row("tiny", ((1, 1, 4, 4),))]
    return rows
