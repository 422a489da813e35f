"""Result files of others: VLM-R1's and COCO's, sound and faulty."""

import json

import pytest

from medground.scoring.coco import read_coco
from medground.scoring.command import ScoreConfig, scores_of
from medground.scoring.vlm_r1 import check_claims, read_vlm_r1

QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: small left nodule."


def result(answer=(10, 10, 20, 20), correct=1, **others):
    answer = None if answer is None else list(answer)
    found = {"question": QUESTION, "ground_truth": [10, 10, 20, 20], "model_output": "", "extracted_answer": answer}
    return found | {"correct": correct} | others


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def scores(path, **options):
    return scores_of(path, ScoreConfig(file=str(path), resamples=50, **options))


@pytest.fixture
def results(tmp_path):
    """A function that writes results as VLM-R1 does, and gives the path."""
    return lambda *items, **others: write(tmp_path / "log.json", {"results": list(items), **others})


def test_accuracy_and_iou_are_computed_from_the_boxes(results):
    items = [result(), result((10, 10, 20, 30), 0), result((0, 0, 0, 0), 0), result(None, 0)]
    found = scores(results(*items, accuracy=25.0), format="vlm-r1")
    assert (found["n"], found["miou"], found["acc@0.5"]) == (4, 1.5 / 4, 0.25)
    assert found["metrics"]["parse_failures"]["value"] == 0.5
    assert found["metrics"]["side"]["n"] == 0 and found["by_size"] == found["by_category"] == {}
    assert list(found["by_side"]) == ["left"]
    assert found["file_says"]["accuracy"]["agrees"] and found["file_says"]["correct"]["disagree"] == 0


def test_where_the_file_disagrees_with_its_boxes_is_told(results):
    items = [result(), result((10, 10, 20, 30), 1), result((30, 30, 40, 40), 0), result((10, 10, 20, 20), False)]
    says = scores(results(*items, accuracy=83.12), format="vlm-r1")["file_says"]
    assert says["accuracy"]["boxes"] == 50 and not says["accuracy"]["agrees"]
    assert "83.1200 %; its boxes give 50.0000 %: they disagree" in says["accuracy"]["text"]
    assert says["correct"]["first"] == [
        {"result": 1, "correct": 1, "iou": 0.5},
        {"result": 3, "correct": 0, "iou": 1.0},
    ]
    assert "agrees with its boxes in 2 of 4" in says["correct"]["text"]


def test_what_vlm_r1s_own_iou_explains_is_counted(results):
    thin = result((10, 10, 11, 20), 0, ground_truth=[10, 10, 11, 20])
    says = check_claims(read_vlm_r1(results(thin, result(correct=0))))
    assert (says["correct"]["disagree"], says["correct"]["explained"]) == (2, 1)
    assert scores(results(thin), format="vlm-r1", legacy_iou=True)["miou"] == 0


def test_a_file_may_say_less(results):
    items = [result(question={"problem": QUESTION, "image": "x.png"}), result(image="x.png")]
    for item in items:
        del item["correct"], item["model_output"]
    found = scores(results(*items), format="vlm-r1")
    assert found["file_says"] == {} and (found["cluster"], found["clusters"]) == ("image", 1)


@pytest.mark.parametrize(
    ("images", "cluster", "count"),
    [
        (("p10/p10000001/s50000001/a.jpg", "p10/p10000001/s50000002/b.jpg"), "patient", 1),
        (("a.jpg", "p10/p10000001/s50000002/b.jpg"), "image", 2),
        (("a.jpg", None), "record", 2),
    ],
)
def test_records_are_clustered_by_what_the_file_tells(results, images, cluster, count):
    items = [result(image=image) if image else result() for image in images]
    found = scores(results(*items), format="vlm-r1")
    assert (found["cluster"], found["clusters"]) == (cluster, count)
    assert any("no patients in this file" in note for note in found["notes"]) == (cluster != "patient")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ground_truth": [1, 2, 3]}, "results[1]: ground_truth: want four numbers"),
        ({"ground_truth": [5, 5, 1, 9]}, "results[1]: ground_truth: want four numbers [x1, y1, x2, y2], x1 < x2"),
        ({"extracted_answer": [1, 2, 3, "4"]}, "results[1]: extracted_answer: want four numbers"),
        ({"extracted_answer": "none"}, "results[1]: extracted_answer"),
        ({"correct": "yes"}, "results[1]: correct: want 0, 1, true or false; got 'yes'"),
        ({"correct": []}, "results[1]: correct"),
        ({"question": 7}, "results[1]: question: want a text"),
    ],
)
def test_faulty_results_are_named(results, change, named):
    with pytest.raises(ValueError, match=r"log.json: ") as error:
        read_vlm_r1(results(result(), result() | change))
    assert named in str(error.value)


