"""Find the steps and the answer in a model's text, by the templates of its prompt format."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut.methods import PromptFormat


def find_answer(text: str, form: PromptFormat) -> tuple[int, int] | None:
    """The offsets of the answer's mark and of the answer itself; None if there is no answer.

    The mark is the text before `{}` in the answer's template, such as "###". Of several, the last one counts that is
    at the beginning of the text, of a line or of a step, or else the last one. If the template has white space after
    the mark, repetitions of its last character belong to it ("####"). If the template has no mark, the answer is what
    follows the last line break or end of a step.
    """
    if not form.answer_mark:
        return _last_part(text, form)
    before = form.answer.split("{}")[0]
    gap = before[len(before.rstrip()) :]
    mark = re.escape(form.answer_mark) + f"{re.escape(form.answer_mark[-1])}*" * bool(gap)
    found = list(re.finditer(mark, text))
    if not found:
        return None
    start, end = ([m for m in found if _ends_line_or_step(text[: m.start()], form)] or found)[-1].span()
    return start, end + ("\n" in gap) * (len(text[end:]) - len(text[end:].lstrip()))


def read_answer(text: str, form: PromptFormat) -> str | None:
    """The answer without the template's text around it, up to the end of its line; None if there is none."""
    found = find_answer(text, form)
    return None if found is None else text[found[1] :].split("\n")[0].strip().removesuffix(form.answer_end).strip()


def read_steps(text: str, form: PromptFormat) -> list[str]:
    """The steps: the text before the answer's mark, split at the ends of steps."""
    found = find_answer(text, form)
    before = text if found is None else text[: found[0]]
    steps = (step.strip().removeprefix(form.step_begin).strip() for step in before.split(form.step_end))
    return [step for step in steps if step]


def key(answer: str) -> str:
    """The answer's text, spaces normalized and without the final full stop."""
    return tidy(answer).rstrip(".")


def judge(predicted: str | None, gold: str) -> bool:
    return predicted is not None and key(predicted) == key(gold)


def tidy(text: str) -> str:
    """Normalize white space: one space between words, none before punctuation."""
    return re.sub(r"\s+(?=[.,?!:;])", "", " ".join(text.split()))


def _ends_line_or_step(before: str, form: PromptFormat) -> bool:
    """Whether this text is empty, or ends with a line break or with the end of a step."""
    line = before.rstrip(" \t")
    end = form.step_end.rstrip(" \t")
    return line[-1:] in ("", "\n") or before.endswith(form.step_end) or bool(end and line.endswith(end))


def _last_part(text: str, form: PromptFormat) -> tuple[int, int] | None:
    """`find_answer` for an answer template without a mark."""
    body = text.rstrip().removesuffix(form.answer_end).rstrip()
    body = body.removesuffix(form.step_end.strip())
    start = max(place + len(end) if (place := body.rfind(end)) >= 0 else 0 for end in ("\n", form.step_end))
    return (start, start) if text.strip() else None
