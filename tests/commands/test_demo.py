"""The demo: its answers equal those of the model, its requests are checked, and its page works in a browser."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import networkx
import pytest
import torch
from helpers.runs import graph_files, small_run

from coconut.analysis.config import DemoConfig
from coconut.analysis.graph_layout import place_nodes
from coconut.analysis.node_probabilities import name_probabilities, spell
from coconut.analysis.probes import EXTRA_THOUGHTS
from coconut.config import DataConfig, EngineConfig, TaskName
from coconut.data.tokenization import encode_questions
from coconut.demo import open_demo
from coconut.generation.generate import logit_lens
from coconut.methods import Curriculum, Unit
from coconut.reporting.demo_server import MAX_REQUEST_BYTES, DemoServer, demo_page
from coconut.reporting.plots import DARK, LIGHT
from coconut.runs.checkpoints import Checkpoints, load_state
from coconut.tasks import prosqa
from coconut.tasks.chain import read_answer
from coconut.training import trainer as train
from coconut.utils.files import read_json, write_json
from data_builders.prosqa import Form, Preset, ProsqaBuild, draw_row

pytestmark = pytest.mark.slow

OWN = 2
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")


@contextmanager
def served(run: Path) -> Iterator[DemoServer]:
    with DemoServer("127.0.0.1", 0) as server:
        server.model = open_demo(DemoConfig(run=str(run), engine=EngineConfig(device="cpu", threads=1)))
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def trained(folder: Path, data: DataConfig, **changes: Any) -> Path:
    """A run with two thoughts of its own, trained for a moment."""
    config = small_run(
        folder / "run",
        replace(data, cache_dir=str(folder / "tokens")),
        curriculum=Curriculum(
            max_stage=OWN, length_unit=Unit.updates, stage0_length=20, stage_length=20, total_length=60
        ),
        **changes,
    )
    assert train.run(config) == 0
    return folder / "run"


def files(folder: Path, task: TaskName, rows: list[dict[str, Any]]) -> DataConfig:
    for split in ("train", "valid"):
        write_json(folder / f"{split}.json", rows)
    return DataConfig(task, str(folder / "train.json"), str(folder / "valid.json"))


def sentences(seed: int, count: int) -> list[dict[str, Any]]:
    dials = ProsqaBuild(preset=Preset.graphs, nodes=8).graph_dials()
    drawn = (draw_row(random.Random(f"{seed} {i}"), lambda key: True, dials, Form.sentences) for i in range(count))
    return [found[0] for found in drawn if found]


@pytest.fixture(scope="module")
def symbols_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("symbols")
    return trained(folder, graph_files(folder, 64, 8, 20))


@pytest.fixture(scope="module")
def in_symbols(symbols_run: Path) -> Iterator[DemoServer]:
    with served(symbols_run) as server:
        yield server


@pytest.fixture(scope="module")
def in_sentences(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    """A run without a test file; its questions are those of the validation file."""
    folder = tmp_path_factory.mktemp("sentences")
    with served(trained(folder, files(folder, TaskName.prosqa, sentences(seed=0, count=16)))) as server:
        yield server


@pytest.fixture(scope="module", params=["cot", "pause"])
def without_thoughts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    folder = tmp_path_factory.mktemp(request.param)
    with served(trained(folder, graph_files(folder, 16, 8, 8), method=request.param)) as server:
        yield server


def request(server: DemoServer, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """The status and the body of the response: JSON, or the text of the page."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read().decode()
        return response.status, json.loads(text) if response.getheader("Content-Type") == "application/json" else text
    finally:
        connection.close()


def post(server: DemoServer, asked: Any) -> tuple[int, Any]:
    return request(server, "POST", "/ask", json.dumps(asked).encode(), Content_Type="application/json")


def ask(server: DemoServer, **asked: Any) -> Any:
    status, found = post(server, asked)
    assert status == 200, found
    return found


