"""The maximum length of a question: its thoughts and an answer must also fit into the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions
from coconut.generation.config import SoftThinking
from coconut.generation.soft_thinking import SoftThoughts

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def indices_that_fit(lm: LatentLM, questions: Sequence[str], more: int = 0, mode: str | None = None) -> list[int]:
    """The indices of the questions that leave room for an answer after `more` thoughts than trained."""
    rows = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    most = max(form.num_thoughts for form in lm.reasoning.forms(mode))
    room = room_for_question(lm, most + more if more else None, mode)
    return [i for i, row in enumerate(rows) if len(row) <= room]


def room_for_question(
    lm: LatentLM, num_thoughts: int | None = None, mode: str | None = None, soft: SoftThinking | None = None
) -> int:  # fmt: skip
    """The maximum number of tokens of a question, such that its thoughts and an answer of one token fit after it.

    `num_thoughts`: by default as trained. A hybrid model may choose any mode, so its mode with the most thoughts
    counts, unless `mode` forces one. With Soft Thinking its most thoughts and the answer's mark have to fit, too.
    """
    reasoning = lm.reasoning
    forms = reasoning.forms(mode)
    counts = [form.num_thoughts if num_thoughts is None else num_thoughts for form in forms]
    slots = [len(slot_with_markers(form, lm.special, count)) for form, count in zip(forms, counts, strict=True)]
    more = soft.max_thoughts + len(SoftThoughts(lm, soft).mark) if soft else bool(reasoning.modes)
    return lm.max_sequence_length - max(slots) - more - 1
