"""The page of a run that goes on, served on this machine: it tells its version, and a script that reloads it.

Only 127.0.0.1 is listened to, only two paths are served, and only who asks for localhost by that name is answered: a
page elsewhere that lets its own name point here (DNS rebinding) is not.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import tyro

from medground.config import load_config
from medground.report.page import document, render
from medground.report.style import LIVE_SCRIPT

EVERY = 3.0  # seconds from one look at the files to the next, at least
REST = 5.0  # and that many times what the last page took: on the machine that trains, pages are to be cheap
HOST = re.compile(r"(localhost|127\.0\.0\.1)(:\d+)?", re.ASCII | re.IGNORECASE)  # of any port: it may be a tunnel's


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Serve the page of a run, finished or not, to browsers on this machine; it follows the run."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    data: tuple[str, ...] = ()
    """Folders of its records; none for those of its configuration."""
    port: int = 0
    """Port to listen on; 0 for a free one."""
    open: bool = False
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port: want 0 to 65535; got {self.port}")


class LivePage:
    """The page of a run as its files are; made anew when they have changed, but not too often."""

    def __init__(self, run: Path, data: Sequence[str] = (), every: float = EVERY, rest: float = REST):
        self._run, self._data, self._every, self._rest = run, data, every, rest
        self._lock = threading.Lock()
        self._seen, self._looked, self._pause = "", -math.inf, every
        self._page, self._of = b"", ""
        self._good: tuple[bytes, str] | None = None  # the last page that could be made, and its version

    def version(self) -> str:
        """A name for what the files hold, looked at every few seconds."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= self._pause:
                self._seen, self._looked = _state_of(self._run), now
            return self._seen

    def page(self) -> bytes:
        """The page, of the version that it says it has."""
        version = self.version()
        with self._lock:
            if version != self._of:
                started = time.monotonic()
                self._page, self._of = self._made(version), version
                self._pause = max(self._every, self._rest * (time.monotonic() - started))
            return self._page

    def _made(self, version: str) -> bytes:
        script = LIVE_SCRIPT.replace("VERSION", version)
        try:
            data = self._data or load_config(self._run / "config.json").data.path
            page = render(self._run, data, script)
        except (ValueError, OSError) as error:  # half the files of a run that begins; a file that is damaged
            return self._explained(str(error), version, script)
        except Exception as error:  # a file of another form must not end the service
            return self._explained(f"{type(error).__name__}: {error}", version, script)
        self._good = page, version
        return page

    def _explained(self, problem: str, version: str, script: str) -> bytes:
        problem = escape(problem)
        if not self._good:
            body = f'<h1>{escape(self._run.name)}</h1><p class="progress">Nothing to show yet: {problem}</p>'
            return document(self._run.name, body, script)
        old, of = self._good
        note = f'<main><p class="progress">Older than the run\'s files, which cannot be shown: {problem}</p>'
        told = old.replace(b"<main>", note.encode("utf-8", "backslashreplace"), 1)
        return told.replace(of.encode(), version.encode())


def run_watch(config: WatchConfig) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: there is no such folder, or the port cannot be had.
    """
    run = Path(config.run)
    if not run.is_dir():
        raise ValueError(f"{run}: want the folder of a run; there is none")
    with serve(LivePage(run, config.data), config.port) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address} shows {run} to who is on this machine; Ctrl-C ends it", flush=True)
        if config.open:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def serve(page: LivePage, port: int) -> ThreadingHTTPServer:
    """A server of the page, listening on 127.0.0.1 alone.

    Raises:
        ValueError: the port cannot be had.
    """
    handler = type("Handler", (_Handler,), {"live": page})
    try:
        return _Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(f"port: want one that is free; got {port}: {error.strerror}") from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a browser that lingers does not keep the program

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    live: LivePage
    timeout = 20  # seconds that a browser may be silent
    server_version, sys_version = "medground", ""

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
            return self._refuse(HTTPStatus.FORBIDDEN, "want Host localhost or 127.0.0.1")
        if self.command not in ("GET", "HEAD"):
            return self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "want GET or HEAD")
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            self._answer(HTTPStatus.OK, self.live.page(), "text/html; charset=utf-8")
        elif self.path == "/version":
            self._answer(HTTPStatus.OK, self.live.version().encode(), "text/plain; charset=utf-8")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "want / or /version")

    do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

    def _refuse(self, status: HTTPStatus, text: str) -> bool:
        self.close_connection = True
        self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8")
        return False

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
        }
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, HEAD"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the run's."""


def _state_of(run: Path) -> str:
    """A name for the files that the page is made of, by their sizes and times."""
    files = [
        run / name for name in ("config.json", "environment.json", "metrics.jsonl", "warnings.jsonl", "summary.json")
    ]
    files += [run / "audit" / "rewards.json", *sorted((run / "eval").glob("*.json*"))]
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
        except OSError:  # not there yet, or replaced this moment
            continue
        digest.update(f"{file.name} {facts.st_mtime_ns} {facts.st_size}\n".encode())
    return digest.hexdigest()[:24]