# --- replies --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["in_symbols", "in_sentences"])
def test_replies_equal_the_answers_of_the_model(form: str, request: pytest.FixtureRequest) -> None:
    server: DemoServer = request.getfixturevalue(form)
    subject, symbolic = server.model.subject, form == "in_symbols"
    lm, counts = subject.lm, range(OWN + EXTRA_THOUGHTS + 1)
    for row, example in list(enumerate(subject.examples))[:5]:
        found = ask(server, row=row)
        assert (found["row"], found["question"], found["right"]) == (row, example.question, example.answer)
        prompts = encode_questions(lm.tokenizer, [example.question], lm.reasoning.format)
        assert [one["thoughts"] for one in found["after"]] == list(counts)
        outs = [lm.generate(torch.tensor(prompts), num_thoughts=count) for count in counts]
        for one, out in zip(found["after"], outs, strict=True):
            assert (one["text"], one["truncated"]) == (out.texts[0].strip(), bool(out.truncated[0]))
            assert one["answer"] == read_answer(out.texts[0], subject.lm.reasoning.format)
            assert one["correct"] == subject.task.judge(one["answer"], example.answer)
        for said, expected in zip(found["thoughts"], logit_lens(lm, outs[-1].thoughts[0], 5), strict=True):
            assert [text for text, _ in said] == [text for text, _ in expected]
            assert [share for _, share in said] == pytest.approx([share for _, share in expected], rel=1e-3)
        nodes = [node["name"] for node in found["graph"]["nodes"]]
        spellings = spell(lm, nodes, symbolic)
        values = name_probabilities(lm, prompts, [[spellings[node] for node in nodes]], counts, 1)
        for count in counts:
            names = found["after"][count]["names"]
            if count == 0 and not symbolic:
                assert names is None, "a first step in sentences begins with the root"
            else:
                assert [names[node] for node in nodes] == pytest.approx(values[0, count], rel=1e-3)


@pytest.mark.parametrize("form", ["in_symbols", "in_sentences"])
def test_graph_of_the_reply_is_that_of_the_question(form: str, request: pytest.FixtureRequest) -> None:
    server: DemoServer = request.getfixturevalue(form)
    for row, example in list(enumerate(server.model.subject.examples))[:5]:
        shown, told = ask(server, row=row)["graph"], prosqa.graph(example.question)
        assert {tuple(edge) for edge in shown["edges"]} == set(told.edges)
        assert shown["root"] == told.graph["root"]
        assert tuple(shown["options"]) == told.graph["options"]
        assert shown["target"] == prosqa.read_target(example.answer)
        assert len(shown["way"]) - 1 == networkx.shortest_path_length(told, shown["root"], shown["target"])
        assert all(told.has_edge(*edge) for edge in networkx.utils.pairwise(shown["way"]))
        places = place_nodes(told, shown["root"])
        assert {node["name"]: (node["x"], -node["y"]) for node in shown["nodes"]} == places


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("0 3 | 3 5 | 1 4 ? 5 or 4 from 0", "5"),
        ("0 3 | 3 5 | 1 4 ? 4 or 5 from 1", "4"),
        ("0 3 | 3 5 | 1 4 ? 5 or 3 from 0", None),  # both
        ("0 3 | 3 5 | 1 4 ? 5 or 4 from 2", None),  # neither
        ("0 3 | 3 5 ? 5 or 5 from 0", None),
        ("0 3 | 3 0 ? 0 or 5 from 0", "0"),
    ],
)
def test_right_answer_of_a_typed_question_follows_from_its_graph(
    in_symbols: DemoServer, question: str, right: str | None
) -> None:
    found = ask(in_symbols, question=question)
    assert (found["row"], found["right"], found["graph"]["target"]) == (None, right, right)
    for one in found["after"]:
        assert one["correct"] is (None if right is None else one["answer"] == right)
    assert not found["notes"]


def test_words_outside_the_vocabulary_are_named(in_symbols: DemoServer) -> None:
    found = ask(in_symbols, question="0 3 | 3 zebra | 1 4 ? zebra or 4 from 0")
    assert found["notes"] == ["Not in the model's vocabulary: zebra."]
    assert [node["name"] for node in found["graph"]["nodes"]] == ["0", "3", "zebra", "1", "4"]
    assert set(found["after"][1]["names"]) == {"0", "3", "1", "4"}
    all_unknown = ask(in_symbols, question="a b ? b or c from a")
    assert [one["names"] for one in all_unknown["after"]] == [None] * (OWN + EXTRA_THOUGHTS + 1)


def test_a_question_without_a_graph_is_answered(in_symbols: DemoServer) -> None:
    found = ask(in_symbols, question="0 3 3")
    assert found["graph"] is None
    assert found["right"] is None
    assert [one["names"] for one in found["after"]] == [None] * (OWN + EXTRA_THOUGHTS + 1)
    assert found["notes"][0].startswith("The question describes no graph. The question ends neither in")


