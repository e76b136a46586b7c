"""Select the rows of a file to evaluate: questions that fit into the context, with gold answers that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from coconut.config import TooLong
from coconut.data.examples import Example
from coconut.data.tokenization import TokenizedData, encode_questions, unknown_words
from coconut.engine.world import World
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.evaluator import steps_cut, writes
from coconut.evaluation.gold_answers import read_back, warn_of_limit
from coconut.generation.room import room_for_question
from coconut.tasks import Task
from coconut.utils.console import log

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class Selection:
    """The selected rows of a file: their indices, examples, token ids of questions, tokens of gold texts."""

    rows: list[int]
    examples: list[Example]
    question_ids: list[list[int]]
    gold: TokenizedData

    def first(self, count: int) -> Selection:
        """The first `count` rows."""
        gold = self.gold.select(np.arange(min(count, len(self.examples))))
        return Selection(self.rows[:count], self.examples[:count], self.question_ids[:count], gold)


def select_examples(
    lm: LatentLM, examples: Sequence[Example], task: Task, config: EvaluateConfig, *, file: str, cache_dir: str | None,
    world: World,
) -> Selection:  # fmt: skip
    """Select the rows that can be answered and judged.

    Raises ValueError for a row that is too long or whose gold answer would be judged wrong, unless config.too_long or
    config.unreadable leave such rows out.
    """
    question_ids = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    fitting = _fitting(lm, question_ids, config)
    with world.main_process_first():
        gold, right = read_back(
            lm, [examples[i] for i in fitting], task, file=file, unreadable=config.unreadable, keep_unknown=True,
            cache_dir=cache_dir,
        )  # fmt: skip
    kept = [fitting[i] for i in right]
    return Selection(kept, [examples[i] for i in kept], [question_ids[i] for i in kept], gold)


def warn_of_questions(lm: LatentLM, selected: Selection, config: EvaluateConfig, file: str) -> None:
    """Warn of words outside the vocabulary, and of gold texts that exceed the limit of new tokens."""
    rows = selected.question_ids
    if unknown := unknown_words(TokenizedData.from_lists(rows, [[len(row)] for row in rows]), lm.tokenizer):
        log(f"warning: {unknown} words of the questions are not in the model's vocabulary.")
    count = config.num_thoughts
    forms = [
        form if count is None else replace(form, steps_cut=steps_cut(form, count))
        for form in (writes(form, config.soft) for form in lm.reasoning.forms(config.mode))
    ]
    warn_of_limit(selected.gold, forms, config.max_new_tokens or lm.reasoning.max_new_tokens, file)


def _fitting(lm: LatentLM, question_ids: list[list[int]], config: EvaluateConfig) -> list[int]:
    """The indices of the questions that leave room for an answer in the context."""
    room = room_for_question(lm, config.num_thoughts, config.mode, config.soft)
    too_long = [i for i, row in enumerate(question_ids) if len(row) > room]
    if too_long and (config.too_long is TooLong.error or len(too_long) == len(question_ids)):
        shown = ", ".join(f"question {i + 1} ({len(question_ids[i])} tokens)" for i in too_long[:5])
        raise ValueError(
            f"{len(too_long)} of {len(question_ids)} questions leave no room for an answer in the model's context of "
            f"{lm.max_sequence_length} tokens: {shown}{', ...' if len(too_long) > 5 else ''}. Leave them out with "
            "too_long=skip."
        )
    return [i for i, row in enumerate(question_ids) if len(row) <= room]
