"""Planted hints: a name at the head of a question that says, rightly or wrongly, what the answer is.

"Hint: 5. 0 3 | 4 7 ? 5 or 3 from 0". The form is the same in symbols and in sentences. Whoever reads the graph or the
table of a question reads past it.
"""

from __future__ import annotations

import re

_HINT = re.compile(r"\s*Hint:\s*(\S+?)\s*\.\s+")


def with_hint(question: str, name: str | None) -> str:
    """The question with this hint in place of any other; None: without one."""
    _, asked = split_hint(question)
    return asked if name is None else f"Hint: {name}. {asked}"


def split_hint(question: str) -> tuple[str | None, str]:
    """The name that a question hints at, None if there is none, and the question without its hint."""
    found = _HINT.match(question)
    return (found[1], question[found.end() :]) if found else (None, question)