def test_methods_without_thoughts_are_answered_without_probabilities(without_thoughts: DemoServer) -> None:
    about = request(without_thoughts, "GET", "/about")[1]
    found = ask(without_thoughts, row=2)
    assert len(found["graph"]["nodes"]) > 2
    assert found["thoughts"] == []
    pauses = about["trained_thoughts"] + EXTRA_THOUGHTS if about["method"] == "pause" else 0
    assert [one["thoughts"] for one in found["after"]] == list(range(pauses + 1))
    assert {one["names"] for one in found["after"]} == {None}


def test_other_tasks_have_no_graph(tmp_path: Path) -> None:
    rows = [{"question": f"{a} + {b} = ?", "steps": [f"<<{a}+{b}={a + b}>>"], "answer": str(a + b)}
            for a in range(4) for b in range(4)]  # fmt: skip
    with served(trained(tmp_path, files(tmp_path, TaskName.gsm8k, rows))) as server:
        found = ask(server, row=5)
        assert (found["right"], found["graph"], found["notes"]) == ("2", None, [])
        assert len(found["after"]) == OWN + EXTRA_THOUGHTS + 1
        assert len(found["thoughts"]) == OWN + EXTRA_THOUGHTS
        assert ask(server, question="1 + 1 = ?")["right"] is None


def test_about_describes_the_run(in_symbols: DemoServer, in_sentences: DemoServer, symbols_run: Path) -> None:
    status, about = request(in_symbols, "GET", "/about")
    assert status == 200
    warning, step = about.pop("warning"), load_state(Checkpoints(symbols_run).find("best"))["step"]
    assert warning.startswith("The run was trained without mixing, so its last stage has 2 thoughts")
    assert about == {"run": "run", "method": "coconut", "stage": 2, "step": step, "slot": "thought",
                     "trained_thoughts": OWN, "task": "prosqa", "file": "test.json", "rows": 20,
                     "trained_with_fewer_thoughts": False}  # fmt: skip
    assert request(in_sentences, "GET", "/about")[1]["file"] == "valid.json"


def test_concurrent_questions_do_not_interfere(in_symbols: DemoServer) -> None:
    alone = [ask(in_symbols, row=row) for row in range(6)]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda row: ask(in_symbols, row=row), range(6)))
    assert together == alone


def test_demo_answers_without_its_data_file(
    symbols_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(symbols_run, tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["data"]["test"] = str(tmp_path / "away.json")
    write_json(tmp_path / "run" / "config.json", config)
    with served(tmp_path / "run") as server:
        assert "No question can be drawn" in capsys.readouterr().out
        assert request(server, "GET", "/about")[1]["rows"] == 0
        assert post(server, {"row": 0}) == (400, {"error": "There is no row 0. The run's data file is missing."})
        assert ask(server, question="0 3 | 3 5 ? 5 or 4 from 0")["right"] == "5"


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"question": " \n"}, "There is no question. Type one, or draw one."),
        ({"row": 20}, "There is no row 20. The rows are 0 to 19."),
        ({"row": -1}, "There is no row -1"),
        ({"row": True}, 'Send {"question": text} or {"row": number}'),
        ({"row": 1.5}, 'Send {"question": text} or {"row": number}'),
        ({"question": 5}, 'Send {"question": text} or {"row": number}'),
        ({}, 'Send {"question": text} or {"row": number}'),
        ([], 'Send {"question": text} or {"row": number}'),
        ({"question": "\ud800"}, "The request is not JSON"),
    ],
)
def test_invalid_questions_are_refused_with_a_reason(in_symbols: DemoServer, asked: Any, words: str) -> None:
    status, found = post(in_symbols, asked)
    assert status == 400
    assert words in found["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xff", b"[" * 50_000])
def test_bodies_that_are_not_json_are_refused(in_symbols: DemoServer, body: bytes) -> None:
    status, found = request(in_symbols, "POST", "/ask", body, Content_Type="application/json")
    assert (status, found) == (400, {"error": "The request is not JSON."})


