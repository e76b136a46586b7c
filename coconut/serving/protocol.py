"""OpenAI's protocol: read a request's fields, refuse what is not supported, and write responses. No torch."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

MAX_STOPS = 4
MAX_SEED = 2**63 - 1
MAX_THOUGHTS = 100_000  # of any model; its context allows fewer
Message = tuple[str, str]  # role and text


class RefusedRequest(Exception):
    """A request that is refused, or failed. `param`: the field at fault."""

    def __init__(
        self, status: HTTPStatus, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None = None) -> RefusedRequest:
    return RefusedRequest(HTTPStatus.BAD_REQUEST, message, param)


@dataclass(frozen=True)
class Settings:
    """How answers are generated. Questions with equal settings can share a batch."""

    max_new_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    num_thoughts: int | None = None
    mode: str | None = None

    def options(self) -> dict[str, Any]:
        """Those of `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens, "num_thoughts": self.num_thoughts, "mode": self.mode,
            "num_return_sequences": self.n,
        }  # fmt: skip
        if self.temperature:
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        if self.stop:
            options["stop_strings"] = list(self.stop)
        return options


@dataclass(frozen=True)
class Asked:
    """A request. `conversations`: the messages before each answer; of a completion, one of the user each."""

    chat: bool
    model: str | None
    conversations: list[list[Message]]
    settings: Settings
    seed: int
    stream: bool = False
    include_usage: bool = False
    decode_thoughts: bool = False


@dataclass(frozen=True)
class Answer:
    """One answer. `thoughts`: of each thought the likeliest tokens with their probabilities, None unless asked for."""

    text: str
    truncated: bool
    num_tokens: int
    num_thoughts: int
    mode: str = ""
    thoughts: list[Any] | None = None


@dataclass(frozen=True)
class Limits:
    """`default_tokens`: of an answer, for a request that does not say."""

    max_new_tokens: int
    default_tokens: int
    max_n: int
    max_questions: int


# --- fields -----------------------------------------------------------------------------------------

Reader = Callable[[Any], Any]  # the value of a field; raises ValueError that says what it must be


def _number(low: float, high: float, whole: bool = False) -> Reader:
    def read(value: Any) -> Any:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"a {'whole ' if whole else ''}number from {low} to {high}")
        return value

    return read


def _top_p(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError("a number above 0 and at most 1")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(f"a text, or a list of at most {MAX_STOPS}")
    return tuple(texts)


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"include_usage"}:
        raise ValueError('{"include_usage": true} or {"include_usage": false}')
    return _flag(value.get("include_usage", False))


def _prompt(value: Any) -> list[list[Message]]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("a text that is not empty, or a list of such texts; token ids are not supported")
    return [[("user", prompt)] for prompt in prompts]


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError('a list of messages, such as [{"role": "user", "content": "..."}]')
    return [_message(number, message) for number, message in enumerate(value)]


ROLES = ("system", "developer", "user", "assistant")


def _message(number: int, message: Any) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise refused(f'{where} is not an object with "role" and "content".', where)
    for name, given in message.items():
        if name not in ("role", "content") and given is not None:
            raise refused(f"{where}.{name} is not supported. Leave it out.", f"{where}.{name}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise refused(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}.", f"{where}.role")
    if isinstance(content, list) and content:
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise refused(
                    f"{where}.content has a part of type {kind!r}. The model reads text only: send parts of type text.",
                    f"{where}.content",
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise refused(f"{where}.content must be a text that is not empty.", f"{where}.content")
    return role, content


def _readers(chat: bool, limits: Limits) -> dict[str, Reader]:
    """The fields of a request."""
    tokens = _number(1, limits.max_new_tokens, whole=True)
    own: dict[str, Reader] = {"messages": _messages, "max_completion_tokens": tokens} if chat else {"prompt": _prompt}
    return {
        "model": _text, **own, "max_tokens": tokens, "temperature": _number(0, 2), "top_p": _top_p,
        "seed": _number(0, MAX_SEED, whole=True), "n": _number(1, limits.max_n, whole=True), "stop": _stop,
        "stream": _flag, "stream_options": _stream_options, "user": _text,
        "num_thoughts": _number(0, MAX_THOUGHTS, whole=True), "mode": _text, "decode_thoughts": _flag,
    }  # fmt: skip


NEUTRAL: dict[str, Any] = {
    "best_of": 1, "echo": False, "frequency_penalty": 0, "function_call": "none", "functions": [], "logit_bias": {},
    "logprobs": False, "metadata": {}, "modalities": ["text"], "parallel_tool_calls": True, "presence_penalty": 0,
    "response_format": {"type": "text"}, "store": False, "suffix": "", "tool_choice": "none", "tools": [],
}  # fmt: skip


def read_request(body: Any, chat: bool, limits: Limits) -> Asked:
    """Read the body of a request. null is as if a field were left out, and so is an unsupported field that asks for
    nothing (NEUTRAL). Raises RefusedRequest, which names the field.
    """
    if not isinstance(body, dict):
        raise refused("The body is not a JSON object.")
    readers, values = _readers(chat, limits), {}
    for name, value in body.items():
        if value is None or _is_neutral(name, value):
            continue
        if name not in readers:
            raise refused(f"{name} is not supported here. Leave it out; the fields are {', '.join(readers)}.", name)
        try:
            values[name] = readers[name](value)
        except ValueError as error:
            raise refused(f"{name} is {_short(value)}; it must be {error}.", name) from None
    content = "messages" if chat else "prompt"
    if content not in values:
        raise refused(f"{content} is missing. It has the question.", content)
    conversations = [values["messages"]] if chat else values["prompt"]
    if len(conversations) > limits.max_questions:
        raise refused(f"prompt has {len(conversations)} texts; at most {limits.max_questions} are answered.", "prompt")
    if {"max_tokens", "max_completion_tokens"} <= values.keys():
        raise refused("max_tokens and max_completion_tokens are both given. Leave one of them out.", "max_tokens")
    if "stream_options" in values and not values.get("stream"):
        raise refused("stream_options is for stream=true. Leave it out.", "stream_options")
    temperature, n = values.get("temperature", 0), values.get("n", 1)
    for name in ("n", "top_p"):
        if values.get(name, 1) != 1 and not temperature:
            raise refused(f"{name}={values[name]} is for sampling: set temperature, for example to 1.", name)
    tokens = values.get("max_completion_tokens", values.get("max_tokens", limits.default_tokens))
    settings = Settings(
        tokens, n, float(temperature), float(values.get("top_p", 1)), values.get("stop", ()),
        values.get("num_thoughts"), values.get("mode"),
    )  # fmt: skip
    return Asked(
        chat, values.get("model"), conversations, settings, values.get("seed", secrets.randbits(53)),
        values.get("stream", False), values.get("stream_options", False), values.get("decode_thoughts", False),
    )  # fmt: skip


def _is_neutral(name: str, value: Any) -> bool:
    """Whether an unsupported field asks for nothing. 0 is not false: logprobs=0 asks for log-probabilities."""
    neutral = NEUTRAL.get(name)
    return name in NEUTRAL and value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- responses --------------------------------------------------------------------------------------


def count_tokens(prompt_tokens: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """OpenAI's usage. A thought counts as a token of the completion, as reasoning tokens do."""
    reasoning = sum(answer.num_thoughts for answer in answers)
    completion = reasoning + sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


@dataclass
class Reply:
    """Writes the responses to one request. `unknown`: of each question, the words outside the vocabulary."""

    asked: Asked
    model: str
    unknown: list[list[str]]
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The response with all answers, those to one question adjacent."""
        choices = []
        for index, answer in enumerate(answers):
            content: dict[str, Any] = {"text": answer.text}
            if self.asked.chat:
                content = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append(self._choice(index, content, answer))
        return self._object("", choices) | {"usage": count_tokens(prompt_tokens, answers)}

    def piece(self, index: int, text: str, first: bool) -> dict[str, Any]:
        """A part of a stream: the next words of an answer."""
        content: dict[str, Any] = {"text": text}
        if self.asked.chat:
            content = {"delta": {**({"role": "assistant"} if first else {}), "content": text}}
        return self._object(".chunk", [self._choice(index, content)])

    def last(self, index: int, answer: Answer) -> dict[str, Any]:
        """The part of a stream that ends an answer."""
        content: dict[str, Any] = {"delta": {}} if self.asked.chat else {"text": ""}
        return self._object(".chunk", [self._choice(index, content, answer)])

    def usage(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The part of a stream with the counts."""
        return self._object(".chunk", []) | {"usage": count_tokens(prompt_tokens, answers)}

    def _choice(self, index: int, content: dict[str, Any], answer: Answer | None = None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": None}
        if answer is None:
            return choice
        choice |= {"finish_reason": "length" if answer.truncated else "stop", "num_thoughts": answer.num_thoughts}
        if answer.mode:
            choice["mode"] = answer.mode
        if answer.thoughts is not None:
            choice["thoughts"] = answer.thoughts
        if unknown := self.unknown[index // self.asked.settings.n]:
            choice["unknown"] = unknown
        return choice

    def _object(self, part: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind, prefix = (f"chat.completion{part}", "chatcmpl") if self.asked.chat else ("text_completion", "cmpl")
        made = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        if self.asked.settings.temperature:
            made["seed"] = self.asked.seed
        return made | {"choices": choices}
