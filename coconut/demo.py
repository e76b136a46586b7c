"""A page to play with a trained model: a question, and what the model does with it after each number of thoughts.

`Demo` asks the model, all numbers of thoughts at once; `Server` brings it to the browser.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import networkx
import torch

from coconut.analysis.names import Spelling, name_probabilities, spell
from coconut.analysis.plots import DARK, LIGHT, place_nodes
from coconut.analysis.probes import MORE, SHOWN_TOKENS, Subject
from coconut.cli import application
from coconut.config import DemoConfig, Precision
from coconut.data import encode_questions, unknown_id
from coconut.evaluate import read_answer
from coconut.generate import likeliest
from coconut.layout import slot_ids
from coconut.methods import Slot
from coconut.screen import say
from coconut.tasks import TASKS, prosqa

if TYPE_CHECKING:
    from coconut.data import Example
    from coconut.model import LatentLM

MOST_BYTES = 100_000  # of what a browser may send
PAGE = Path(__file__).with_name("demo.html")


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """A trained model and the rows whose questions can be drawn. It answers one question at a time.

    `about`: what the page says of the run.
    """

    subject: Subject
    about: dict[str, Any]
    precision: Precision = Precision.float32
    max_new_tokens: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def draw(self, row: int) -> dict[str, Any]:
        """As `ask`, the question of a row of the run's file. Raises ValueError if there is no such row."""
        examples = self.subject.examples
        if not 0 <= row < len(examples):
            there = f"The rows are 0 to {len(examples) - 1}" if examples else "No file of the run's data is here"
            raise ValueError(f"There is no row {row}. {there}.")
        return self.ask(examples[row].question, examples[row].answer) | {"row": row}

    def ask(self, question: str, right: str | None = None) -> dict[str, Any]:
        """What the page shows of a question: its graph, the thoughts, and what follows each number of them.

        `right`: the right answer; by default the one that the question's graph decides, if it does.
        Raises ValueError if there is no question, or no room for it in the model's context.
        """
        from coconut.engine.base import autocast

        if not question.strip():
            raise ValueError("There is no question. Type one, or draw one.")
        lm, task = self.subject.lm, self.subject.task
        parsed, notes = None, []
        if task.name == prosqa.name:
            try:
                parsed = prosqa.parse_question(question)
            except ValueError as error:
                notes.append(f"This tells no graph. {error}")
        right = right or (parsed and right_answer(question, parsed))
        with self.lock, autocast(lm.device, self.precision):
            if unknown := unknown_words(lm, question):
                notes.append(f"The model has no word for {', '.join(unknown)}.")
            spellings = spell_nodes(lm, parsed) if parsed and self._thinks else {}
            prompt = self._prompt(question, spellings)
            after, thoughts = self._after_each(prompt, right)
            names = self._names(prompt, spellings, symbolic=bool(parsed and parsed.symbolic))
        return {
            "row": None,
            "question": question,
            "right": right,
            "notes": notes,
            "graph": parsed and picture(question, parsed, right),
            "thoughts": thoughts,
            "after": [one | {"names": names.get(one["thoughts"])} for one in after],
        }

    @property
    def counts(self) -> list[int]:
        """The numbers of thoughts, or of pauses, that a question is asked with."""
        most = 0 if self.subject.lm.reasoning.slot is Slot.nothing else self.subject.own + MORE
        return list(range(most + 1))

    @property
    def _thinks(self) -> bool:
        return self.subject.lm.reasoning.slot is Slot.thought

    def _prompt(self, question: str, spellings: Mapping[str, Spelling]) -> list[int]:
        """The question's tokens. Raises ValueError if the most thoughts and a name leave no room for them."""
        lm, most = self.subject.lm, self.counts[-1]
        [prompt] = encode_questions(lm.tokenizer, [question], lm.reasoning.format)
        name = max((len(spelling.before) + len(spelling.name) for spelling in spellings.values()), default=1)
        if len(prompt) + len(slot_ids(lm.reasoning, lm.special, most)) + name > lm.context:
            slot = f"{most} {lm.reasoning.slot.value}s and " if most else ""
            raise ValueError(
                f"The question has {len(prompt):,} tokens, which leaves no room for {slot}an answer in the model's "
                f"context of {lm.context:,} tokens. Ask something shorter."
            )
        return prompt

    def _after_each(self, prompt: list[int], right: str | None) -> tuple[list[dict[str, Any]], list[Any]]:
        """What the model says after each number of thoughts, and the likeliest tokens of each thought."""
        lm, task, counts = self.subject.lm, self.subject.task, self.counts
        ids_BT = torch.tensor([prompt]).expand(len(counts), -1)
        out = lm.generate(ids_BT, num_thoughts=counts, max_new_tokens=self.max_new_tokens)
        found = []
        for count, text, cut in zip(counts, out.texts, out.cut.tolist(), strict=True):
            answer = read_answer(task, text, lm.reasoning.format)
            correct = None if right is None else task.judge(answer, right)
            found.append({"thoughts": count, "text": text.strip(), "answer": answer, "correct": correct, "cut": cut})
        return found, likeliest(lm, out.thoughts[-1], SHOWN_TOKENS) if self._thinks else []

    def _names(
        self, prompt: list[int], spellings: Mapping[str, Spelling], symbolic: bool
    ) -> dict[int, dict[str, float]]:
        """By number of thoughts: how likely each node is to be named by the next step.

        In sentences the first step begins with the root, so that nothing is to be seen before it is thought.
        """
        if not spellings:
            return {}
        lm = self.subject.lm
        counts = [count for count in self.counts if symbolic or count >= lm.reasoning.thoughts_per_step]
        values = name_probabilities(lm, [prompt], [list(spellings.values())], counts, batch_size=1)
        return {count: dict(zip(spellings, values[0, count], strict=True)) for count in counts}


