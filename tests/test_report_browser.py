"""The page in a browser: filters, order, opened films, narrow screens; nothing complains and nothing is fetched."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from made_up_run import HOSTILE, evaluation, finish_run, start_run

from medground.report.page import write_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]

SHOWN = "Array.from(document.querySelectorAll('.film')).filter(c => c.offsetParent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    run, data = start_run(folder)
    finish_run(run)
    scores = {name: evaluation(0, 0.2) for name in ("blind", "whole", "centre")}
    (run / "eval/baselines.json").write_text(json.dumps(scores))
    write_report(run, [str(data)], run / "report.html")
    return run / "report.html"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started: Browser, page: Path) -> Iterator[Browser]:
    """On the page, afresh; what complained or asked for anything in the end is a failure."""
    started.see(1280, 900)
    started.complaints.clear()
    started.requests.clear()
    started.open(page)
    yield started
    assert started.complaints == []
    assert started.requests == [page.as_uri()]


def displayed(browser: Browser, selector: str) -> int:
    count = f"Array.from(document.querySelectorAll({selector!r})).filter(e => getComputedStyle(e).display !== 'none')"
    return browser.run(f"{count}.length")


def test_filters_and_order(browser: Browser):
    assert browser.run(f"{SHOWN}.length") == 12
    browser.choose("category", "nodule")
    browser.choose("sort", "low")
    ious = browser.run(f"{SHOWN}.map(c => Number(c.dataset.iou))")
    assert len(ious) == 11 and ious == sorted(ious)
    assert browser.run("document.querySelector('output').textContent") == "11 films"
    browser.choose("sort", "gain")
    gains = browser.run(f"{SHOWN}.map(c => Number(c.dataset.gain))")
    assert gains == sorted(gains, reverse=True)
    browser.choose("category", HOSTILE)
    assert browser.run(f"{SHOWN}.map(c => c.dataset.index).length") == 1
    assert browser.run("document.querySelector('output').textContent") == "1 film"
    browser.choose("category", "")
    browser.choose("kind", "failure")
    fits = f"{SHOWN}.every(c => c.dataset.kinds.includes('failure')) && {SHOWN}.length > 0"
    assert browser.run(fits)


def test_boxes_can_be_hidden(browser: Browser):
    for layer in ("truth", "before", "after"):
        there = displayed(browser, f".gallery rect.{layer}:not(.thought)")
        assert there > 0
        browser.click(f"[data-layer={layer}]")
        assert displayed(browser, f".gallery rect.{layer}") == 0, layer
        browser.click(f"[data-layer={layer}]")
        assert displayed(browser, f".gallery rect.{layer}:not(.thought)") == there


def test_an_opened_film_shows_what_was_said_and_thought(browser: Browser):
    hostile = ".film[data-category^='</script']"
    assert displayed(browser, ".gallery rect.thought") == 0, "only where a film is opened"
    browser.click(hostile)
    assert browser.run("document.querySelector('dialog').open")
    assert displayed(browser, "dialog rect.thought.after") == 2
    words = browser.run("document.querySelector('dialog').textContent")
    assert HOSTILE in words and "while thinking: [1, 2, 11, 12]" in words
    assert browser.run("document.querySelector('dialog .title').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('dialog script, dialog img, script').length") == 2, "the page's own"
    browser.press("ArrowRight")
    second = browser.run("document.querySelector('dialog .title').textContent")
    assert browser.run("document.activeElement.textContent") == "next", "or keys would do nothing from here on"
    browser.click("dialog .title")  # which takes the focus away
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('dialog .title').textContent") == HOSTILE != second
    browser.press("Escape")
    assert not browser.run("document.querySelector('dialog').open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(browser: Browser, scheme: str):
    browser.see(375, 812, phone=True, prefers_color_scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == 375, "nothing sticks out"
    browser.click(".film")
    edges = browser.run("(b => [b.left, b.right])(document.querySelector('dialog').getBoundingClientRect())")
    assert 0 <= edges[0] < edges[1] <= 375
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128
    assert light == (scheme == "light")


def test_on_paper_nothing_is_cut(browser: Browser):
    browser.see(718, 1000, paper=True)  # A4 less its margins
    beyond = "Array.from(document.querySelectorAll('main *')).filter(e => e.getBoundingClientRect().right > 719)"
    assert browser.run(f"{beyond}.length") == 0
    assert displayed(browser, ".controls select") == 0
