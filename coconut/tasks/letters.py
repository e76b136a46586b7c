"""Multiple choice, as in CommonsenseQA (Talmor et al., arXiv 1811.00937): the answer is one letter from A to E."""

from __future__ import annotations

import re

from coconut.tasks.chain import key as answer_text

name = "letters"
max_new_tokens = 64

_ALONE = re.compile(r"[\W_]*([A-Ea-e])[\W_]*")
_NAMED = re.compile(
    r"""
    (?<![\w'’-])
    (?: (?i:answer|option|choice) (?i:\s+is)? [\s:=*($]* (?P<cued>[A-E])  # The answer is A
      | (?P<marked>[A-E]) (?=[).:*\]}])                                  # A) A. A: **A** [A]
      | (?P<word>[B-E] | A(?!\s+(?!or\b|and\b)[a-z])) )                  # "A bank": an article, no letter
    (?![\w'’-])
    """,
    re.VERBOSE,
)
_OPTION = re.compile(r"^\s*\(?([A-E])[).:]\s", re.MULTILINE)


def letter(text: str) -> str | None:
    """The one letter that a text names: "A", "(a)", "A)", "The answer is A.", "A: bank". None for none or several."""
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    named = {match["cued"] or match["marked"] or match["word"] for match in _NAMED.finditer(text)}
    return named.pop() if len(named) == 1 else None


def key(answer: str) -> str:
    """The answer's letter; without one, its text in lower case."""
    return letter(answer) or answer_text(answer).casefold()


def judge(predicted: str | None, gold: str) -> bool:
    return predicted is not None and letter(gold) is not None and letter(predicted) == letter(gold)


def candidates(question: str) -> list[str] | None:
    """The letters of the options, each at the beginning of a line: "A. bank"."""
    return list(dict.fromkeys(_OPTION.findall(question))) or None