def test_a_file_that_is_no_such_file_is_named(tmp_path, results):
    for value, named in (([], "got list"), ({"a": 1}, "an object with 'a'"), ({"results": []}, r"got \[\]")):
        with pytest.raises(ValueError, match=f"results: want an object with a list of results; got .*{named}|{named}"):
            read_vlm_r1(write(tmp_path / "b.json", value))
    with pytest.raises(ValueError, match=r"log.json: accuracy: want a number.* got 'high'"):
        read_vlm_r1(results(result(), accuracy="high"))
    less = result()
    del less["extracted_answer"]
    with pytest.raises(ValueError, match=r"results\[0\]: extracted_answer: missing; a result has question"):
        read_vlm_r1(results(less, 3))


TRUTH = {
    "images": [
        {"id": 1, "width": 100, "height": 100, "patient": "p1"},
        {"id": 2, "width": 100, "height": 100, "patient": "p1"},
        {"id": "three", "width": 100, "height": 100, "patient": "p2"},
    ],
    "categories": [{"id": 1, "name": "nodule"}, {"id": 2, "name": "left effusion"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]},
        {"image_id": 1, "category_id": 1, "bbox": [60, 60, 20, 20], "iscrowd": 0},
        {"image_id": 1, "category_id": 2, "bbox": [60, 0, 20, 50]},
        {"image_id": 2, "category_id": 2, "bbox": [0, 0, 10, 10], "iscrowd": 1},
    ],
}
RESULTS = [
    {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.9},
    {"image_id": 1, "category_id": 2, "bbox": [61, 0, 20, 50], "score": 0.1},
    {"image_id": "three", "category_id": 2, "bbox": [0, 0, 10, 10]},
]


def coco(tmp_path, results=RESULTS, **changes):
    return write(tmp_path / "results.json", results), write(tmp_path / "truth.json", TRUTH | changes)


def test_coco_records_are_images_with_a_category(tmp_path):
    path, truth = coco(tmp_path)
    found = scores(path, format="coco", truth=str(truth))
    # image 1 twice; a false alarm on image three; image 2 has nothing, and nothing was found there
    assert (found["n"], found["clusters"], found["cluster"]) == (4, 2, "patient")
    assert found["metrics"]["miou"] | {"low": 0, "high": 0} == {
        "value": pytest.approx((0.5 + 19 / 21) / 2), "low": 0, "high": 0, "n": 2,
    }  # fmt: skip
    assert (found["metrics"]["absent"]["value"], found["metrics"]["side"]["value"]) == (0.5, 1)
    assert list(found["by_category"]) == ["left effusion", "nodule"]
    assert found["notes"] == ["left out: 1 annotations with `iscrowd`, which are no box"]


def test_coco_without_patients_or_sizes_says_so(tmp_path):
    path, truth = coco(tmp_path, images=[{"id": 1}, {"id": 2}, {"id": "three"}])
    loaded = read_coco(path, truth)
    assert loaded.claims["cluster"] == "image" and len(loaded.columns.patients) == 3
    assert "not every image names a patient" in loaded.notes[1] and "width and height" in loaded.notes[2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_id": 9}, r"results\.json: results\[3\]: image_id: want the id of one of the 3 .* got 9"),
        ({"category_id": None}, r"results\[3\]: category_id: want the id of one of the 2"),
        ({"bbox": [1, 2, 3]}, r"results\[3\]: bbox: want four numbers x, y, width, height; got \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, float("nan")]}, r"results\[3\]: bbox"),
    ],
)
def test_faulty_coco_results_are_named(tmp_path, change, named):
    path, truth = coco(tmp_path, [*RESULTS, RESULTS[0] | change])
    with pytest.raises(ValueError, match=named):
        read_coco(path, truth)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": {}}, r"truth\.json: images: want a list; got dict"),
        ({"images": [{"id": 1}, {"id": 1}]}, r"images\[1\]: id: want an object with an id of its own"),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: name: want a text"),
        ({"annotations": [7]}, r"annotations\[0\]: item: want an object; got 7"),
        (
            {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 0, 5]}]},
            r"truth\.json: annotations\[0\]: bbox: want .*both > 0; got",
        ),
    ],
)
def test_faulty_coco_annotations_are_named(tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        read_coco(*coco(tmp_path, **change))


def test_coco_results_are_a_list(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json: want a list of results; got dict"):
        read_coco(*coco(tmp_path, {"annotations": []}))
