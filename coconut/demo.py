"""A page to play with a trained model: a question, and what the model does with it after each number of thoughts.

`coconut.analysis.interactive` asks the model; here it is brought to the browser.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from coconut.analysis.config import DemoConfig
from coconut.analysis.interactive import Asker
from coconut.analysis.probes import Subject
from coconut.reporting.plots import DARK, LIGHT
from coconut.tasks import TASKS
from coconut.utils.console import log
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.data.examples import Example

MOST_BYTES = 100_000  # of what a browser may send
PAGE = Path(__file__).with_name("demo.html")


class Refused(Exception):
    """A request that is not answered, with the reason for the user."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """Brings what the asker finds to the browser. Raises ValueError if it cannot be served there."""

    asker: Asker

    def __init__(self, host: str, port: int):
        self.host = host
        self.page = page()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"Port {port} is taken by another program. Choose another: port={port + 1}, or port=0 for any that "
                    "is free."
                ) from None
            raise ValueError(
                f"Nothing can be served at host={host} port={port} ({error.strerror}). Take host=127.0.0.1 and a port "
                "above 1023."
            ) from None

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, GET /about what it says of the run; POST /ask takes {"question": text} or {"row": number}."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 60
    server_version, sys_version = "coconut", ""

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/about": self._about})

    def do_POST(self) -> None:
        self._answer({"/ask": self._ask})

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _page(self) -> tuple[str, str]:
        return "text/html; charset=utf-8", self.server.page

    def _about(self) -> tuple[str, str]:
        return "application/json", json.dumps(self.server.asker.about)

    def _ask(self) -> tuple[str, str]:
        asked, asker = self._body(), self.server.asker
        try:
            found = asker.ask(asked) if isinstance(asked, str) else asker.draw(asked)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        return "application/json", json.dumps(found)

    def _answer(self, paths: Mapping[str, Callable[[], tuple[str, str]]]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            path = self.path.partition("?")[0]
            if path not in paths:
                raise Refused(HTTPStatus.NOT_FOUND, f"There is nothing at {path}.")
            kind, text = paths[path]()
        except Refused as refused:
            status, kind, text = refused.status, "application/json", json.dumps({"error": str(refused)})
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc()
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json"
            text = json.dumps({"error": "That went wrong. The terminal in which this page is served says more."})
        self._send(status, kind, text.encode())
        if status is HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            self._discard()

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
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
        """Let the sender come to its end, or it would not hear the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(2)
        with contextlib.suppress(OSError):
            while self.rfile.read1(MOST_BYTES):
                pass

    def _check_host(self) -> None:
        """A name that is not ours may be another site's, whose owner had it point here (DNS rebinding)."""
        ours = {self.server.host.lower(), "localhost", "127.0.0.1", self.connection.getsockname()[0]}
        asked = self.headers.get("Host", "")
        try:
            name = urlsplit(f"//{asked}").hostname
        except ValueError:
            name = None
        if name not in ours:
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"This page is not served as {asked!r} but as {', '.join(sorted(ours))}. For another name of this "
                "machine start it with host=NAME.",
            )

    def _body(self) -> str | int:
        """What the page sent: a question, or the number of a row."""
        if self.headers.get_content_type() != "application/json":  # which no other site's page can send unasked
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON, with Content-Type: application/json.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Send the length of the question, with Content-Length.")
        if int(length) > MOST_BYTES:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The question has {int(length):,} bytes, and {MOST_BYTES:,} are taken. Ask something shorter.",
            )
        try:
            asked = json.loads(self.rfile.read(int(length)))
            json.dumps(asked, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "What came is no JSON.") from None
        match asked:
            case {"question": str(question)}:
                return question
            case {"row": int(row)} if row is not True and row is not False:
                return row
        raise Refused(HTTPStatus.BAD_REQUEST, 'Send {"question": text} or {"row": number}, a whole one.')


def page() -> str:
    """The page in the colours of all pages."""
    light, dark = ("".join(f"--{name}: {value}; " for name, value in colours.items()) for colours in (LIGHT, DARK))
    rules = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
    return PAGE.read_text(encoding="utf-8").replace("/* colours */", rules)


def open_demo(config: DemoConfig) -> Asker:
    """The run's model, and the questions of its test file, else of its validation file."""
    from coconut.methods import Curriculum, plan
    from coconut.runs.loading import load_run

    trained = load_run(config.run, config.checkpoint, config.engine)
    file, examples = _rows(trained.config["data"])
    made = plan(trained.config["method"], Curriculum.from_dict(trained.config["curriculum"]))
    task = TASKS[trained.config["data"]["task"]]
    subject = Subject(trained.lm, task, examples, trained_with_fewer_thoughts=made.trained_with_fewer_thoughts)
    reasoning = trained.lm.reasoning
    about = {
        "run": Path(config.run).resolve().name,
        "method": reasoning.method,
        "stage": reasoning.stage,
        "step": trained.step,
        "slot": reasoning.slot.value,
        "trained_thoughts": subject.num_trained_thoughts,
        "task": task.name,
        "file": file,
        "rows": len(examples),
        "trained_with_fewer_thoughts": made.trained_with_fewer_thoughts,
        "warning": subject.warning,
    }
    return Asker(subject, about, config.engine.precision, config.max_new_tokens)


def _rows(data: Mapping[str, Any]) -> tuple[str, Sequence[Example]]:
    """The name of the file that questions are drawn from, and its rows; none if no such file is here."""
    from coconut.data.datasets import data_files
    from coconut.data.examples import read_examples

    files = data_files(data)
    path = Path(files["test"] or files["valid"])
    if not path.is_file():
        log(f"The run's data are not here, so that no question can be drawn: {path}")
        return "", ()
    return path.name, read_examples(path)


def run(config: DemoConfig) -> int:
    """Serve the page until Ctrl-C."""
    from coconut.engine.launcher_env import read_launcher_env
    from coconut.utils.console import silence_libraries

    if read_launcher_env().rank:
        return 0  # of several processes one is enough
    silence_libraries()
    with Server(config.host, config.port) as server:
        server.asker = open_demo(config)
        with contextlib.suppress(KeyboardInterrupt):
            log(f"The page is at {server.address} (Ctrl-C ends it)")
            if not str(server.server_address[0]).startswith("127."):
                log("Whoever can reach this machine can ask the model. host=127.0.0.1 keeps the page to this machine.")
            server.serve_forever()
        server.asker.lock.acquire()  # an answer that is being computed is finished, and none begins after it
    return 0


main = application("demo", DemoConfig, run)

if __name__ == "__main__":
    main()