def test_a_question_may_fill_the_context_but_not_exceed_it(in_symbols: DemoServer) -> None:
    lm = in_symbols.model.subject.lm
    room = lm.max_sequence_length - len(["<bot>", "<eot>", "answer"]) - (OWN + EXTRA_THOUGHTS)
    assert len(ask(in_symbols, question="3 " * room)["after"]) == OWN + EXTRA_THOUGHTS + 1
    status, found = post(in_symbols, {"question": "3 " * (room + 1)})
    assert status == 400
    assert found["error"] == (
        f"The question has {room + 1} tokens, which leaves no room for 4 thoughts and an answer in the model's context "
        "of 96 tokens. Ask something shorter."
    )


@pytest.mark.parametrize("path", ["/nothing", "/ask", "/../config.json", "//127.0.0.1/", "/about/", "/%2e%2e/demo.py"])
def test_other_paths_are_not_found(in_symbols: DemoServer, path: str) -> None:
    status, found = request(in_symbols, "GET", path)
    assert status == 404
    assert found["error"].startswith("There is nothing at /")
    assert request(in_symbols, "POST", path.replace("ask", "/"), b"{}")[0] == 404


def test_bodies_of_wrong_size_or_type_are_refused(in_symbols: DemoServer) -> None:
    least = json.dumps({"question": "0 3 ? 3 or 4 from 0"}).encode()
    for size, expected in ((MAX_REQUEST_BYTES, 200), (MAX_REQUEST_BYTES + 1, 413), (50 * MAX_REQUEST_BYTES, 413)):
        status, found = request(in_symbols, "POST", "/ask", least.ljust(size), Content_Type="application/json")
        assert status == expected, found
    assert request(in_symbols, "POST", "/ask", least)[0] == 415
    assert request(in_symbols, "POST", "/ask", least, Content_Type="text/plain")[0] == 415
    kind = {"Content_Type": "application/json"}
    assert request(in_symbols, "POST", "/ask", least, Content_Length="-1", **kind)[0] == 411


def test_a_body_announced_too_large_is_refused_at_once(in_symbols: DemoServer) -> None:
    with socket.create_connection(("127.0.0.1", in_symbols.server_port), timeout=20) as connection:
        kind = "Content-Type: application/json\r\nContent-Length: 100001"
        connection.sendall(f"POST /ask HTTP/1.0\r\nHost: localhost\r\n{kind}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(100)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", "", "10.0.0.1"])
def test_other_host_names_are_refused(in_symbols: DemoServer, host: str) -> None:
    for method, path in (("GET", "/"), ("GET", "/about"), ("POST", "/ask")):
        status, found = request(in_symbols, method, path, b"{}", Host=host, Content_Type="application/json")
        assert status == 421
        assert found["error"].startswith(f"This page is served as 127.0.0.1, localhost, not as {host!r}.")


def test_host_names_are_case_insensitive(in_symbols: DemoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_symbols, "host", "MyMachine")
    assert request(in_symbols, "GET", "/about", Host="mymachine:8000")[0] == 200
    assert request(in_symbols, "GET", "/about", Host="MyMachine")[0] == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1:1", "LOCALHOST"])
def test_localhost_with_any_port_is_accepted(in_symbols: DemoServer, host: str) -> None:
    assert request(in_symbols, "GET", "/about", Host=host)[0] == 200


def test_a_request_without_a_host_is_refused(in_symbols: DemoServer) -> None:
    with socket.create_connection(("127.0.0.1", in_symbols.server_port), timeout=60) as connection:
        connection.sendall(b"GET /about HTTP/1.0\r\n\r\n")
        assert b" 421 " in connection.recv(100)


