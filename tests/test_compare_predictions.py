"""`medground eval compare`: differences, intervals that pair, files that do not belong together."""

import json
import random

import numpy as np
import pytest
from made_up_predictions import row, some_rows, write_rows
from slow_scoring import slow_metrics

from medground.cli import main
from medground.scoring.compare import compare
from medground.scoring.reading import read_predictions


@pytest.fixture
def files(tmp_path):
    """A function that writes two files of rows, and gives their paths."""
    return lambda a, b: (write_rows(tmp_path / "a.jsonl", a), write_rows(tmp_path / "b.jsonl", b))


def moved(rows, by):
    return [line | {"boxes": line["boxes"] and [[v + by for v in box] for box in line["boxes"]]} for line in rows]


def test_differences_are_those_of_the_metrics(files):
    a, b = files(some_rows(), moved(some_rows(), 3)[::-1])
    found = compare(a, b, resamples=200)
    first, second = (slow_metrics(list(read_predictions(path))) for path in (a, b))
    assert found["n"] == 12 and found["metrics"].keys() == first.keys()
    for name, e in found["metrics"].items():
        assert (e["a"], e["b"]) == (pytest.approx(first[name][0]), pytest.approx(second[name][0]))
        assert e["difference"] == pytest.approx(second[name][0] - first[name][0])
        assert e["low"] <= e["high"] and (e["n"], e["n_b"]) == (first[name][1], second[name][1])
    assert found["metrics"]["miou"]["difference"] < 0


def test_the_interval_pairs_patients(files):
    rng = random.Random(0)
    a, b, ious = [], [], []
    for i in range(150):  # patients' records are hard or easy for both; B is a little worse each time
        width = rng.uniform(5, 40)
        for k in range(1 + i % 3):
            name = f"{i}-{k}"
            less = width - rng.uniform(0, 2)
            a.append(row(name, boxes=((10, 10, 10 + width, 50),), patient=str(i)))
            b.append(row(name, boxes=((10, 10, 10 + less, 50),), patient=str(i)))
            ious.append((i, width / 40, less / 40))
    found = compare(*files(a, b), resamples=4000)["metrics"]["miou"]
    who, before, after = (np.array(column) for column in zip(*ious, strict=True))
    draw = np.random.default_rng(1)
    sums = np.array([[(after - before)[who == i].sum(), (who == i).sum()] for i in range(150)])
    drawn = [sums[draw.integers(150, size=150)].sum(0) for _ in range(4000)]
    low, high = np.percentile([total / count for total, count in drawn], [2.5, 97.5])
    assert found["low"] == pytest.approx(low, abs=0.08 * (high - low))
    assert found["high"] == pytest.approx(high, abs=0.08 * (high - low))
    assert found["high"] < 0


def test_a_metric_that_a_side_lacks_has_no_difference(files):
    found = compare(*files([row("a")], [row("a", boxes=())]), resamples=20)["metrics"]["precision@0.5"]
    assert found == {"a": 1, "b": None, "difference": None, "low": None, "high": None, "n": 1, "n_b": 0}


def test_the_mean_of_several_answers_is_compared(files):
    found = compare(*files([row("a"), row("b")], [row("b"), *(row("a", boxes=(), sample=k) for k in range(3))]), 20)
    assert (found["n"], found["metrics"]["miou"]["b"], found["metrics"]["miou"]["difference"]) == (2, 0.5, -0.5)


def test_the_command_prints_a_table_or_json(files, capsys):
    a, b = files(some_rows(), moved(some_rows(), 3))
    assert main(["eval", "compare", str(a), str(b), "--resamples", "20"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"A: {a}\nB: {b}\n12 records, 10 patients") and "B - A" in text
    assert main(["eval", "compare", str(a), str(b), "--resamples", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare(a, b, 20)


def test_ids_that_either_side_lacks_are_listed(files, capsys):
    a, b = files([row("both"), row("only a")], [row("both"), *(row(f"only b {i}") for i in range(30))])
    assert main(["eval", "compare", str(a), str(b)]) == 2
    out = capsys.readouterr()
    assert out.out == "" and f"{b}: 1 ids are missing that {a} has: 'only a'" in out.err
    assert f"{a}: 30 ids are missing" in out.err and "'only b 19' and 10 more" in out.err


@pytest.mark.parametrize("change", [{"truth": [[1, 1, 2, 2]]}, {"truth": []}, {"patient": "another"}])
def test_records_that_differ_are_listed(files, change):
    with pytest.raises(ValueError, match=r"same true boxes and patients.* differ in 1 records: 'b'"):
        compare(*files([row("a"), row("b")], [row("a"), row("b") | change]), 20)


def test_mistakes_are_named(files, tmp_path):
    a, b = files([row("a")], [row("a") | {"width": "wide"}])
    with pytest.raises(ValueError, match=r"b\.jsonl:1: width: want a whole number"):
        compare(a, b)
    with pytest.raises(ValueError, match=r"--resamples: want >= 1; got 0"):
        compare(a, a, 0)
    twice = write_rows(tmp_path / "c.jsonl", [row("a", sample=0), row("a", (), sample=1)])
    with pytest.raises(ValueError, match=r"c\.jsonl: record 'a': want one truth"):
        compare(a, twice)
