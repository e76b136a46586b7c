"""Grade-school arithmetic (Cobbe et al., arXiv 2110.14168): the answer is a number."""

from __future__ import annotations

import re
from decimal import Decimal

from coconut.tasks.chain import read_answer, read_steps, tidy

__all__ = ["candidates", "judge", "max_new_tokens", "name", "number", "read_answer", "read_steps"]

name = "gsm8k"
max_new_tokens = 64

_NUMBER = re.compile(r"(?:(?<![\w)-])([-+])\s?)?([0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?|\.[0-9]+)")
_CALCULATION = re.compile(r"[0-9)]\s*[-+*/^×÷]\s*[.(0-9]")


def number(text: str) -> Decimal | None:
    """The one number that a text names: "$1,234.50", "-3", "72 clips", "15%".

    None if there is no number, if there are different ones ("5 or 6"), or if they are still to be
    calculated ("3/4", "48+24"). Currency and per cent signs and commas between digits say nothing.
    """
    text = re.sub("[−–—]", "-", text)
    text = re.sub(r"[$€£¥]\s?", "", text)
    text = re.sub(r"(?<=[0-9]) ([.,]) (?=[0-9])", r"\1", text)
    if _CALCULATION.search(text):
        return None
    found = {Decimal((m[1] or "") + m[2].replace(",", "")) for m in _NUMBER.finditer(text)}
    return found.pop() if len(found) == 1 else None


def judge(predicted: str | None, gold: str) -> bool:
    """Equal as numbers, exactly; as text if the gold answer is not a number."""
    if predicted is None:
        return False
    value = number(gold)
    if value is None:
        return _plain(predicted) == _plain(gold)
    return number(predicted) == value


def candidates(question: str) -> list[str] | None:
    return None


def _plain(text: str) -> str:
    return re.sub(r"\s*/\s*", "/", tidy(text).rstrip(".").casefold())
