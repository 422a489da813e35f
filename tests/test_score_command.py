"""`medground score` of our own files: what it prints, what it refuses, what it writes for others."""

import csv
import gzip
import json

import pytest
from made_up_predictions import row, some_rows, write_rows

from medground.cli import main
from medground.scoring import score
from medground.scoring.reading import find_predictions, read_columns, read_predictions


def scored(capsys, *words):
    """The object that --json prints, which is all of standard output."""
    assert main(["score", *map(str, words), "--json", "--resamples", "50"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    """What the command says on standard error; nothing on standard output."""
    assert main([*map(str, words)]) == 2
    out = capsys.readouterr()
    assert out.out == "" and "Traceback" not in out.err
    return out.err


def test_json_has_the_headline_and_everything_that_score_gives(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", some_rows())
    found = scored(capsys, path)
    want = score(list(read_predictions(path)), resamples=50)
    assert found["n"] == found["answers"] == 12 and found["clusters"] == 10 and found["cluster"] == "patient"
    assert found["miou"] == want["metrics"]["miou"]["value"] and 0 < found["miou"] < 1
    assert found["acc@0.5"] == want["metrics"]["acc@0.5"]["value"]
    assert want == {name: found[name] for name in want}
    assert set(found["by_size"]) == {"small", "medium", "large"} and set(found["by_category"]) == {"nodule", "effusion"}


def test_text_is_a_table(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", some_rows())
    assert main(["score", str(path), "--resamples", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "12 records, 10 patients" in lines[0]
    table = lines[3 : lines.index("", 3)]
    assert {len(line) for line in table} == {len(table[0])} and table[1].split()[0] == "miou"
    assert [line.split()[0] for line in lines if line.startswith(("side", "size", "category"))]


def test_fields_that_are_not_used_and_an_iou_that_is_off_are_noted(tmp_path, capsys):
    rows = [row("a", iou=1.0, mood="good"), row("b", iou=0.3)]
    found = scored(capsys, write_rows(tmp_path / "a.jsonl", rows))
    assert found["miou"] == 1
    assert "field 'mood', which 1 lines" in found["notes"][0]
    assert "not that of its boxes in 1 lines (first: 'b', 0.300)" in found["notes"][1]


def test_several_answers_give_mean_and_best(tmp_path, capsys):
    rows = [row("a", sample=0), row("a", boxes=(), sample=1), row("b", sample=0), row("b", sample=1)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = scored(capsys, path)
    assert (found["n"], found["answers"], found["miou"], found["best_of_k"]["miou"]["value"]) == (2, 4, 0.75, 1.0)
    assert main(["score", str(path), "--resamples", "50"]) == 0
    assert "mean of k" in (text := capsys.readouterr().out) and "best of k" in text


def test_legacy_iou(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [row(truth=((0, 0, 10, 10),), boxes=((9, 0, 19, 10),))])
    assert scored(capsys, path)["miou"] > 0 == scored(capsys, path, "--legacy-iou")["miou"]
    write_rows(path, some_rows())
    assert f"{path}: --legacy-iou: want one box at most" in refused(capsys, "score", path, "--legacy-iou")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"boxes": [[1, 2, 3]]}, ":2: boxes[0]: want four numbers [x1, y1, x2, y2]; got [1, 2, 3]"),
        ({"boxes": [[1, 2, 3, True]]}, ":2: boxes[0]"),
        ({"boxes": [[1, 2, 3, 10**400]]}, ":2: boxes[0]"),
        ({"boxes": "none"}, ":2: boxes: want a list of boxes or null; got 'none'"),
        ({"truth": None}, ":2: truth: want a list of boxes; got None"),
        ({"truth": [[5, 5, 5, 9]]}, ":2: truth[0]: want four numbers [x1, y1, x2, y2], x1 < x2"),
        ({"truth": [[float("nan"), 0, 1, 1]]}, ":2: truth[0]"),
        ({"truth": [{"x": 1}]}, ":2: truth[0]"),
        ({"width": 0}, ":2: width: want a whole number of pixels >= 1; got 0"),
        ({"height": 9.5}, ":2: height"),
        ({"patient": 7}, ":2: patient: want a text that is not empty; got 7"),
        ({"patient": ""}, ":2: patient: want a text that is not empty"),
        ({"id": ""}, ":2: id: want a text that is not empty"),
        ({"thought_boxes": [[1]]}, ":2: thought_boxes[0]: want four numbers"),
        ({"sample": -1}, ":2: sample: want a whole number >= 0; got -1"),
        ({"logp": "low"}, ":2: logp: want a number; got 'low'"),
        ({"image": None}, ":2: image: want a text; got None"),
        ({"id": "a"}, ":2: id: want one answer to each id, or several that `sample` numbers (line 1 has the same id)"),
        ({"id": "a", "sample": 0}, ":2: id: want one answer to each id"),
    ],
)
def test_faults_are_named_by_file_line_and_field(tmp_path, capsys, change, named):
    path = write_rows(tmp_path / "a.jsonl", [row("a"), row("b") | change, row("c")])
    assert str(path) + named in refused(capsys, "score", path)


@pytest.mark.parametrize("sampled", [{}, {"sample": 0}])
def test_the_same_id_is_found_far_apart(tmp_path, capsys, sampled):
    rows = [row(f"r{i}") for i in range(400)]
    rows[2] |= sampled
    path = write_rows(tmp_path / "a.jsonl", [*rows, row("r2"), row("new")])
    told = refused(capsys, "score", path)
    assert "1 fault " in told and f"{path}:401: id" in told and "(line 3 has" in told


def test_every_faulty_line_is_named(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    line, less = json.dumps(row("a")), row("b")
    del less["truth"]
    path.write_bytes(f'{line}\n[1]\n{{"id": \n{json.dumps(less)}\n'.encode() + b'{"id": "\xff"}\n\n')
    told = refused(capsys, "score", path, "--json")
    assert "4 faults" in told and f"{path}:2: line: want one JSON object; got [1]" in told
    assert f"{path}:3: line: want one JSON object in UTF-8" in told and f"{path}:5: line" in told
    assert f"{path}:4: truth: missing; a prediction has id, width" in told


def test_other_mistakes_are_named(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", some_rows())
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    assert "want a file of predictions, or the folder of a run; got none" in refused(capsys, "score", tmp_path / "no")
    assert "got an empty file" in refused(capsys, "score", tmp_path / "empty.jsonl")
    assert "torn.jsonl.gz: want a file that can be read" in refused(capsys, "score", tmp_path / "torn.jsonl.gz")
    assert "--truth: want a file with --format coco" in refused_option(capsys, path, "--format", "coco")
    assert "--csv: want --format medground" in refused_option(capsys, path, "--format", "vlm-r1", "--csv", "x")
    assert "--coco: want a file in a folder" in refused_option(capsys, path, "--coco", tmp_path / "no" / "x")
    assert "want resamples >= 1; got 0" in refused(capsys, "score", path, "--resamples", "0")


def refused_option(capsys, *words):
    try:
        status = main(["score", *map(str, words)])
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    assert status == 2 and out.out == ""
    return " ".join(out.err.replace("│", " ").split())


def test_a_packed_file_and_a_byte_order_mark_are_read(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", some_rows())
    want = scored(capsys, path)["metrics"]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert scored(capsys, tmp_path / "b.jsonl.gz")["metrics"] == want == scored(capsys, tmp_path / "c.jsonl")["metrics"]


def test_the_last_whole_evaluation_of_a_run_is_found(tmp_path):
    (tmp_path / "run" / "eval").mkdir(parents=True)
    for name in ("step-000000", "step-000150", "step-000150.shuffled", "step-000200.curve"):
        write_rows(tmp_path / "run" / "eval" / f"{name}.predictions.jsonl", [row()])
    assert find_predictions(tmp_path / "run").name == "step-000150.predictions.jsonl"
    assert find_predictions(tmp_path / "run" / "eval").name == "step-000150.predictions.jsonl"
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match=r"one: want a folder with one file predictions\.jsonl .* got none"):
        find_predictions(tmp_path / "one")
    write_rows(tmp_path / "one" / "predictions.jsonl", [row()])
    write_rows(tmp_path / "one" / "other.predictions.jsonl", [row()])
    assert find_predictions(tmp_path / "one").name == "predictions.jsonl"


def test_what_was_written_is_read_again(tmp_path):
    more = row("s", sample=3, completion="<a>", logp=-2, thought_boxes=[[1, 2, 3, 4]])
    path = write_rows(tmp_path / "a.jsonl", [*some_rows(), more])
    first = list(read_predictions(path))
    write_rows(path, [p.row() for p in first])
    assert list(read_predictions(path)) == first and first[-1].sample == 3
    assert first[-1].thought_boxes == ((1.0, 2.0, 3.0, 4.0),)
    assert read_columns(path).claimed_iou.tolist() == pytest.approx([p.iou for p in first])


def test_csv_and_coco_are_written_and_coco_scores_the_same(tmp_path, capsys):
    rows = [line for line in some_rows() if line["boxes"] is not None and line["id"] != "inverted"]
    rows.append(row("=1+1", phrase='left, "small"\nnodule', category="größe"))
    path = write_rows(tmp_path / "a.jsonl", rows)
    want = scored(capsys, path, "--csv", tmp_path / "a.csv", "--coco", tmp_path / "a.json")
    assert want["notes"] == [f"{tmp_path / 'a.json'} answers to {tmp_path / 'a.truth.json'}"]
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == [line["id"] for line in rows]
    assert lines[-1]["phrase"] == rows[-1]["phrase"] and json.loads(lines[4]["truth"]) == rows[4]["truth"]
    found = scored(capsys, tmp_path / "a.json", "--format", "coco", "--truth", tmp_path / "a.truth.json")
    for table in ("metrics", "by_category", "by_side", "by_size"):
        assert found[table] == want[table]


def test_what_coco_cannot_say_is_noted(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [*some_rows(), row("nan", boxes=((float("nan"), 0, 1, 1),))])
    notes = scored(capsys, path, "--coco", tmp_path / "a.json")["notes"]
    assert "1 unreadable answers" in notes[1] and "2 boxes that are inverted" in notes[2]
    assert len(json.loads((tmp_path / "a.json").read_text())) == 9
