"""What a task knows beyond its data: to read an answer, to judge it, to name the possible ones.

A task is a module. Whatever only one of them can do (`prosqa.graph`) is a function of that module.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

from coconut.tasks import gsm8k, pointers, prontoqa, prosqa

if TYPE_CHECKING:
    from coconut.methods import PromptFormat


class Task(Protocol):
    name: str
    max_new_tokens: int

    def read_answer(self, text: str, form: PromptFormat) -> str | None:
        """The answer in generated text; None if the text has none."""
        ...

    def read_steps(self, text: str, form: PromptFormat) -> list[str]:
        """The written steps before the answer."""
        ...

    def key(self, answer: str) -> Hashable:
        """What is compared of an answer: two with the same key are one answer, to the judge and in a vote."""
        ...

    def judge(self, predicted: str | None, gold: str) -> bool:
        """Is this the right answer, in whatever dress?"""
        ...

    def candidates(self, question: str) -> list[str] | None:
        """The answers that the question itself names; None if it leaves them open."""
        ...


TASKS: dict[str, Task] = {"gsm8k": gsm8k, "prontoqa": prontoqa, "prosqa": prosqa, "pointers": pointers}
