"""MATH (Hendrycks et al., arXiv 2103.03874): the answer is an expression in LaTeX, compared by the library math-verify.

The comparison runs in a process of its own (`coconut.tasks.expression_worker`): simplifying what a model wrote may take
for ever, math-verify's own limits of time work in a main thread only, and the worker can be ended from anywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from typing import IO, Any

from coconut.tasks import gsm8k
from coconut.tasks.chain import tidy
from coconut.utils.hydra_app import own_environment

name = "math"
max_new_tokens = 128

_CUE = re.compile(r"^.*?\b(?:answer|result) is:?\s+|^answer\s*[:=]\s*", re.IGNORECASE | re.DOTALL)
_DELIMITED = re.compile(r"\\boxed|\\fbox|(?<!\\)\$|\\\(|\\\[")
_ONE_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{([^{}\\]*)\}")
_IN_LATEX = re.compile(r"\\(?:begin|end)\{[a-z*]+\}|\\(?:text\w*|mbox|mathrm)\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan"}
_CACHED = 2**16


def key(answer: str) -> str:
    """A canonical spelling of the answer's expression; without one, its text in lower case.

    Raises ValueError without math-verify.
    """
    latex = _latex(answer)
    canonical = _ask(latex) if latex else None
    return canonical if isinstance(canonical, str) else _text(answer)


def judge(predicted: str | None, gold: str) -> bool:
    """Whether two answers are equal as expressions by math-verify, or as text.

    `gold` is LaTeX without delimiters. `predicted` may be that too, or have its expression in `\\boxed{}`, `$...$`,
    `\\(...\\)` or `\\[...\\]`; of prose without these, its one number counts. An answer that takes more than 3 s of
    processor time is wrong. Raises ValueError without math-verify.
    """
    if predicted is None:
        return False
    if _text(predicted) == _text(gold):
        return bool(_text(gold))
    written, right = _latex(predicted), _latex(gold)
    return bool(written and right) and _ask(written, right) is True


def candidates(question: str) -> list[str] | None:
    return None


def _text(answer: str) -> str:
    """An answer as text: `\\text{Evelyn}`, `\\boxed{Evelyn}` and "The answer is Evelyn." are "evelyn"."""
    text = tidy(_CUE.sub("", answer.strip())).rstrip(".").strip("$ ")
    if boxed := re.fullmatch(r"\\boxed\{(.*)\}", text):
        text = boxed[1]
    text = _ONE_TEXT.sub(r"\1", text).strip()
    if option := re.fullmatch(r"\(([A-Za-z])\)", text):
        text = option[1]
    return text.casefold()


def _latex(answer: str) -> str | None:
    """The answer as text with one LaTeX expression in delimiters; None for prose without an expression or a number.

    Per cent signs are left out, as by the judge of numbers.
    """
    text = re.sub(r"\\?%", "", answer).strip()
    if _DELIMITED.search(text):
        return text
    text = _CUE.sub("", text).rstrip(".").strip()
    words = re.findall(r"[^\W\d_]{3,}", _IN_LATEX.sub(" ", text))
    if any(word.lower() not in _FUNCTIONS for word in words):
        number = gsm8k.number(text)
        return None if number is None else f"\\boxed{{{gsm8k.written(number)}}}"
    return f"\\boxed{{{text}}}" if text else None


class _Worker:
    """A process that compares expressions; started when it is first asked, and again if it has ended.

    One at a time asks it. A process that was forked has a worker of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self._close)

    def ask(self, request: list[str | None]) -> Any:
        """The reply, as JSON; None if the worker ended over the request, by its limit of time or memory."""
        with self._lock:
            if self._owner != os.getpid() or self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process
            requests, replies = self._pipes(self._process)
            try:
                requests.write(json.dumps(request).encode() + b"\n")
                requests.flush()
                reply = replies.readline()
            except BrokenPipeError:
                reply = b""
            if not reply:
                self._close()
            return json.loads(reply) if reply else None

    def _start(self) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("Answers of the task math are judged by math-verify. Install it: pip install math-verify")
        self._close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coconut.tasks.expression_worker"], env=own_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._owner = os.getpid()

    def _close(self) -> None:
        process, self._process = self._process, None
        if process and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in self._pipes(process):
                with contextlib.suppress(BrokenPipeError):  # a request that the process never read
                    pipe.close()

    @staticmethod
    def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
        assert process.stdin
        assert process.stdout
        return process.stdin, process.stdout


_WORKER = _Worker()


@functools.lru_cache(_CACHED)
def _ask(*request: str | None) -> Any:
    """Of one text its canonical expression, of two whether the first one is a right answer to the second."""
    return _WORKER.ask(list(request))
