"""Yes or no, as in StrategyQA (Geva et al., arXiv 2101.02235)."""

from __future__ import annotations

import re

from coconut.tasks.chain import key as answer_text

name = "yes_no"
max_new_tokens = 64

_VERDICTS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WORD = re.compile(r"\b(?:yes|true|no|false)\b")
_NEGATED = re.compile(r"(?:\bnot|n['’]t)\s+(?:yes|true|no|false)\b")


def verdict(text: str) -> str | None:
    """ "yes" or "no" if the text says one and not the other. True counts as yes, false as no; "not true" as neither."""
    text = text.casefold()
    said = {_VERDICTS[word] for word in _WORD.findall(text)}
    return said.pop() if len(said) == 1 and not _NEGATED.search(text) else None


def key(answer: str) -> str:
    """The answer's verdict; without one, its text in lower case."""
    return verdict(answer) or answer_text(answer).casefold()


def judge(predicted: str | None, gold: str) -> bool:
    return predicted is not None and verdict(gold) is not None and verdict(predicted) == verdict(gold)


def candidates(question: str) -> list[str] | None:
    return ["yes", "no"]
