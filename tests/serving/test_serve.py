"""The server, asked by OpenAI's client: its answers are those of the package, alone and in batches."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
import torch
from helpers.models import build, hybrid, subject
from helpers.processes import forked_command
from transformers import AutoModelForCausalLM

from coconut import LatentLM
from coconut.analysis.interactive import InteractiveModel
from coconut.config import EngineConfig, Precision
from coconut.data.tokenization import encode_chat, encode_questions
from coconut.generation.generate import answer, logit_lens
from coconut.hub.folder import write_folder
from coconut.methods import PromptFormat
from coconut.runs.loading import load_model
from coconut.serving.batching import Batcher, Job, cut_at, settled
from coconut.serving.config import ServeConfig
from coconut.serving.protocol import Settings
from coconut.serving.server import listening, make_server

TOKEN = "a-secret"
QUESTION = "5 6 7"
QUESTIONS = [" ".join(str(number % 40) for number in range(first, first + 1 + first % 5)) for first in range(12)]
TEMPLATE = (
    "{% for m in messages %}{{ '1 2 ' if m.role == 'user' else '3 4 ' }}{{ m.content }}{{ ' 9 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '7 7 ' }}{% endif %}"
)


@contextmanager
def served(lm: LatentLM, **changes: Any) -> Iterator[int]:
    """The port of a server of this model, named tiny."""
    config = ServeConfig(run="tiny", port=0, engine=EngineConfig(device="cpu", threads=1), **changes)
    with listening(config.host, config.port) as listener:
        server = make_server(lm, config)
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def client_of(port: int, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, **options)


@pytest.fixture(scope="module")
def lm() -> LatentLM:
    return build("llama", num_thoughts=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def port(lm: LatentLM) -> Iterator[int]:
    with served(lm, token=TOKEN, max_body_kb=10) as found:
        yield found


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with client_of(port) as made:
        yield made


def asked_as_chat(client: Any, question: str = QUESTION, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": question}], **fields)


# --- answers ----------------------------------------------------------------------------------------


def test_answers_and_counts_are_those_of_the_package(lm: LatentLM, client: openai.OpenAI) -> None:
    alone = [answer(lm, [question]) for question in QUESTIONS]
    texts = [out.texts[0].strip() for out in alone]
    assert len(set(texts)) > len(texts) // 2
    completion = client.completions.create(model="tiny", prompt=QUESTIONS)
    assert [choice.text for choice in completion.choices] == texts
    chats = [asked_as_chat(client, question) for question in QUESTIONS[:3]]
    assert [chat.choices[0].message.content for chat in chats] == texts[:3]
    for question, out, chat in zip(QUESTIONS, alone, chats, strict=False):
        [ids] = encode_questions(lm.tokenizer, [question], lm.reasoning.format)
        written, usage = 2 + int(out.lengths[0]), chat.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), written)
        assert usage.total_tokens == len(ids) + written
        assert usage.completion_tokens_details.reasoning_tokens == 2
        assert chat.choices[0].finish_reason == ("length" if out.truncated[0] else "stop")


def test_four_ways_to_ask_give_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, transformers with the exported folder, the demo, and the server with that folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    lm, folder = build("llama", torch.float32, num_thoughts=2, max_new_tokens=8), tmp_path / "tiny"
    write_folder(lm, folder, "")
    exported: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    demo = InteractiveModel(subject(lm, []), {})
    opened = load_model(str(folder), "best", EngineConfig(device="cpu", threads=1))
    with served(opened) as port, client_of(port) as client:
        for question in QUESTIONS[:4]:
            ids = torch.tensor(encode_questions(lm.tokenizer, [question], lm.reasoning.format))
            new = exported.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
            ways = [
                answer(lm, [question]).texts[0].strip(),
                str(lm.tokenizer.decode(new, skip_special_tokens=True)).strip(),
                demo.ask(question)["after"][2]["text"],
                asked_as_chat(client, question).choices[0].message.content,
            ]
            assert len(set(ways)) == 1, ways


def test_thoughts_are_decoded_and_counted(lm: LatentLM, client: openai.OpenAI) -> None:
    extra: Any = {"num_thoughts": 3, "decode_thoughts": True}
    choice = asked_as_chat(client, extra_body=extra, max_completion_tokens=5).choices[0]
    out = answer(lm, [QUESTION], num_thoughts=3, max_new_tokens=5)
    assert choice.message.content == out.texts[0].strip()
    assert choice.num_thoughts == 3
    for found, expected in zip(choice.thoughts, logit_lens(lm, out.thoughts[0]), strict=True):
        assert [text for text, _ in found] == [text for text, _ in expected]
        torch.testing.assert_close([p for _, p in found], [p for _, p in expected])


def test_sampled_answers_have_keys_of_seed_question_and_sample(lm: LatentLM, client: openai.OpenAI) -> None:
    keys = [(5, number, sample) for number in range(2) for sample in range(2)]
    sampling: Any = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2}
    expected = answer(lm, QUESTIONS[:2], random_keys=keys, **sampling)
    found = client.completions.create(model="tiny", prompt=QUESTIONS[:2], n=2, seed=5, temperature=1.5, top_p=0.9)
    assert [choice.text for choice in found.choices] == [text.strip() for text in expected.texts]
    assert len({choice.text for choice in found.choices}) == 4
    chosen = asked_as_chat(client, temperature=1.5)
    again = asked_as_chat(client, temperature=1.5, seed=chosen.seed)
    assert again.choices[0].message.content == chosen.choices[0].message.content


@pytest.mark.parametrize("stop", [None, ["2"]])
def test_a_stream_is_the_answer_in_parts(lm: LatentLM, client: openai.OpenAI, stop: list[str] | None) -> None:
    settings: Any = {"temperature": 1.0, "seed": 3, "n": 2, "stop": stop}
    whole = asked_as_chat(client, **settings)
    parts = list(asked_as_chat(client, stream=True, stream_options={"include_usage": True}, **settings))
    for index, choice in enumerate(whole.choices):
        own = [part.choices[0] for part in parts if part.choices and part.choices[0].index == index]
        texts = [each.delta.content for each in own if each.delta.content]
        assert "".join(texts) == choice.message.content
        assert len(texts) > 2 or stop
        assert own[-1].finish_reason == choice.finish_reason
    assert parts[-1].usage == whole.usage
    pieces = client.completions.create(model="tiny", prompt=QUESTION, stream=True)
    assert "".join(part.choices[0].text for part in pieces) == answer(lm, [QUESTION]).texts[0].strip()


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI) -> None:
    text = asked_as_chat(client).choices[0].message.content
    stop = text.split()[3]
    stopped = asked_as_chat(client, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)].strip()
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        (" a b ", (), "a b"),
        ("a b##", ("###",), "a b"),
        ("a ### b", ("###", "b"), "a"),
        ("caf\N{REPLACEMENT CHARACTER}", (), "caf"),
        ("a#b", ("###",), "a#b"),
    ],
)
def test_what_is_streamed_does_not_change(text: str, stops: tuple[str, ...], expected: str) -> None:
    assert settled(text, stops) == expected
    assert cut_at(text, stops).strip().startswith(expected)


def test_a_hybrid_model_chooses_or_is_told_its_mode() -> None:
    lm = hybrid()
    with served(lm) as port, client_of(port) as client:
        free, out = asked_as_chat(client, max_tokens=6).choices[0], answer(lm, [QUESTION], max_new_tokens=6)
        assert (free.mode, free.message.content) == (out.modes[0], out.texts[0].strip())
        for mode in lm.reasoning.modes:
            forced = asked_as_chat(client, max_tokens=6, extra_body={"mode": mode}).choices[0]
            out = answer(lm, [QUESTION], max_new_tokens=6, mode=mode)
            assert (forced.mode, forced.message.content) == (mode, out.texts[0].strip())
            assert forced.num_thoughts == int(out.num_thoughts[0])
        with pytest.raises(openai.BadRequestError, match="mode sets the number of its thoughts"):
            asked_as_chat(client, extra_body={"num_thoughts": 1})


def test_a_chat_template_takes_history_and_system_messages() -> None:
    lm = build("llama", num_thoughts=2, max_new_tokens=8, format=PromptFormat("{}", chat=True))
    lm.tokenizer.chat_template = TEMPLATE
    history = [("system", "8 8"), ("user", "5 6"), ("assistant", "7"), ("user", "8")]
    ids = encode_chat(lm.tokenizer, history, lm.reasoning.format)
    written = "3 4 8 8 9 1 2 5 6 9 3 4 7 9 1 2 8 9 7 7"
    assert str(lm.tokenizer.decode(ids)).split() == written.split()
    assert encode_chat(lm.tokenizer, [("user", "5 6")], lm.reasoning.format) == encode_questions(
        lm.tokenizer, ["5 6"], lm.reasoning.format
    )[0]  # fmt: skip
    with served(lm) as port, client_of(port) as client:
        messages: Any = [{"role": role, "content": text} for role, text in history]
        found = client.chat.completions.create(model="tiny", messages=messages)
        assert found.choices[0].message.content == lm.generate(torch.tensor([ids])).texts[0].strip()
        assert asked_as_chat(client).choices[0].message.content == answer(lm, [QUESTION]).texts[0].strip()


# --- many at once -----------------------------------------------------------------------------------


def test_a_hundred_requests_at_once(lm: LatentLM, port: int) -> None:
    """Of four kinds. Each gets its own answer, as it would alone."""
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.2, "seed": 4}, {"max_tokens": 3}, {"stop": ["3"]}]

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0) as client:
            return await asyncio.gather(
                *(asked_as_chat(client, QUESTIONS[i % 12], **kinds[i % 4]) for i in range(100))
            )  # fmt: skip

    found = asyncio.run(all_of_them())
    options: list[dict[str, Any]] = [
        {}, {"do_sample": True, "temperature": 1.2, "random_keys": [(4, 0, 0)]}, {"max_new_tokens": 3},
        {"stop_strings": ["3"]},
    ]  # fmt: skip
    expected = [cut_at(answer(lm, [QUESTIONS[i]], **options[i % 4]).texts[0], ["3"] * (i % 4 == 3)) for i in range(12)]
    assert [one.choices[0].message.content for one in found] == [expected[i % 12].strip() for i in range(100)]


def batches_of(lm: LatentLM, jobs: list[Job], max_batch: int) -> list[Any]:
    """What the jobs are told at their end, answered by a batcher of their own."""
    told: dict[int, Any] = {}
    for number, job in enumerate(jobs):
        job.tell = lambda event, number=number: told.__setitem__(number, event)
    batcher = Batcher(lm, Precision.float32, max_batch, 0.05, 100)
    batcher.submit(jobs)
    end = time.monotonic() + 30
    while len(told) < sum(not job.cancelled for job in jobs) and time.monotonic() < end:
        time.sleep(0.002)
    batcher.close()
    return [told.get(number) for number in range(len(jobs))]


def test_an_answer_does_not_depend_on_its_batch(lm: LatentLM) -> None:
    rows = encode_questions(lm.tokenizer, QUESTIONS, lm.reasoning.format)
    settings = Settings(8, n=2, temperature=1.3, top_p=0.95)

    def jobs() -> list[Job]:
        return [Job(row, settings, [(9, i, 0), (9, i, 1)], lambda event: None) for i, row in enumerate(rows)]

    alone, together, some = (batches_of(lm, jobs(), size) for size in (1, 24, 7))
    assert alone == together == some


def test_a_failing_question_fails_alone_and_a_cancelled_one_is_dropped(lm: LatentLM) -> None:
    rows = encode_questions(lm.tokenizer, QUESTIONS[:3], lm.reasoning.format)
    rows.append([5] * lm.max_sequence_length)
    jobs = [Job(row, Settings(4), [(0, 0, 0)], lambda event: None) for row in rows]
    jobs[1].cancelled = True
    told = batches_of(lm, jobs, 16)
    assert told[1] is None
    assert isinstance(told[3], ValueError)
    for number in (0, 2):
        expected = answer(lm, [QUESTIONS[number]], max_new_tokens=4).texts[0].strip()
        assert told[number][0].text == expected


def test_a_watcher_sees_each_token_and_ends_its_answer(lm: LatentLM) -> None:
    whole = answer(lm, QUESTIONS[:3])
    seen: list[list[int]] = [[], [], []]

    def watcher(row: int, most: int) -> Any:
        def watch(token: int) -> bool:
            seen[row].append(token)
            return len(seen[row]) == most

        return watch

    keys = [(0, row) for row in range(3)]
    out = answer(lm, QUESTIONS[:3], random_keys=keys, watchers=[watcher(0, 3), watcher(1, 99), watcher(2, 1)])
    for row, most in enumerate((3, 99, 1)):
        assert seen[row] == whole.completion_ids(row)[:most]
        assert out.tokens[row, : int(out.lengths[row])].tolist() == [
            token for token in seen[row] if token != lm.special.eos
        ]
    with pytest.raises(ValueError, match="3 watchers for 0 random_keys"):
        answer(lm, QUESTIONS[:3], watchers=[watcher(row, 1) for row in range(3)])


# --- what is refused --------------------------------------------------------------------------------


def post(port: int, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """The status, the body and the headers of the response."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, data, given)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 3}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0, "temperature": 1}, "top_p"),
    ({"top_p": 0.5}, "top_p"),
    ({"n": 2}, "n"),
    ({"n": 17, "temperature": 1}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1000}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"seed": -1}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 0}, "logprobs"),
    ({"thoughts": 3}, "thoughts"),
    ({"mode": "think"}, "mode"),
    ({"num_thoughts": -1}, "num_thoughts"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [1, 2]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "5 " * 97}, "prompt"),
    ({"prompt": "5", "num_thoughts": 96}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=repr)
