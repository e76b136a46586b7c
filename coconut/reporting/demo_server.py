"""The demo page and its web server, based on http.server. `analysis.interactive` computes the answers."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coconut.analysis.interactive import InteractiveModel
from coconut.reporting.plots import DARK, LIGHT
from coconut.utils.listening import explain_address_errors

MAX_REQUEST_BYTES = 100_000
PAGE = Path(__file__).with_name("demo.html")


class RefusedRequest(Exception):
    """A request that is refused. The message is shown to the user."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class DemoServer(ThreadingHTTPServer):
    """Serve one model to a browser. Raises ValueError if it cannot listen on host and port."""

    model: InteractiveModel

    def __init__(self, host: str, port: int):
        self.host = host
        self.page = demo_page()
        with explain_address_errors("The page", host, port):
            super().__init__((host, port), DemoHandler)

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of connections that the browser has closed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class DemoHandler(BaseHTTPRequestHandler):
    """GET / gives the page, GET /about the facts of the run; POST /ask takes {"question": text} or {"row": number}."""

    server: DemoServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 60
    server_version, sys_version = "coconut", ""

    def do_GET(self) -> None:
        self._answer({"/": lambda: self.server.page, "/about": lambda: self.server.model.about})

    def do_POST(self) -> None:
        self._answer({"/ask": self._ask})

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _ask(self) -> dict[str, Any]:
        question_or_row, model = self._body(), self.server.model
        try:
            return model.ask(question_or_row) if isinstance(question_or_row, str) else model.ask_row(question_or_row)
        except ValueError as error:
            raise RefusedRequest(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _answer(self, paths: Mapping[str, Callable[[], str | dict[str, Any]]]) -> None:
        """Send what the function of the path gives: HTML, or an object as JSON."""
        status = HTTPStatus.OK
        try:
            self._check_host()
            path = self.path.partition("?")[0]
            if path not in paths:
                raise RefusedRequest(HTTPStatus.NOT_FOUND, f"There is nothing at {path}.")
            content = paths[path]()
        except RefusedRequest as refused:
            status, content = refused.status, {"error": str(refused)}
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc()
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content = {"error": "An error occurred. The terminal that serves this page shows it."}
        self._send(status, content)
        if status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            self._discard()

    def _send(self, status: HTTPStatus, content: str | dict[str, Any]) -> None:
        is_page = isinstance(content, str)
        body = (content if is_page else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(body)

    def _discard(self) -> None:
        """Read the rest of a request that is too large: a browser does not read the response before it has sent all."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(2)
        with contextlib.suppress(OSError):
            while self.rfile.read1(MAX_REQUEST_BYTES):
                pass

    def _check_host(self) -> None:
        """Refuse requests for other host names. Another site's name may resolve to this address (DNS rebinding)."""
        names = {self.server.host.lower(), "localhost", "127.0.0.1", self.connection.getsockname()[0]}
        requested = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{requested}").hostname
        except ValueError:
            name = None
        if name not in names:
            raise RefusedRequest(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"This page is served as {', '.join(sorted(names))}, not as {requested!r}. To use another name of "
                "this machine, start the demo with host=NAME.",
            )

    def _body(self) -> str | int:
        """Read the body of a request: the text of a question, or the index of a row."""
        # Pages of other sites cannot send this type without CORS permission.
        if self.headers.get_content_type() != "application/json":
            raise RefusedRequest(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON, with Content-Type: application/json.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            raise RefusedRequest(HTTPStatus.LENGTH_REQUIRED, "Send the length of the question, with Content-Length.")
        if int(length) > MAX_REQUEST_BYTES:
            raise RefusedRequest(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The question has {int(length):,} bytes; the limit is {MAX_REQUEST_BYTES:,}. Ask something shorter.",
            )
        try:
            content = json.loads(self.rfile.read(int(length)))
            json.dumps(content, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise RefusedRequest(HTTPStatus.BAD_REQUEST, "The request is not JSON.") from None
        match content:
            case {"question": str(question)}:
                return question
            case {"row": int(row)} if row is not True and row is not False:
                return row
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, 'Send {"question": text} or {"row": number} with a whole number.')


def demo_page() -> str:
    """The HTML of the page, in the colours of the reports."""
    light, dark = ("".join(f"--{name}: {value}; " for name, value in colours.items()) for colours in (LIGHT, DARK))
    rules = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
    return PAGE.read_text(encoding="utf-8").replace("/* colours */", rules)
