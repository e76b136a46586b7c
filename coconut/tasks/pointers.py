"""Pointer chasing: which node is reached after HOPS pointers? "d h | h b | b d ? from d go 2" is answered "b".

The number of hops, part of the question, sets its difficulty. A step is the name of the next node.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from coconut.tasks.chain import judge, key, tidy  # noqa: F401  (members of `Task`)
from coconut.tasks.hints import split_hint

name = "pointers"
max_new_tokens = 64

_QUESTION = re.compile(r"([^?]+)\? from (\S+) go (\d+)")


class Question(NamedTuple):
    pointers: dict[str, str]  # from each node to the next
    hops: int
    start: str


def parse_question(question: str) -> Question:
    """Parse a question, without its hint.

    Raises ValueError if the text has another form, or a node points to two others.
    """
    found = _QUESTION.fullmatch(tidy(split_hint(question)[1]))
    if not found:
        raise ValueError(f"The question is not of the form 'a b | b c ? from a go HOPS': {question!r}")
    pairs = [pair.split() for pair in found[1].split("|")]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{' '.join(pair)!r} is not a pointer; it takes two names: 'a b | b c'.")
    pointers = {pair[0]: pair[1] for pair in pairs}
    if len(pointers) < len(pairs):
        raise ValueError(f"A node points to two others: {question!r}")
    return Question(pointers, int(found[3]), found[2])


def write_question(question: Question) -> str:
    """The text of a question, with its pointers in the order of the dictionary."""
    told = " | ".join(f"{a} {b}" for a, b in question.pointers.items())
    return f"{told} ? from {question.start} go {question.hops}"


def walk(question: Question) -> list[str]:
    """The node after each hop. Raises ValueError if a node has no pointer."""
    nodes = [question.start]
    for _ in range(question.hops):
        if nodes[-1] not in question.pointers:
            raise ValueError(f"{nodes[-1]} points nowhere.")
        nodes.append(question.pointers[nodes[-1]])
    return nodes[1:]


def first_wrong(question: str, steps: list[str]) -> int | None:
    """The index of the first step that names a wrong node or is one too many; None if there is none."""
    right = walk(parse_question(question))
    for number, step in enumerate(steps):
        if number >= len(right) or tidy(step) != right[number]:
            return number
    return None


def candidates(question: str) -> list[str] | None:
    """All nodes that are pointed to."""
    try:
        return list(parse_question(question).pointers.values())
    except ValueError:
        return None
