"""The text a model writes: steps, each with its end, then the mark and the answer, as a prompt format has them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut.methods import PromptFormat


def find_answer(text: str, form: PromptFormat) -> tuple[int, int] | None:
    """Where the answer's mark begins, and where the answer itself does; None if there is no answer.

    The mark is the last one that begins a text, a line, or what follows the end of a step; if none does, the last one.
    Where a space follows the mark, more of its last character is part of it. Without a mark to look for the answer is
    what stands last: on a line of its own, or after the end of a step.
    """
    if not form.answer_mark:
        return _last_part(text, form)
    before = form.answer.split("{}")[0]
    gap = before[len(before.rstrip()) :]
    mark = re.escape(form.answer_mark) + f"{re.escape(form.answer_mark[-1])}*" * bool(gap)
    found = list(re.finditer(mark, text))
    if not found:
        return None
    start, end = ([m for m in found if _begins(text[: m.start()], form)] or found)[-1].span()
    return start, end + ("\n" in gap) * (len(text[end:]) - len(text[end:].lstrip()))


def read_answer(text: str, form: PromptFormat) -> str | None:
    """The answer, up to the end of its line, without what the prompt format puts around it; None if there is none."""
    found = find_answer(text, form)
    return None if found is None else text[found[1] :].split("\n")[0].strip().removesuffix(form.answer_end).strip()


def read_steps(text: str, form: PromptFormat) -> list[str]:
    """What stands before the answer's mark, cut where steps end."""
    found = find_answer(text, form)
    before = text if found is None else text[: found[0]]
    steps = (step.strip().removeprefix(form.step_begin).strip() for step in before.split(form.step_end))
    return [step for step in steps if step]


def tidy(text: str) -> str:
    """One space between words, none before punctuation."""
    return re.sub(r"\s+(?=[.,?!:;])", "", " ".join(text.split()))


def _begins(before: str, form: PromptFormat) -> bool:
    """Whether what comes after this text begins something: the text, a line, or what follows a step."""
    line = before.rstrip(" \t")
    end = form.step_end.rstrip(" \t")
    return line[-1:] in ("", "\n") or before.endswith(form.step_end) or bool(end and line.endswith(end))


def _last_part(text: str, form: PromptFormat) -> tuple[int, int] | None:
    body = text.rstrip().removesuffix(form.answer_end).rstrip()
    body = body.removesuffix(form.step_end.strip())
    start = max(place + len(end) if (place := body.rfind(end)) >= 0 else 0 for end in ("\n", form.step_end))
    return (start, start) if text.strip() else None
