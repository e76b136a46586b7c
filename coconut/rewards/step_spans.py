"""Where the steps of an answer lie, in text and in tokens.

Nothing here reaches into the prompt: an answer is what the model said after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coconut.methods import PromptFormat
from coconut.tasks.chain import find_answer

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def text_ends(text: str, form: PromptFormat) -> list[int]:
    """Where each part of an answer ends, in characters: every step, and last the answer itself.

    A step ends with what ends it in the prompt format, or where the answer's mark begins. Empty steps belong to the one
    before. A text without steps is one part, and so is what was said last if no answer was given.
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
        return ends  # no answer was given: the last step is the last part
    return [*ends, len(text)]


def step_count(text: str, form: PromptFormat) -> int:
    """How many of the parts are steps: all but the answer, where there is one."""
    parts = len(text_ends(text, form))
    return parts if find_answer(text, form) is None and text.strip() else parts - 1


def token_parts(
    tokenizer: Any, completion_ids: Sequence[int], form: PromptFormat, ignored: Sequence[int] = ()
) -> list[int]:
    """For each token of an answer the number of its part, rising from 0.

    A token belongs where its last character stands; one without any, such as the end of the sequence, to the token
    before it. `ignored` tokens are never text.
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
    """The same of what this model said, in its prompt format."""
    return token_parts(lm.tokenizer, completion_ids, lm.reasoning.format, [lm.special.eos, lm.special.pad])


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
