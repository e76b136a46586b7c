"""ProntoQA (Saparov and He, arXiv 2210.01240): is a statement about one entity true or false?"""

from __future__ import annotations

import re

from coconut.tasks.chain import key as answer_text

name = "prontoqa"
max_new_tokens = 128


def verdict(text: str) -> str | None:
    """ "True" or "False" if the text begins with it and does not contain the other, else None."""
    words = re.findall(r"\b(?:true|false)\b", text.casefold())
    if len(set(words)) != 1 or not re.match(rf"\W*{words[0]}\b", text.casefold()):
        return None
    return words[0].capitalize()


def key(answer: str) -> str:
    """The answer's verdict; without one, its text in lower case."""
    return verdict(answer) or answer_text(answer).casefold()


def judge(predicted: str | None, gold: str) -> bool:
    return predicted is not None and verdict(gold) is not None and key(predicted) == key(gold)


def candidates(question: str) -> list[str] | None:
    return ["True", "False"]