def test_a_closed_connection_is_no_error(in_symbols: DemoServer, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", in_symbols.server_port), timeout=60) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave at once
            connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert request(in_symbols, "GET", "/about")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_named(in_symbols: DemoServer) -> None:
    port = in_symbols.server_port
    with pytest.raises(ValueError, match=rf"Port {port} is taken by another program. Choose another: port={port + 1}"):
        DemoServer("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"The page cannot be served at host=203.0.113.7 port=0 .* Use host=127.0.0.1"):
        DemoServer("203.0.113.7", 0)
    for keys, words in (
        ({"port": 65536}, "port is 65536"),
        ({"port": -1}, "port is -1"),
        ({"host": ""}, "host= is no IPv4 address"),
        ({"host": "::1"}, "host=::1 is no IPv4 address"),
        ({"run": ""}, "Name the run"),
    ):
        with pytest.raises(ValueError, match=words):
            DemoConfig(**{"run": "r", **keys})


def test_ctrl_c_ends_it_quietly(symbols_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coconut.demo", f"run={symbols_run}", "port=0", "engine.device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert re.fullmatch(r"The page is at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert not list(tmp_path.iterdir())


# --- the page -------------------------------------------------------------------------------------


def test_the_page_loads_no_other_file(in_symbols: DemoServer) -> None:
    status, text = request(in_symbols, "GET", "/?x=1")
    assert (status, text) == (200, demo_page())
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,"}
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in re.sub(r"url\(#", "", text)
    for name in set(re.findall(r"var\(--(\w+)", text)) - {"share", "at"}:
        assert f"--{name}: {LIGHT[name]};" in text
        assert f"--{name}: {DARK[name]};" in text


def shown(server: DemoServer, address: str, folder: Path) -> str:
    """The DOM of the page in a browser, after its scripts have run."""
    assert BROWSER
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *options, "--virtual-time-budget=5000", "--dump-dom", f"{server.address}{address}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(dom: str, name: str) -> str:
    """The text of the element with this id, which has no child elements."""
    [text] = re.findall(rf'id="{name}"[^>]*>([^<]*)<', dom)
    return html.unescape(text)


@in_browser
def test_the_graph_the_probabilities_and_the_answer_in_a_browser(in_symbols: DemoServer, tmp_path: Path) -> None:
    found = ask(in_symbols, row=0)
    after, nodes = found["after"][1], [node["name"] for node in found["graph"]["nodes"]]
    dom = shown(in_symbols, "#row=0&thoughts=1", tmp_path)
    graph = found["graph"]
    roles = dict.fromkeys(graph["options"], "other") | {graph["root"]: "root", graph["target"]: "target"}
    drawn = re.findall(r'<g class="node ?(\w*)" data-node="(\w+)"', dom)
    assert drawn == [(roles.get(name, ""), name) for name in nodes]
    assert dom.count('class="edge way"') == len(graph["way"]) - 1
    assert dom.count('class="edge') == len(graph["edges"])
    assert 'aria-valuetext="1 thought"' in dom
    assert text_of(dom, "answer-title") == "Answer after 1 thought"
    assert text_of(dom, "given") == ("no answer" if after["answer"] is None else after["answer"] or "nothing")
    assert text_of(dom, "verdict").startswith(
        "✓ right" if after["correct"] else f"✗ wrong, the right answer: {found['right']}"
    )
    assert text_of(dom, "wrote").startswith(after["text"])
    bars = re.findall(r'<li class="(?:faint)?" data-node="(\w+)" style="--share: ([^;]+);">', dom)
    assert [name for name, _ in bars] == nodes
    assert [float(share) for _, share in bars] == pytest.approx([after["names"][name] for name in nodes], rel=1e-4)
    assert dom.count('<li class="later">') == OWN + EXTRA_THOUGHTS - 1
    assert "row 0 of test.json" in text_of(dom, "source")


@in_browser
def test_a_typed_question_in_a_browser(in_sentences: DemoServer, tmp_path: Path) -> None:
    question = in_sentences.model.subject.examples[1].question
    dom = shown(in_sentences, f"#question={question.replace(' ', '+')}&thoughts=99", tmp_path)
    assert 'aria-valuetext="4 thoughts"' in dom
    assert text_of(dom, "given")
    assert dom.count('<g class="node') == len(prosqa.graph(question))
    assert "has 2 thoughts and no other number" in text_of(dom, "output")


@in_browser
def test_without_thoughts_there_is_no_slider_in_a_browser(without_thoughts: DemoServer, tmp_path: Path) -> None:
    dom = shown(without_thoughts, "", tmp_path)
    has_slider = without_thoughts.model.about["method"] == "pause"
    assert ('id="slider" hidden' in dom) is not has_slider
    assert text_of(dom, "given")
    for name in ("next-panel", "thoughts-panel"):
        assert re.search(rf'id="{name}"[^>]*hidden', dom)


@in_browser
def test_a_refusal_in_a_browser(in_symbols: DemoServer, tmp_path: Path) -> None:
    dom = shown(in_symbols, "#row=20&thoughts=1", tmp_path)
    assert "There is no row 20. The rows are 0 to 19." in dom
    assert re.search(r'<div id="result"[^>]*hidden', dom)