def test_a_bad_field_is_named(port: int, fields: dict[str, Any], param: str) -> None:
    status, body, _ = post(port, "/v1/completions", {"prompt": QUESTION, **fields})
    assert (status, body["error"]["param"], body["error"]["type"]) == (400, param, "invalid_request_error")
    assert param in body["error"]["message"] or "tokens" in body["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user", "content": ""}], "messages[0].content"),
        ([{"role": "tool", "content": "5"}], "messages[0].role"),
        ([{"role": "user", "content": "5", "name": "a"}], "messages[0].name"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "system", "content": "5"}, {"role": "user", "content": "5"}], "messages"),
        ([{"role": "assistant", "content": "5"}], "messages"),
    ],
)
def test_a_bad_message_is_named(port: int, messages: list[Any], param: str) -> None:
    status, body, _ = post(port, "/v1/chat/completions", {"messages": messages})
    assert (status, body["error"]["param"]) == (400, param), body


def test_what_asks_for_nothing_is_taken(lm: LatentLM, port: int) -> None:
    nothing = {"logprobs": False, "tools": [], "frequency_penalty": 0.0, "stop": None, "user": "me", "top_p": 1}
    content = [{"type": "text", "text": "5 "}, {"type": "text", "text": "6 7"}]
    status, body, _ = post(
        port, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **nothing}
    )
    assert status == 200, body
    assert body["choices"][0]["message"]["content"] == answer(lm, [QUESTION]).texts[0].strip()
    status, body, _ = post(port, "/v1/completions", {"prompt": "5 unheard"})
    assert body["choices"][0]["unknown"] == ["unheard"]


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        (b"{", {}, 400),
        (b'"\\ud800"', {}, 400),
        (b"[" * 5000, {}, 400),
        (b" " * 20_000, {}, 413),
        ({"prompt": "5"}, {"Content_Type": "text/plain"}, 415),
        ({"prompt": "5"}, {"Authorization": "Bearer another"}, 401),
        ({"prompt": "5", "model": "gpt-4"}, {}, 404),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused(port: int, body: Any, headers: dict[str, str], expected: int) -> None:
    status, content, _ = post(port, "/v1/completions", body, **headers)
    assert status == expected
    assert content["error"]["message"]


