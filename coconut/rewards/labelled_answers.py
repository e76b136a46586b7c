"""Files of labelled completions, sampled from a model or made elsewhere: write, read and check them.

A file is JSON lines, one for each question:

    {"question": "...", "answer": "...", "steps": [...], "completions": [{"text": "...", "correct": true, ...}, ...]}

Beside text and label a completion may hold `ids`, its tokens (with the end of the sequence, unless it was truncated),
`mode` and `num_thoughts`. Without `ids` the text is encoded and the end of the sequence is appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.completions.completion import Completion, completion_from_ids
from coconut.data.examples import BadRow, Example, existing, json_rows, with_defaults
from coconut.data.tokenization import encode_questions, encode_texts
from coconut.utils.console import log

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class LabelledAnswers:
    """The completions of one question, and whether each is right."""

    example: Example
    completions: tuple[Completion, ...]
    correct: tuple[bool, ...]

    def select(self, mask: Sequence[bool]) -> LabelledAnswers:
        """Keep the completions for which `mask` is true."""
        completions, correct = (tuple(compress(values, mask)) for values in (self.completions, self.correct))
        return replace(self, completions=completions, correct=correct)


def all_completions(labelled: Sequence[LabelledAnswers]) -> list[Completion]:
    return [completion for row in labelled for completion in row.completions]


def read_answers(
    path: Path | str, lm: LatentLM, skip: bool = False, whole_questions: bool = False
) -> list[LabelledAnswers]:
    """Read a file of labelled completions, tokenized for this model.

    skip: leave out completions that are, with their prompts, longer than the model's context.
    whole_questions: with `skip`, leave out all completions of a question of which one is too long.
    Raises ValueError for a malformed line, which it names, and, without `skip`, for completions that are too long.
    """
    rows = _checked_rows(path, lm)
    questions = encode_questions(lm.tokenizer, [row["question"] for row in rows], lm.reasoning.format)
    labelled = []
    for row, question in zip(rows, questions, strict=True):
        completions = tuple(_as_completion(lm, question, record) for record in row["completions"])
        example = Example(row["question"], tuple(row["steps"]), row["answer"])
        correct = tuple(record["correct"] for record in row["completions"])
        labelled.append(LabelledAnswers(example, completions, correct))
    return _fit_to_context(path, labelled, lm.max_sequence_length, skip, whole_questions)


def _fit_to_context(
    path: Path | str, labelled: list[LabelledAnswers], max_length: int, skip: bool, whole_questions: bool
) -> list[LabelledAnswers]:
    fits = [[len(completion.layout.ids) <= max_length for completion in row.completions] for row in labelled]
    count = sum(map(len, fits))
    if not (too_long := count - sum(map(sum, fits))):
        return labelled
    if whole_questions:
        fits = [[all(row)] * len(row) for row in fits]
    fitting = [row.select(mask) for row, mask in zip(labelled, fits, strict=True) if any(mask)]
    if not skip or not fitting:
        examples = [
            f"completion {number} of question {n} ({len(completion.layout.ids)} tokens)"
            for n, row in enumerate(labelled, 1)
            for number, completion in enumerate(row.completions, 1)
            if len(completion.layout.ids) > max_length
        ]
        more = f" and {too_long - 5} more" if too_long > 5 else ""
        raise ValueError(
            f"{path}: {too_long} of {count} completions are, with their prompts, longer than the model's context of "
            f"{max_length} tokens: {', '.join(examples[:5])}{more}. Leave them out with "
            f"{'' if whole_questions else 'data.'}too_long=skip."
        )
    left_out = count - sum(map(sum, fits))
    others_note = ", and all others of the same questions" if whole_questions else ""
    log(f"Left out {left_out} of {count} completions of {path}: those longer than the model's context{others_note}.")
    return fitting


def _as_completion(lm: LatentLM, question: list[int], record: dict[str, Any]) -> Completion:
    ids = record.get("ids")
    if ids is None:
        [ids] = encode_texts(lm.tokenizer, [record["text"]])
        ids = [*ids, lm.special.eos]
    return completion_from_ids(
        lm, question, ids, text=record["text"], mode=record.get("mode", ""), num_thoughts=record.get("num_thoughts")
    )


def _checked_rows(path: Path | str, lm: LatentLM) -> list[dict[str, Any]]:
    rows = []
    for where, row in json_rows(existing(path)):
        row = with_defaults(row)
        if problem := _problem(row, len(lm.tokenizer), lm.reasoning.modes):
            raise ValueError(f"{path}, {where}: {problem}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no completions.")
    return rows


def _problem(row: Any, vocabulary: int, modes: Sequence[str]) -> str | None:
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        return "it must be an object with question, answer, steps and completions"
    if not isinstance(row.get("completions"), list) or not row["completions"]:
        return "it has no completions"
    if not isinstance(row.get("steps"), list):
        return f"steps is {row.get('steps')!r}; it must be a list of texts"
    for number, record in enumerate(row["completions"], 1):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            return f"completion {number} has no text"
        if not isinstance(record.get("correct"), bool):
            return f"completion {number} has no label: correct is {record.get('correct')!r}; it must be true or false"
        if (mode := record.get("mode", "")) not in (modes or [""]):
            available = f"its modes are {', '.join(modes)}" if modes else "it has no modes"
            return f"completion {number} has the mode {mode!r}, which this model does not have: {available}"
        ids = record.get("ids")
        if ids is not None and not (ids and all(isinstance(i, int) and 0 <= i < vocabulary for i in ids)):
            return (
                f"completion {number} has ids that are none of this model's {vocabulary} tokens, so they were made "
                "with another tokenizer. Leave the ids out, so that the text is encoded, or take a model with the same "
                "tokenizer"
            )
    return None