def spell_nodes(lm: LatentLM, parsed: prosqa.Question) -> dict[str, Spelling]:
    """How the names of the nodes are encoded, but for those that the tokenizer has no word for."""
    nodes = dict.fromkeys(node for pair in [*parsed.edges, (parsed.root, parsed.root), parsed.options] for node in pair)
    unknown = unknown_id(lm.tokenizer)
    spellings = spell(lm, list(nodes), parsed.symbolic)
    return {node: spelling for node, spelling in spellings.items() if unknown not in spelling.name}


def unknown_words(lm: LatentLM, text: str) -> list[str]:
    """The words of a text that the tokenizer has no entry for."""
    encoded: Any = lm.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    unknown = unknown_id(lm.tokenizer)
    return list(dict.fromkeys(text[left:right] for token, (left, right) in places if token == unknown))


def right_answer(question: str, parsed: prosqa.Question) -> str | None:
    """The answer that the graph decides: the only option that the root reaches."""
    reached = {parsed.root, *networkx.descendants(prosqa.graph(question), parsed.root)}
    answers = zip(parsed.options, prosqa.candidates(question) or (), strict=True)
    found = [answer for option, answer in answers if option in reached]
    return found[0] if len(found) == 1 else None


def picture(question: str, parsed: prosqa.Question, right: str | None) -> dict[str, Any]:
    """The graph to be drawn: its nodes with column and row, in the order of their distance from the root."""
    told = prosqa.graph(question)
    places = place_nodes(told, parsed.root)
    distance = dict(networkx.single_source_shortest_path_length(told, parsed.root))
    target = prosqa.read_target(right) if right else None
    order = sorted(told, key=lambda node: (node not in distance, places[node][0], -places[node][1]))
    return {
        "nodes": [{"name": node, "x": places[node][0], "y": -places[node][1]} for node in order],
        "edges": list(told.edges),
        "root": parsed.root,
        "options": parsed.options,
        "target": target,
        "way": networkx.shortest_path(told, parsed.root, target) if target in distance else [],
        "symbolic": parsed.symbolic,
    }


# --- serving --------------------------------------------------------------------------------------


class Refused(Exception):
    """A request that is not answered, with the reason for the user."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """Brings a demo to the browser. Raises ValueError if it cannot be served there."""

    demo: Demo

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
        return "application/json", json.dumps(self.server.demo.about)

    def _ask(self) -> tuple[str, str]:
        asked, demo = self._body(), self.server.demo
        try:
            found = demo.ask(asked) if isinstance(asked, str) else demo.draw(asked)
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
        ours = {self.server.host, "localhost", "127.0.0.1", self.connection.getsockname()[0]}
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
        if not length.isdecimal():
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
            case {"row": int(row)}:
                return row
        raise Refused(HTTPStatus.BAD_REQUEST, 'Send {"question": text} or {"row": number}, a whole one.')


def page() -> str:
    """The page in the colours of all pages."""
    light, dark = ("".join(f"--{name}: {value}; " for name, value in colours.items()) for colours in (LIGHT, DARK))
    rules = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}"
    return PAGE.read_text(encoding="utf-8").replace("/* colours */", rules)


# --- the command ----------------------------------------------------------------------------------


def open_demo(config: DemoConfig) -> Demo:
    """The run's model, and the questions of its test file, else of its validation file."""
    from coconut.build import load_run
    from coconut.methods import Curriculum, plan

    trained = load_run(config.run, config.checkpoint, config.engine)
    file, examples = _rows(trained.config["data"])
    made = plan(trained.config["method"], Curriculum.from_dict(trained.config["curriculum"]))
    task = TASKS[trained.config["data"]["task"]]
    subject = Subject(trained.lm, task, examples, knows_fewer=made.knows_fewer)
    reasoning = trained.lm.reasoning
    about = {
        "run": Path(config.run).resolve().name,
        "method": reasoning.method,
        "stage": reasoning.stage,
        "step": trained.step,
        "slot": reasoning.slot.value,
        "own": subject.own,
        "task": task.name,
        "file": file,
        "rows": len(examples),
        "knows_fewer": made.knows_fewer,
        "warning": subject.warning,
    }
    return Demo(subject, about, config.engine.precision, config.max_new_tokens)


def _rows(data: Mapping[str, Any]) -> tuple[str, Sequence[Example]]:
    """The name of the file that questions are drawn from, and its rows; none if no such file is here."""
    from coconut.data import read_examples
    from coconut.sources import data_files

    files = data_files(data)
    path = Path(files["test"] or files["valid"])
    if not path.is_file():
        say(f"The run's data are not here, so that no question can be drawn: {path}")
        return "", ()
    return path.name, read_examples(path)


def run(config: DemoConfig) -> int:
    """Serve the page until Ctrl-C."""
    from coconut.engine.world import seat
    from coconut.screen import only_our_words

    if seat().rank:
        return 0  # of several processes one is enough
    only_our_words()
    with Server(config.host, config.port) as server:
        server.demo = open_demo(config)
        with contextlib.suppress(KeyboardInterrupt):
            say(f"The page is at {server.address} (Ctrl-C ends it)")
            if not str(server.server_address[0]).startswith("127."):
                say("Whoever can reach this machine can ask the model. host=127.0.0.1 keeps the page to this machine.")
            server.serve_forever()
        server.demo.lock.acquire()  # an answer that is being computed is finished, and none begins after it
    return 0


main = application("demo", DemoConfig, run)

if __name__ == "__main__":
    main()
