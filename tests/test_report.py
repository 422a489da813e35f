"""The page of a run: whole, closed to hostile texts, and honest about what is not there yet."""

import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up_run import HOSTILE, estimate, evaluation, finish_run, prediction, start_run, write_evaluation, write_lines
from PIL import Image

from medground import weight_files
from medground.report import gallery
from medground.report.page import write_report
from medground.report.run_files import read_run

VOID = {"meta", "input", "link", "img", "br", "hr"}


@pytest.fixture
def finished(tmp_path):
    run, data = start_run(tmp_path)
    finish_run(run)
    return run, data


class Page(HTMLParser):
    """Collects tags, attributes and texts; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def report(run, data):
    out = run / "report.html"
    write_report(run, [data], out)
    return out.read_text(encoding="utf-8")


def test_the_page_nests_and_asks_no_server(finished):
    html = report(*finished)
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    loading = ("src", "href", "xlink:href", "srcset", "poster", "action", "data", "background")
    urls = [value for _, name, value in page.attributes if name in loading]
    assert urls and all(url.startswith("data:image/") for url in urls)
    styles = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in styles and "@import" not in styles
    assert not page.all("link") and not page.all("iframe") and not page.all("img")
    assert len(html.encode()) < 5_000_000


def test_hostile_texts_stay_texts(finished):
    page = Page(report(*finished))
    assert len(page.all("script")) == 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = [text for _, text in page.texts]
    assert shown.count(HOSTILE) >= 4  # phrase, category, model, environment
    assert "http://evil.test" not in "".join(text for tag, text in page.texts if tag == "style")
    films = json.loads(next(text for tag, text in page.texts if tag == "script"))
    hostile = next(film for film in films if film["id"] == "r0")
    assert hostile["phrase"] == hostile["category"] == HOSTILE
    assert hostile["after"]["text"].startswith(HOSTILE)
    assert "nodule 1\\ud800" in shown  # what UTF-8 cannot say
    assert "more characters in the predictions file" in hostile["after"]["text"]


def test_headline_numbers_and_controls_are_there(finished):
    html = report(*finished)
    for text in ("0.123", "0.568", "0.468\u20130.668", "0.234", "0.346", "56.8\u202f%", "2-core CPU", "4 steps"):
        assert text in html, text
    assert "In progress" not in html
    page = Page(html)
    assert len(page.all("figure", **{"class": "chart"})) == 14
    assert html.count("not recorded") == 0
    cards = page.all("button", **{"class": "film"})
    assert len(cards) == 12
    assert len(page.all("rect", **{"class": "truth"})) == 11  # one record has none
    assert len(page.all("rect", **{"class": "before"})) == 12
    assert len(page.all("rect", **{"class": "thought after"})) == 2  # the third has no place on a film
    assert len(page.all("rect", **{"class": "after"})) == 8  # the rest is unreadable, empty or has no place on a film
    assert "unreadable" in html and "no box" in html and "absent" in html


def test_the_blind_baseline_has_its_interval(finished):
    run, data = finished
    summary = {"miou_blind_baseline": 0.4321, "miou_blind_baseline_interval": [0.4012, 0.4567]}
    (run / "summary.json").write_text(json.dumps(summary))
    html = report(run, data)
    assert "0.432" in html and "0.401\u20130.457" in html


def test_a_run_in_progress_says_what_is_missing(tmp_path):
    run, data = start_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # being written
    html = report(run, data)
    Page(html)
    assert "<b>In progress:</b> 4 of 150 steps" in html
    assert "the evaluation before training, the evaluation after training, the summary" in html
    assert "No predictions on the test records yet" in html
    write_evaluation(run, "step-000000", evaluation(0, 0.1234), [prediction(1, 0.1, None)])
    html = report(run, data)
    Page(html)
    assert "Not there yet: the evaluation after training, the summary." in html
    assert "before training" in html and "0.123" in html and 'data-layer="after"' not in html


def test_a_run_that_has_just_begun(tmp_path):
    run, data = start_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert "No step yet." in report(run, data)


def test_mistakes_are_named(finished, tmp_path):
    run, data = finished
    with pytest.raises(ValueError, match=r"nowhere/config\.json"):
        write_report(tmp_path / "nowhere", [data], tmp_path / "x.html")
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step": \n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        report(run, data)
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").write_text("[]")
    with pytest.raises(ValueError, match=r"environment\.json: want a JSON object; got list"):
        report(run, data)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/secret.png"])
def test_images_come_from_the_data_folder(finished, image):
    run, data = finished
    write_lines(run / "eval/step-000004.predictions.jsonl", [prediction(1, 0.5, None) | {"image": image}])
    with pytest.raises(ValueError, match="want an image inside"):
        report(run, data)


def test_a_missing_image_is_named(finished):
    run, data = finished
    (data / "images/0.png").unlink()
    with pytest.raises(ValueError, match=r"images/0\.png"):
        report(run, data)


def test_large_images_shrink_until_the_page_is_small(finished, monkeypatch):
    run, data = finished
    noise = np.random.default_rng(1).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    for i in range(5):
        Image.fromarray(noise).save(data / f"images/{i}.png", compress_level=1)
    monkeypatch.setattr(gallery, "IMAGE_BUDGET", 1_000_000)
    html = report(run, data)
    images = re.findall(r"data:image/jpeg;base64,[^\"]*", html)
    assert len(images) == 12 and sum(map(len, images)) <= 1_000_000


def test_choice_of_films(tmp_path):
    run, _ = start_run(tmp_path)
    before = [prediction(i % 11, 0.5, []) | {"id": f"r{i}"} for i in range(200)]
    after = [row | {"iou": i / 200} for i, row in enumerate(before)]
    absent = {"id": "absent", "iou": 0.0, "truth": []}
    before.append(before[0] | absent)
    after.append(before[0] | absent | {"iou": 1.0})
    write_evaluation(run, "step-000000", evaluation(0, 0.5), before)
    write_evaluation(run, "step-000004", evaluation(4, 0.5), after)
    films = read_run(run).films
    chosen = gallery.choose(films, each=10)
    found = {kind: {film.record["id"] for film, kinds in chosen if kind in kinds} for kind in gallery.KINDS}
    assert found["gain"] == {f"r{i}" for i in range(190, 200)}
    assert found["failure"] == {f"r{i}" for i in range(10)}
    assert len(found["random"]) == 10 and len(chosen) <= 30
    assert chosen == gallery.choose(films, each=10)
    draws = [films.index(f) for seed in range(40) for f, k in gallery.choose(films, 10, seed) if "random" in k]
    assert 80 < np.mean(draws) < 120  # from all films, not from what the other kinds leave


def test_controls_are_columns_where_a_run_has_them(finished, monkeypatch):
    run, data = finished
    html = report(run, data)
    assert "Blank" not in html and "Mirrored" not in html and "Its middle" not in html
    scores = {name: evaluation(0, value) for name, value in (("blind", 0.31), ("whole", 0.11), ("centre", 0.21))}
    (run / "eval/baselines.json").write_text(json.dumps(scores))
    html = report(run, data)
    assert "0.210\u20130.410" in html and "31.0\u202f%" in html, "of the blind baseline all metrics"
    assert "Whole image" in html and "Its middle" in html
    (data / "records.jsonl").write_text("{}\n")
    environment = json.loads((run / "environment.json").read_text()) | {"data_sha256": "d" * 64}
    (run / "environment.json").write_text(json.dumps(environment))
    monkeypatch.setattr(weight_files, "weights_hash", lambda folder: f"of {folder.name}")
    asked = {"blank": evaluation(0, 0.17), "flipped": evaluation(0, 0.53) | {"agreement": estimate(0.77)}}
    options = {"split": "test", "data_sha256": "d" * 64, "model_sha256": "of export", "samples": 1, "temperature": 0.0}
    (run / "eval/later").mkdir()
    later = run / "eval/later/eval.json"
    later.write_text(json.dumps({"options": options, "evaluations": asked}))
    assert "After, blank" not in report(run, data), "there is no export to compare with"
    (run / "export").mkdir()
    (run / "export/config.json").write_text("{}")
    html = report(run, data)
    assert "After, blank" in html and "After, mirrored" in html and "IoU of 0.770 (0.670\u20130.870)" in html
    for name, other in (
        ("split", "val"), ("data_sha256", "e" * 64), ("model_sha256", "of base"), ("samples", 2), ("temperature", 0.5)
    ):  # fmt: skip
        later.write_text(json.dumps({"options": options | {name: other}, "evaluations": asked}))
        assert "After, blank" not in report(run, data), name


def test_rewards_that_are_on_have_their_lines(finished):
    run, data = finished
    html = report(run, data)
    assert "semantic</li>" not in html and "threshold of" not in html and "MFU" not in html
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {"reward_spatial": 0.4, "reward_semantic": 0.3, "reward_length": 0.2, "reward_custom": 0.1, "threshold": 0.5}
    write_lines(run / "metrics.jsonl", [row | more | {"mfu": 0.4} for row in rows])
    html = report(run, data)
    for name in ("semantic", "length", "custom", "threshold of the curriculum"):
        assert re.search(rf'<li><i class="s\d"></i>{name}</li>', html), name
    assert "MFU" in html


def test_the_setup_says_which_data_it_was(finished):
    run, data = finished
    (data / "records.jsonl").write_text("{}\n")
    (data / "manifest.json").write_text(json.dumps({"schema": 1, "licence": HOSTILE}))
    (run / "environment.json").write_text(json.dumps({"data_sha256": "d" * 64}))
    page = Page(report(run, data))
    shown = [text for _, text in page.texts]
    now = hashlib.sha256(b"{}\n").hexdigest()
    assert now in shown and HOSTILE in shown
    assert f"no: {'d' * 64} then, {now} now" in shown