def test_models_health_and_unknown_paths(port: int, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").num_thoughts == 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError), client.with_options(api_key="wrong") as other:
        other.models.list()
    assert post(port, "/v1/embeddings", {})[0] == 404
    assert post(port, "/health", {})[0] == 405


def test_a_name_that_is_not_the_servers_needs_a_token(lm: LatentLM) -> None:
    with served(lm) as port:
        assert post(port, "/v1/completions", {"prompt": "5"})[0] == 200
        status, body, _ = post(port, "/v1/completions", {"prompt": "5"}, Host="evil.example")
        assert (status, "evil.example" in body["error"]["message"]) == (421, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": "0.0.0.0"}, "Set a token"),
        ({"host": "192.168.0.1"}, "Set a token"),
        ({"host": "::"}, "Set a token"),
        ({"host": ""}, "host is empty"),
        ({"token": "a b"}, "white space"),
        ({"timeout": 0}, "timeout is 0"),
        ({"port": 70000}, "at most 65535"),
        ({"run": ""}, "Name the run"),
    ],
)
def test_bad_configurations(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(**{"run": "x", **given})
    for host in ("127.0.0.2", "::1", "localhost"):
        assert ServeConfig(run="x", host=host).token == ""
    monkeypatch.setenv("COCONUT_TOKEN", "from-there")
    assert ServeConfig(run="x", host="0.0.0.0").token == "from-there"


# --- limits and ends --------------------------------------------------------------------------------


def slowly(lm: LatentLM, seconds: float) -> Any:
    """Each pass of the model takes so much longer."""
    return lm.base.register_forward_hook(lambda *_: time.sleep(seconds))


def test_a_full_queue_refuses_and_clients_that_leave_are_dropped(lm: LatentLM) -> None:
    with served(lm, token=TOKEN, max_batch=1, max_queue=2) as port:
        held = slowly(lm, 0.1)
        body = json.dumps({"prompt": QUESTION, "max_tokens": 60}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for number, connection in enumerate(connections):
            connection.sendall(head.encode() + body)
            wait_for(port, answering=1, waiting=number)
        status, content, headers = post(port, "/v1/completions", {"prompt": QUESTION})
        assert (status, content["error"]["code"], headers["Retry-After"]) == (429, "queue_full", "1")
        begun = time.monotonic()
        for connection in connections:  # one whose answer takes 6 seconds and more, and two that wait for it
            connection.close()
        wait_for(port, answering=0, waiting=0)
        assert time.monotonic() - begun < 5
        held.remove()
        asked = {"prompt": QUESTION, "max_tokens": 3}
        expected = answer(lm, [QUESTION], max_new_tokens=3).texts[0].strip()
        assert post(port, "/v1/completions", asked)[1]["choices"][0]["text"] == expected


def test_an_answer_that_takes_too_long_is_an_error(lm: LatentLM) -> None:
    with served(lm, timeout=0.5) as port, client_of(port) as client:
        held = slowly(lm, 0.1)
        status, content, headers = post(port, "/v1/completions", {"prompt": QUESTION, "max_tokens": 60})
        assert (status, content["error"]["code"], headers["x-should-retry"]) == (504, "timeout", "false")
        with pytest.raises(openai.APIError, match=r"no complete answer within 0\.5 s"):
            list(asked_as_chat(client, stream=True, max_tokens=60))
        held.remove()


def wait_for(port: int, **state: int) -> None:
    """Until /health says so."""
    end = time.monotonic() + 30
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        found = json.loads(connection.getresponse().read())
        connection.close()
        if found == {"status": "ok", **state}:
            return
        assert time.monotonic() < end, found
        time.sleep(0.01)


def test_the_command_ends_with_ctrl_c(lm: LatentLM, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path / "tiny")
    arguments = [f"run={tmp_path / 'tiny'}", "port=0", "engine.device=cpu", "engine.threads=1"]
    with forked_command("serve", *arguments) as process:
        process.wait_until(lambda: "(Ctrl-C ends it)" in process.output)
        port = int(process.output.split("127.0.0.1:")[1].split("/")[0])
        with client_of(port) as client:
            assert asked_as_chat(client).choices[0].message.content
            process.send(signal.SIGINT)
            assert process.wait(20) == 0, process.printed
        assert "Traceback" not in process.printed
