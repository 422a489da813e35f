"""The page of a run that goes on: it follows the files, survives what is half there, and answers nobody else."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM
from made_up_run import HOSTILE, finish_run, start_run, write_lines
from test_report import Page

from medground.cli import main
from medground.report.live import LivePage, WatchConfig, serve


@contextmanager
def served(page: LivePage):
    """The port of a page that is served."""
    with serve(page, 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


@pytest.fixture
def run(tmp_path):
    run, data = start_run(tmp_path)
    finish_run(run)
    return run, data


def test_the_page_follows_the_files(run):
    folder, data = run
    with served(LivePage(folder, [str(data)], every=0, rest=0)) as port:
        status, html, headers = ask(port)
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and "0.568" in html
        version = ask(port, "/version")[1]
        assert f'var version = "{version}"' in html and ask(port, "/version")[1] == version
        write_lines(folder / "metrics.jsonl", [{"step": s, "seconds": 2.0} for s in (1, 2, 3, 4, 5)])
        assert ask(port, "/version")[1] != version
        version = ask(port, "/version")[1]
        assert f'var version = "{version}"' in ask(port)[1]
        evaluation = folder / "eval" / "step-000004.json"
        evaluation.write_text(evaluation.read_text().replace("0.5678", "0.8761"))
        assert ask(port, "/version")[1] != version and "0.876" in ask(port)[1]
    assert not (folder / "report.html").exists()


def test_the_served_page_may_ask_its_server_and_no_other(run):
    folder, data = run
    page = LivePage(folder, [str(data)]).page().decode()
    policy = Page(page).all("meta")[2]["content"]
    assert "default-src 'none'; connect-src 'self';" in policy and policy.count("connect-src") == 1
    assert len(Page(page).all("script")) == 3 and "http://evil.test" not in policy
    assert main(["report", str(folder), str(data)]) == 0
    file = (folder / "report.html").read_text()
    assert "connect-src" not in file and "fetch(" not in file


def test_files_are_looked_at_now_and_then_and_pages_made_when_asked_for(run, monkeypatch):
    folder, data = run
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    made = []
    page = LivePage(folder, [str(data)], every=3.0)
    monkeypatch.setattr(page, "_made", lambda version: made.append(version) or b"page")
    first = page.version()
    assert page.page() == page.page() == b"page" and made == [first]
    (folder / "metrics.jsonl").write_text("")
    clock[0] += 2.9
    assert page.version() == first and page.page() and len(made) == 1
    clock[0] += 0.2
    assert page.version() != first and len(made) == 1  # nobody looks
    page.page()
    assert len(made) == 2


def test_a_slow_page_is_made_less_often(run, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    page = LivePage(run[0], [str(run[1])], every=3.0)
    monkeypatch.setattr(page, "_made", lambda version: clock.__setitem__(0, clock[0] + 4.0) or b"page")
    page.page()
    assert page._pause == 20.0


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "new").mkdir()
    page = LivePage(tmp_path / "new", every=0, rest=0)
    html = page.page().decode()
    Page(html)
    assert "Nothing to show yet" in html and "config.json" in html and "connect-src 'self'" in html
    run, data = start_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").unlink()
    page = LivePage(run, [str(data)], every=0, rest=0)
    assert "environment.json: no such file" in page.page().decode()
    (run / "environment.json").write_text("{}")
    assert "No step yet." in page.page().decode()
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0, "reward": 0.5}\n{"step": 2, "rew')
    assert "<b>In progress:</b> 1 of 150 steps" in page.page().decode()


def test_damage_leaves_the_last_page_and_is_told(run):
    folder, data = run
    page = LivePage(folder, [str(data)], every=0, rest=0)
    assert "0.568" in page.page().decode()
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step": \n')
    for _ in range(2):
        html = page.page().decode()
        Page(html)
        assert html.count("Older than the run's files") == 1 and "metrics.jsonl, line 2: not JSON" in html
        assert "0.568" in html and f'var version = "{page.version()}"' in html
        (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step":: \n')
    (folder / "metrics.jsonl").write_text("[]\n")
    assert "cannot be shown: TypeError" in page.page().decode()
    write_lines(folder / "metrics.jsonl", [{"step": 1, "seconds": 1.0}])
    assert "Older than the run's files" not in page.page().decode()


def test_errors_are_texts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({HOSTILE: 1}))
    page = LivePage(tmp_path / "run", every=0, rest=0).page().decode()
    assert len(Page(page).all("script")) == 2 and not Page(page).all("img")


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    run, data = start_run(folder)
    (folder / "secret.txt").write_text("secret")
    with served(LivePage(run, [str(data)])) as port:
        yield port


@pytest.mark.parametrize(
    "path",
    ["/x", "/?", "/version/", "/x//", "/index.html", "/config.json", "/metrics.jsonl", "/../secret.txt", "/favicon.ico"]
    + ["/%2e%2e/secret.txt", "/..%2fsecret.txt", "/./", "../secret.txt", "http://127.0.0.1/", "*", "/version?x", "/\\"],
)
def test_nothing_else_is_served(path, port):
    status, text, _ = ask(port, path)
    assert status == 404 and text == "want / or /version\n"


@pytest.mark.parametrize(
    "host", ["evil.test", "evil.test:80", "localhost.evil.test", "127.0.0.1.evil.test", "", "[::1]"]
)
def test_who_asks_for_another_name_is_refused(host, port):
    for path in ("/", "/version"):
        status, text, headers = ask(port, path, Host=host)
        assert status == 403 and "localhost" in text and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "localhost:8000", "LOCALHOST:1"])
def test_localhost_may_have_any_port(host, port):
    """As it has through a tunnel."""
    assert ask(port, "/version", Host=host)[0] == 200


def test_two_hosts_or_none_are_refused(port):
    for lines in ("", "Host: localhost\r\nHost: evil.test\r\n", "Host: evil.test\r\nHost: localhost\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
            assert connection.makefile().readline().split()[1] == "403"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_only_get_and_head(method, port):
    status, _, headers = ask(port, "/", method)
    assert status == 405 and headers["Allow"] == "GET, HEAD"


def test_head_is_a_page_without_its_body(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head, _, body = connection.makefile().read().partition("\n\n")
    assert " 200 " in head and int(re.search(r"Content-Length: (\d+)", head)[1]) > 10_000 and body == ""


def test_browsers_that_go_away_or_talk_nonsense_are_survived(port, capfd):
    for said in (
        b"",
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /" + b"a" * 70_000,
        b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
            connection.sendall(said)
    assert ask(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_mistakes_are_named(tmp_path, capsys, port):
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "none: want the folder of a run; there is none" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--port", str(port)]) == 2
    assert f"port: want one that is free; got {port}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="port: want 0 to 65535; got 70000"):
        WatchConfig(run="x", port=70000)


def test_an_interrupted_watch_ends_quietly(tmp_path):
    # as a terminal has it: programs that a shell starts in the background are deaf to it
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from medground.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "watch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())[1])
            assert ask(port)[0] == 200
            # the port is on the loopback alone
            places = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            assert {place for place in places if place.endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in (0, 130) and err == ""


PROBE = """<script>
  var controls = document.getElementById("controls");
  if (VERSION === "first") {
    controls.elements.sort.value = "low"; controls.elements.category.value = "nodule";
    document.querySelector("[data-layer=before]").click();
    document.querySelectorAll("details")[1].open = true;
    window.scrollTo(0, 300);
  } else {
    document.body.dataset.probe = JSON.stringify({
      sort: controls.elements.sort.value, category: controls.elements.category.value,
      count: controls.elements.count.textContent, classes: document.getElementById("gallery").className,
      open: Array.from(document.querySelectorAll("details")).map(function (d) { return d.open; }),
      y: window.scrollY, left: sessionStorage.length });
  }
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_reloads_and_keeps_its_place(run, tmp_path):
    class Probed(LivePage):
        """Another version from the first look on."""

        at = "first"

        def version(self):
            return self.at

        def page(self):
            html = self._made(self.at).replace(b"</body>", PROBE.replace("VERSION", f'"{self.at}"').encode())
            self.at = "second"
            return html

    with served(Probed(run[0], [str(run[1])])) as port:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-sync", "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom",
            f"http://127.0.0.1:{port}/",
        ]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    page = Page(dom)
    assert page.all("html")[0]["data-version"] == "second"
    found = json.loads(page.all("body")[0]["data-probe"])
    assert (found["sort"], found["category"], found["classes"]) == ("low", "nodule", "gallery no-before")
    assert found["count"] == "11 films" and found["open"][:2] == [False, True] and found["left"] == 0
    assert found["y"] == 300
