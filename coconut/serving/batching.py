"""Questions that arrive together are answered in one batch, by one thread that owns the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coconut.config import Precision
from coconut.engine.base import autocast
from coconut.generation.generate import generate, logit_lens, pad_rows
from coconut.generation.keyed_random import Key
from coconut.models.latent_lm import LatentLM
from coconut.serving.protocol import Answer, Settings

Event = tuple[int, str] | list[Answer] | Exception  # next words of a sample; all answers to the question; what failed


class QueueFull(Exception):
    """So many questions wait that no more are taken."""


@dataclass(eq=False)
class Job:
    """One question (token ids) and the keys of its answers. `tell` is given what happens, in the worker's thread."""

    question: list[int]
    settings: Settings
    keys: Sequence[Key]
    tell: Callable[[Event], None]
    stream: bool = False
    decode_thoughts: bool = False
    cancelled: bool = False  # no one waits for the answers: they end with the next token
    arrived: float = field(default_factory=time.monotonic)
    sent: list[str] = field(default_factory=list)  # the words of each sample so far

    def __post_init__(self) -> None:
        self.sent = [""] * self.settings.n


class Batcher:
    """A queue, and a thread that answers it.

    The oldest question chooses the batch: the questions behind it with equal settings join, in their order, up to
    `max_batch` answers. It waits for them `gather_seconds` from its arrival, and no longer than until the batch is
    full. An answer does not depend on its batch (up to rounding): what is random comes from its key.
    """

    def __init__(self, lm: LatentLM, precision: Precision, max_batch: int, gather_seconds: float, max_queue: int):
        self.lm, self.precision = lm, precision
        self.max_batch, self.gather_seconds, self.max_queue = max_batch, gather_seconds, max_queue
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._batch: list[Job] = []
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the questions of one request. Raises QueueFull."""
        with self._changed:
            self._drop_cancelled()
            if len(self._queue) + len(jobs) > self.max_queue:
                raise QueueFull
            self._queue.extend(jobs)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """The number of questions in the queue."""
        with self._changed:
            self._drop_cancelled()
            return len(self._queue)

    @property
    def answering(self) -> int:
        """The number of questions in the batch that is answered."""
        return len(self._batch)

    def close(self) -> None:
        """End the batch that is answered with its next token, answer no other, and wait for the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._queue, *self._batch):
                job.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        self._queue = deque(job for job in self._queue if not job.cancelled)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)

    def _next_batch(self) -> list[Job]:
        """Wait for the next batch and take it from the queue; empty after `close`."""
        with self._changed:
            self._batch = []
            while not self._closed:
                self._drop_cancelled()
                if not self._queue:
                    self._changed.wait()
                    continue
                batch = self._alike()
                left = self._queue[0].arrived + self.gather_seconds - time.monotonic()
                if left <= 0 or sum(job.settings.n for job in batch) >= self.max_batch:
                    taken = set(map(id, batch))
                    self._queue = deque(job for job in self._queue if id(job) not in taken)
                    self._batch = batch
                    return batch
                self._changed.wait(left)
            return []

    def _alike(self) -> list[Job]:
        """The oldest question, and those behind it that fit into its batch."""
        settings = self._queue[0].settings
        most = max(self.max_batch // settings.n, 1)
        return [job for job in self._queue if job.settings == settings][:most]

    def _answer(self, batch: list[Job]) -> None:
        """Answer a batch. If that fails, each question is answered alone, so that none fails for another's sake."""
        try:
            answers = self._generate(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].tell(error)
                return
            for job in batch:
                if not job.cancelled:
                    self._answer([job])
            return
        for job, own in zip(batch, answers, strict=True):
            job.tell(own)

    def _generate(self, batch: list[Job]) -> list[list[Answer]]:
        lm, settings = self.lm, batch[0].settings
        watchers = [_Watcher(lm, job, sample) for job in batch for sample in range(settings.n)]
        keys = [key for job in batch for key in job.keys]
        with autocast(lm.device, self.precision):
            ids_BT, is_question_BT = pad_rows([job.question for job in batch], lm.special.pad)
            out = generate(lm, ids_BT, is_question_BT, random_keys=keys, watchers=watchers, **settings.options())
            answers = []
            for row, watcher in enumerate(watchers):
                count = int(out.num_thoughts[row])
                decode = watcher.job.decode_thoughts and not watcher.job.cancelled
                text = cut_at(out.texts[row], settings.stop).strip()
                thoughts: Any = logit_lens(lm, out.thoughts[row, :count]) if decode else None
                length, truncated = int(out.lengths[row]), bool(out.truncated[row])
                answers.append(Answer(text, truncated, length, count, out.modes[row], thoughts))
        return [answers[first : first + settings.n] for first in range(0, len(answers), settings.n)]


class _Watcher:
    """Ends an answer that no one waits for, and tells the words of one that is streamed."""

    def __init__(self, lm: LatentLM, job: Job, sample: int):
        self.lm, self.job, self.sample = lm, job, sample
        self._tokens: list[int] = []

    def __call__(self, token: int, /) -> bool:
        job = self.job
        if job.cancelled:
            return True
        if job.stream and token != self.lm.special.eos:
            self._tokens.append(token)
            tokenizer = self.lm.tokenizer
            text = str(tokenizer.decode(self._tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            final, sent = settled(text, job.settings.stop), job.sent[self.sample]
            if len(final) > len(sent):
                job.sent[self.sample] = final
                job.tell((self.sample, final[len(sent) :]))
        return False


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these texts."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def settled(text: str, stops: Sequence[str]) -> str:
    """Of an answer that is being written, what further tokens cannot change.

    That is without white space at either end, an incomplete character, and what may be the beginning of a stop text.
    """
    cut = cut_at(text, stops)
    if len(cut) == len(text):
        cut = text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = (size for stop in stops for size in range(1, len(stop)) if cut.endswith(stop[:size]))
        cut = cut[: len(cut) - max(held, default=0)]
    return cut.strip()
