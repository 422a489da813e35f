"""Pages of a profile and of a comparison: what they say, that they need nothing else, and how a browser takes them."""

import copy
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up_profile import PHASES, made_up_profile, on_a_gpu

from profiles import curves, drawing
from profiles.changes import compare
from profiles.compare_page import render_comparison
from profiles.groups import GROUPS
from profiles.page import render_page

EVIL = "void f<script>alert(1)</script><img src=x>&\"'"


def evil(profile: dict) -> dict:
    """Wherever a profile has text of its own, markup."""
    profile = copy.deepcopy(profile)
    profile["workload"] |= {"name": EVIL, EVIL: EVIL}
    profile["environment"] |= {"device": EVIL, "commit": EVIL, "packages": {EVIL: EVIL}, "date": EVIL}
    profile["rates"][EVIL] = 1.0
    profile["traced"]["counts"][EVIL] = 1
    profile["traced"]["kernels"][0] |= {"name": EVIL, "phase": EVIL}
    profile["phases"][EVIL] = [0.1] * 5
    profile["traced"]["timeline"]["phases"][0][0] = EVIL
    if profile["traced"]["idle"]:
        profile["traced"]["idle"][EVIL] = 0.1
    return profile


def comparison(before: dict, after: dict) -> str:
    return render_comparison(before, after, compare(before, after, anyway=True))


def pages() -> dict[str, str]:
    plain, gpu, slower = made_up_profile(), on_a_gpu(made_up_profile()), on_a_gpu(made_up_profile(2.0))
    slower["traced"]["kernels"] = [*slower["traced"]["kernels"], slower["traced"]["kernels"][0] | {"name": "new_one"}]
    bare = copy.deepcopy(plain)
    del bare["traced"]["memory"], bare["traced"]["timeline"]
    return {
        "record": render_page(plain),
        "record of a gpu": render_page(gpu | {"others_cores": 2.0}),
        "record of markup": render_page(evil(gpu)),
        "comparison": comparison(gpu, slower),
        "comparison with an entry of a history": comparison(bare, plain),
        "comparison of markup": comparison(evil(gpu), evil(slower)),
    }


class Tags(HTMLParser):
    """Names of the tags and of the attributes that a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


PAGES = pages()
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


@every_page
def test_a_page_needs_nothing_else(page):
    assert not re.search(r"https?:|url\(|@import", page)
    tags = Tags()
    tags.feed(page)
    assert tags.names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    assert not [a for a in tags.attributes if a in ("src", "href", "xlink:href", "srcset") or a.startswith("on")]
    assert len(page) < 2e6


def test_what_comes_from_a_profile_is_escaped():
    for name in ("record of markup", "comparison of markup"):
        assert PAGES[name].count(escape(EVIL)) > 8 and "<script" not in PAGES[name]


def test_the_page_of_a_record():
    page = PAGES["record of a gpu"]
    assert page.count('class="phase"') == len(PHASES) and page.count('class="dot"') == 5 * len(PHASES)
    assert "2 cores" in page and "62.5%" in page and "floor / time" in page
    assert page.count('class="floor"') == 2
    assert "floor / time" not in PAGES["record"] and "GPU busy" not in PAGES["record"]


def test_the_page_of_a_comparison():
    page = PAGES["comparison"]
    assert 'update is <span class="slower">slower</span>' in page and "2.00 × the time" in page
    assert page.count('class="phase"') == len(PHASES) and page.count('class="lane"') == 2 * len(PHASES)
    assert '<span class="new">new</span>' in page and "new_one" in page and "no verdict" in page
    assert page.count('class="strip"') == 2 and page.count('class="curve') == 2
    assert "idle by cause" in page and "idle by cause" not in PAGES["comparison with an entry of a history"]


def test_curves_that_were_not_kept_are_told():
    page = PAGES["comparison with an entry of a history"]
    assert "No change." in page
    assert page.count("not kept") == 2 and page.count('class="strip"') == 1 and page.count('class="curve') == 1


def test_time_lines_share_a_scale():
    found = made_up_profile()["traced"]["timeline"]
    full, half = curves.time_line("a", found, 4.0), curves.time_line("a", found, 8.0)
    assert [re.search(r'title="decode: 1,300 ms.*?"', drawn) is not None for drawn in (full, half)] == [True, True]
    widths = [re.findall(r"left:([\d.]+)%;width:([\d.]+)%", drawn)[1] for drawn in (full, half)]
    assert widths == [("32.500", "32.500"), ("16.250", "16.250")]
    assert "H1000.00" in full and "H500.00" in half and "H1000" not in half
    assert "no kernels" in curves.time_line("a", found | {"work": {}}, 4.0)


def test_kinds_of_work_lie_on_top_of_each_other():
    found = {"phases": [["a", 0.0, 2.0]], "work": {"GEMM": [0.5, 1.0], "copy": [0.25, 0.0]}}
    drawn = curves.time_line("a", found, 2.0)
    areas = re.findall(r'<path class="(k\d)" d="M0 200V([\d.]+)H500.00V([\d.]+)H1000.00', drawn)
    gemm, copying = (f"k{GROUPS.index(group)}" for group in ("GEMM", "copy"))
    assert areas == [(copying, "50.0", "0.0"), (gemm, "100.0", "0.0")], "heights of 200, from the top"
    idle = {"phases": [["a", 0.0, 2.0]], "work": {"GEMM": [0.5, 0.5]}}
    assert "V100.0H500.00V100.0H1000.00" in curves.time_line("a", idle, 2.0), "half busy is half the height"
    overlapping = {"phases": [["a", 0.0, 2.0]], "work": {"GEMM": [2.0, 1.0]}}
    assert "V0.0H500.00V100.0H1000.00" in curves.time_line("a", overlapping, 2.0), "twice as busy is twice as high"


def test_every_kind_of_work_has_a_colour_of_its_own():
    for colours in (drawing._LIGHT, drawing._DARK):
        assert len(set(colours)) == len(GROUPS)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium, chromium-browser or google-chrome")
def test_a_browser_has_no_complaint(tmp_path: Path):
    """All pages at once, each in a frame as wide as a phone: nothing is loaded, nothing sticks out to the right."""
    frames = "".join(
        f'<iframe title="{escape(name)}" width="375" height="600" srcdoc="{escape(page)}"></iframe>'
        for name, page in PAGES.items()
    )
    script = """
      addEventListener("load", () => {
        for (const frame of document.querySelectorAll("iframe")) {
          const page = frame.contentDocument, told = document.createElement("p");
          const loaded = frame.contentWindow.performance.getEntriesByType("resource").length;
          const beyond = page.documentElement.scrollWidth - page.documentElement.clientWidth;
          told.textContent = [frame.title, beyond, loaded, page.scripts.length, page.images.length,
                              page.querySelectorAll(".phase").length].join(";");
          document.body.append(told);
          frame.remove();
        }
      });
    """
    (tmp_path / "all.html").write_text(f"<!doctype html><body>{frames}<script>{script}</script>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command += [*OFFLINE, "--enable-logging=stderr", "--v=0", "--dump-dom", (tmp_path / "all.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    told = [unescape(line).split(";") for line in re.findall(r"<p>(.*?)</p>", done.stdout)]
    phases = [str(len(PHASES) + ("markup" in name)) for name in PAGES]
    assert told == [[name, "0", "0", "0", "0", count] for name, count in zip(PAGES, phases, strict=True)]
