"""Tasks: judging answers, and listing the possible ones. `chain` finds answers and steps in a text, for all tasks.

A task is a module with the members of `Task`. What only one task has (`prosqa.graph`) is a function of its module.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from coconut.tasks import expressions, gsm8k, letters, pointers, prontoqa, prosqa, yes_no


class Task(Protocol):
    name: str
    max_new_tokens: int

    def key(self, answer: str) -> Hashable:
        """A normalized answer for comparison: answers with equal keys count as the same, for the judge and in votes."""
        ...

    def judge(self, predicted: str | None, gold: str) -> bool:
        """Whether an answer is correct, whatever its spelling."""
        ...

    def candidates(self, question: str) -> list[str] | None:
        """The possible answers if the question names them, else None."""
        ...


TASKS: dict[str, Task] = {
    "gsm8k": gsm8k, "prontoqa": prontoqa, "prosqa": prosqa, "pointers": pointers, "numbers": gsm8k, "letters": letters,
    "yes_no": yes_no, "math": expressions,
}  # fmt: skip
"""The judges by name. gsm8k and numbers are the same one."""
