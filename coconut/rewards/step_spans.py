"""Spans of the steps of a completion, in characters and in tokens. The prompt is not part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coconut.methods import PromptFormat
from coconut.tasks.chain import find_answer

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def text_ends(text: str, form: PromptFormat) -> list[int]:
    """End, in characters, of each part of a completion: of every step and, last, of the answer.

    A step ends with the step end of the prompt format, or where the answer begins. An empty step belongs to the step
    before it. A text without steps is one part. Without an answer, the last step is the last part.
    """
    answer = find_answer(text, form)
    steps_end = len(text) if answer is None else answer[0]
    ends, begin = [], 0
    while begin < steps_end:
        found = text.find(form.step_end, begin, steps_end)
        end = steps_end if found < 0 else found + len(form.step_end)
        if text[begin:end].strip():
            ends.append(end)
        elif ends:
            ends[-1] = end
        begin = end
    if answer is None and ends:
        return ends
    return [*ends, len(text)]


def step_count(text: str, form: PromptFormat) -> int:
    """The number of parts that are steps: all but the answer."""
    parts = len(text_ends(text, form))
    return parts if find_answer(text, form) is None and text.strip() else parts - 1


def token_parts(
    tokenizer: Any, completion_ids: Sequence[int], form: PromptFormat, ignored: Sequence[int] = ()
) -> list[int]:
    """The index of the part that each token belongs to, counted from 0.

    A token belongs to the part that holds its last character; one without characters, such as the end of the sequence,
    to the part of the token before it. `ignored` tokens are not decoded.
    """
    lengths = [
        len(_decoded(tokenizer, [t for t in completion_ids[:n] if t not in ignored]))
        for n in range(1, len(completion_ids) + 1)
    ]
    text = _decoded(tokenizer, [token for token in completion_ids if token not in ignored])
    ends, parts, part = text_ends(text, form), [], 0
    for length in lengths:
        while part < len(ends) - 1 and length > ends[part]:
            part += 1
        parts.append(part)
    return parts


def completion_parts(lm: LatentLM, completion_ids: Sequence[int]) -> list[int]:
    """`token_parts` with the model's tokenizer and prompt format."""
    return token_parts(lm.tokenizer, completion_ids, lm.reasoning.format, [lm.special.eos])


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
