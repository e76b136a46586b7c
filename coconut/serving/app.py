"""The web application: POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hmac
import json
import time
import traceback
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from coconut.data.tokenization import encode_chat, encode_questions, unknown_in
from coconut.generation.generate import refuse_logit_lens
from coconut.generation.room import room_for_question
from coconut.models.latent_lm import LatentLM
from coconut.serving.batching import Batcher, Event, Job, QueueFull
from coconut.serving.config import ServeConfig
from coconut.serving.protocol import Answer, Asked, Limits, Message, RefusedRequest, Reply, read_request, refused

DISCARDED = 10  # times the largest body: so much of one that is too large is read before it is refused


def build_app(lm: LatentLM, config: ServeConfig) -> Starlette:
    """The application. It owns the model until it ends."""
    service = Service(lm, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/v1/models/{name:path}", service.model, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        exception_handlers={RefusedRequest: _say_refused, HTTPException: _say_http, Exception: _say_failed},
        lifespan=lifespan,
    )


class Service:
    """Answers requests: checks them, queues their questions, writes what comes back."""

    def __init__(self, lm: LatentLM, config: ServeConfig):
        self.lm, self.config = lm, config
        # A fast tokenizer may not be used by two threads at once; the worker uses the model's own.
        self.tokenizer = copy.deepcopy(lm.tokenizer)
        self.name = config.name or Path(config.run).resolve().name
        self.created = int(time.time())
        most = config.max_new_tokens or lm.max_sequence_length
        self.limits = Limits(most, min(lm.reasoning.max_new_tokens, most), config.max_batch, config.max_queue)
        self.batcher = Batcher(
            lm, config.engine.precision, config.max_batch, config.gather_ms / 1000, config.max_queue
        )  # fmt: skip

    # --- endpoints ----------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def models(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        self._admit(request)
        self._find_model(request.path_params["name"])
        return JSONResponse(self._about())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.batcher.waiting, "answering": self.batcher.answering})

    def _about(self) -> dict[str, Any]:
        reasoning = self.lm.reasoning
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "coconut",
            "method": reasoning.method, "num_thoughts": reasoning.num_thoughts, "modes": list(reasoning.modes),
            "chat": reasoning.format.chat, "max_context": self.lm.max_sequence_length,
        }  # fmt: skip

    async def _answer(self, request: Request, chat: bool) -> Response:
        self._admit(request)
        deadline = asyncio.get_running_loop().time() + self.config.timeout
        asked = read_request(await self._body(request, deadline), chat, self.limits)
        self._find_model(asked.model)
        questions = [self._encode(asked, messages) for messages in asked.conversations]
        prompt_tokens = sum(map(len, questions))
        pending = Pending(asked, questions, deadline, self.config.timeout)
        try:
            self.batcher.submit(pending.jobs)
        except QueueFull:
            raise RefusedRequest(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"The queue of {self.config.max_queue} questions has no room for {len(questions)} more. Try again.",
                code="queue_full", headers={"Retry-After": "1"},
            ) from None  # fmt: skip
        gone = asyncio.create_task(_cancel_when_gone(request, pending))
        reply = Reply(asked, self.name, [self._unknown(messages) for messages in asked.conversations])
        try:
            if asked.stream:
                first = await pending.next()  # an error that comes before all words has a status of its own
                parts = self._parts(pending, reply, first, prompt_tokens, gone)
                return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            while not pending.complete:
                await pending.next()
        except BaseException:
            pending.cancel()
            gone.cancel()
            raise
        gone.cancel()
        return JSONResponse(reply.whole(pending.in_order(), prompt_tokens))

    async def _parts(
        self, pending: Pending, reply: Reply, event: tuple[int, Event], prompt_tokens: int, gone: asyncio.Task[None]
    ) -> AsyncIterator[str]:
        """Server-sent events. `event`: the first of the worker's."""
        samples, sent = reply.asked.settings.n, set()
        try:
            while True:
                number, what = event
                pieces = [what] if isinstance(what, tuple) else []
                if isinstance(what, list):  # with what was held back, such as the beginning of a stop text
                    rests = (
                        answer.text[len(before) :]
                        for answer, before in zip(what, pending.jobs[number].sent, strict=True)
                    )
                    pieces = [(sample, rest) for sample, rest in enumerate(rests) if rest]
                for sample, text in pieces:
                    index = number * samples + sample
                    yield _event(reply.piece(index, text, first=index not in sent))
                    sent.add(index)
                if isinstance(what, list):
                    for sample, answer in enumerate(what):
                        yield _event(reply.last(number * samples + sample, answer))
                if pending.complete:
                    break
                event = await pending.next()
            if reply.asked.include_usage:
                yield _event(reply.usage(pending.in_order(), prompt_tokens))
            yield "data: [DONE]\n\n"
        except RefusedRequest as error:
            yield _event(error.as_dict())
        finally:
            pending.cancel()
            gone.cancel()

    # --- checks -------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        """Refuse a request without the token. Without a token in the configuration, refuse one to another host name."""
        if token := self.config.token:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise RefusedRequest(
                    HTTPStatus.UNAUTHORIZED, "The token is missing or wrong. Send Authorization: Bearer TOKEN.",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            return
        try:
            name = urlsplit(f"//{request.headers.get('Host', '')}").hostname
        except ValueError:
            name = None
        if name not in {"localhost", "127.0.0.1", "::1", self.config.host.lower()}:  # DNS rebinding
            raise RefusedRequest(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"The host name is {name!r}. Without a token the server answers as localhost and {self.config.host}.",
            )

    def _find_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RefusedRequest(
                HTTPStatus.NOT_FOUND, f"There is no model {name}; this server has {self.name}.", "model",
                code="model_not_found",
            )  # fmt: skip

    async def _body(self, request: Request, deadline: float) -> Any:
        """The JSON of a request."""
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedRequest(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Send JSON, with Content-Type: application/json."
            )  # fmt: skip
        most, size, parts = self.config.max_body_kb * 1000, 0, []
        try:
            async with asyncio.timeout_at(deadline):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > DISCARDED * most:
                        break
        except TimeoutError:
            raise _timed_out(self.config.timeout) from None
        except ClientDisconnect:
            raise refused("The request was cut off.") from None
        if size > most:
            raise RefusedRequest(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body has more than {most:,} bytes. Ask something shorter."
            )
        try:
            body = json.loads(b"".join(parts))
            json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise refused("The body is not JSON in UTF-8.") from None
        return body

    def _encode(self, asked: Asked, messages: list[Message]) -> list[int]:
        """The token ids of a question. Raises RefusedRequest if it or what is asked of it does not fit the model."""
        lm, settings, param = self.lm, asked.settings, "messages" if asked.chat else "prompt"
        form = lm.reasoning.format
        if settings.mode is not None and settings.mode not in lm.reasoning.modes:
            choices = ", ".join(lm.reasoning.modes)
            has = f"the modes {choices}: take one of them" if choices else "no modes: leave it out"
            raise refused(f"mode is {settings.mode!r}, and the model has {has}.", "mode")
        if messages[-1][0] != "user":
            raise refused("The last message must be the user's: it is the question.", param)
        if len(messages) > 1 and not form.chat:
            raise refused(
                f"There are {len(messages)} messages, and the model was trained on single questions, without a chat "
                "template. Send one message of the user: no system message, no history.",
                param,
            )
        try:
            if asked.decode_thoughts:
                param = "decode_thoughts"
                refuse_logit_lens(lm)
            param = "messages" if asked.chat else "prompt"
            if len(messages) > 1:
                ids = encode_chat(self.tokenizer, messages, form)
            else:
                [ids] = encode_questions(self.tokenizer, [messages[0][1]], form)
        except ValueError as error:
            raise refused(str(error), param) from None
        room = room_for_question(lm, settings.num_thoughts, settings.mode)
        most = min(room, self.config.max_prompt_tokens or room)
        if len(ids) > most:
            why = "with its thoughts and an answer, the model's context" if most == room else "this server's limit"
            raise RefusedRequest(
                HTTPStatus.BAD_REQUEST,
                f"The question has {len(ids):,} tokens; {why} leaves {max(most, 0):,}. Ask something shorter, or with "
                "fewer thoughts.",
                param, code="context_length_exceeded",
            )  # fmt: skip
        return ids

    def _unknown(self, messages: list[Message]) -> list[str]:
        return unknown_in(self.tokenizer, "\n".join(text for _, text in messages))


class Pending:
    """The answers to one request, as the worker gives them."""

    def __init__(self, asked: Asked, questions: list[list[int]], deadline: float, timeout: float):
        self.deadline, self.timeout = deadline, timeout
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._answers: dict[int, list[Answer]] = {}
        self.jobs = [self._job(asked, number, question) for number, question in enumerate(questions)]

    def _job(self, asked: Asked, number: int, question: list[int]) -> Job:
        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        keys = [(asked.seed, number, sample) for sample in range(asked.settings.n)]
        return Job(question, asked.settings, keys, tell, asked.stream, asked.decode_thoughts)

    async def next(self) -> tuple[int, Event]:
        """The number of a question and what happened to it. Raises RefusedRequest on failure or at the deadline."""
        try:
            async with asyncio.timeout_at(self.deadline):
                number, event = await self._events.get()
        except TimeoutError:
            raise _timed_out(self.timeout) from None
        if isinstance(event, ValueError):
            raise refused(str(event))
        if isinstance(event, RefusedRequest):
            raise event
        if isinstance(event, Exception):
            traceback.print_exception(event)
            raise RefusedRequest(HTTPStatus.INTERNAL_SERVER_ERROR, "The model failed; the server's terminal shows why.")
        if isinstance(event, list):
            self._answers[number] = event
        return number, event

    @property
    def complete(self) -> bool:
        return len(self._answers) == len(self.jobs)

    def in_order(self) -> list[Answer]:
        """The answers, when complete."""
        return [answer for number in range(len(self.jobs)) for answer in self._answers[number]]

    def cancel(self) -> None:
        """No one waits any more: questions leave the queue, answers that are being generated end."""
        for job in self.jobs:
            job.cancelled = True


async def _cancel_when_gone(request: Request, pending: Pending) -> None:
    """Cancel what is pending when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    pending.cancel()
    pending.jobs[0].tell(RefusedRequest(HTTPStatus.BAD_REQUEST, "The client has closed the connection."))


def _timed_out(seconds: float) -> RefusedRequest:
    return RefusedRequest(
        HTTPStatus.GATEWAY_TIMEOUT, f"There was no complete answer within {seconds:g} s, the limit of this server.",
        code="timeout", headers={"x-should-retry": "false"},
    )  # fmt: skip


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _say_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedRequest)
    return JSONResponse(error.as_dict(), error.status, headers=error.headers)


def _say_http(request: Request, error: Exception) -> Response:
    """An unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    status, there = HTTPStatus(error.status_code), f"{request.method} {request.url.path}"
    return _say_refused(request, RefusedRequest(status, f"{there}: {status.phrase}.", headers=error.headers))


def _say_failed(request: Request, error: Exception) -> Response:
    message = "An error occurred; the server's terminal shows it."
    return _say_refused(request, RefusedRequest(HTTPStatus.INTERNAL_SERVER_ERROR, message))
