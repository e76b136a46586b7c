"""Labelled answers: sampled from a model, or brought along; written to a file, read and checked.

A file is JSON lines, one for each question:

    {"question": "...", "answer": "...", "steps": [...], "completions": [{"text": "...", "correct": true, ...}, ...]}

Besides text and label a sample may hold `ids`, the tokens that were said (with the end of the sequence, unless the
answer was cut off), `mode` and `num_thoughts`. Without ids the text is encoded, and taken to be whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.completions.completion import Completion, completion_from_ids
from coconut.data.examples import Example, Unreadable, completed, existing, json_rows
from coconut.data.tokenization import encode_questions, encode_texts
from coconut.utils.console import log

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class LabelledAnswers:
    """The answers to one question, and which of them are right."""

    example: Example
    completions: tuple[Completion, ...]
    correct: tuple[bool, ...]

    def only(self, which: Sequence[bool]) -> LabelledAnswers:
        """Those of its answers."""
        return replace(
            self, completions=tuple(compress(self.completions, which)), correct=tuple(compress(self.correct, which))
        )


def read_answers(path: Path | str, lm: LatentLM, skip: bool = False, alike: bool = False) -> list[LabelledAnswers]:
    """As this model has them.

    With `skip` answers that are, with their questions, longer than its context are left out, and with `alike` all
    others to the same question. Raises ValueError for a line that is none, with its number, and that names the answers
    that are too long.
    """
    rows = list(_checked(path, lm))
    asked = encode_questions(lm.tokenizer, [row["question"] for row in rows], lm.reasoning.format)
    found = []
    for row, question in zip(rows, asked, strict=True):
        samples = tuple(_sample(lm, question, said) for said in row["completions"])
        example = Example(row["question"], tuple(row["steps"]), row["answer"])
        found.append(LabelledAnswers(example, samples, tuple(said["correct"] for said in row["completions"])))
    return _fitting(path, found, lm.max_sequence_length, skip, alike)


def _fitting(
    path: Path | str, labelled: list[LabelledAnswers], context: int, skip: bool, alike: bool
) -> list[LabelledAnswers]:
    fits = [[len(sample.layout.ids) <= context for sample in row.completions] for row in labelled]
    count = sum(map(len, fits))
    if not (too_long := count - sum(map(sum, fits))):
        return labelled
    if alike:
        fits = [[all(row)] * len(row) for row in fits]
    kept = [row.only(which) for row, which in zip(labelled, fits, strict=True) if any(which)]
    if not skip or not kept:
        shown = [
            f"answer {number} to question {n} ({len(sample.layout.ids)} tokens)"
            for n, row in enumerate(labelled, 1)
            for number, sample in enumerate(row.completions, 1)
            if len(sample.layout.ids) > context
        ]
        more = f" and {too_long - 5} more" if too_long > 5 else ""
        raise ValueError(
            f"{path}: {too_long} of {count} answers are, with their questions, longer than the model's context of "
            f"{context} tokens: {', '.join(shown[:5])}{more}. Leave them out with "
            f"{'' if alike else 'data.'}too_long=skip."
        )
    left_out = count - sum(map(sum, fits))
    others = ", and all others to the same questions" if alike else ""
    log(f"Left out {left_out} of {count} answers of {path}: those longer than the model's context{others}.")
    return kept


def _sample(lm: LatentLM, question: list[int], said: dict[str, Any]) -> Completion:
    ids = said.get("ids")
    if ids is None:
        [ids] = encode_texts(lm.tokenizer, [said["text"]])
        ids = [*ids, lm.special.eos]
    return completion_from_ids(
        lm, question, ids, text=said["text"], mode=said.get("mode", ""), num_thoughts=said.get("num_thoughts")
    )


def _checked(path: Path | str, lm: LatentLM) -> Iterator[dict[str, Any]]:
    count = 0
    for where, row in json_rows(existing(path)):
        row = completed(row)
        if problem := _problem(row, len(lm.tokenizer), lm.reasoning.modes):
            raise ValueError(f"{path}, {where}: {problem}")
        count += 1
        yield row
    if not count:
        raise ValueError(f"{path} holds no answers.")


def _problem(row: Any, vocabulary: int, modes: Sequence[str]) -> str | None:
    if isinstance(row, Unreadable):
        return row
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        return "it must be an object with question, answer, steps and samples"
    if not isinstance(row.get("completions"), list) or not row["completions"]:
        return "it has no samples"
    if not isinstance(row.get("steps"), list):
        return f"steps is {row.get('steps')!r}; it must be a list of texts"
    for number, said in enumerate(row["completions"], 1):
        if not isinstance(said, dict) or not isinstance(said.get("text"), str):
            return f"sample {number} has no text"
        if not isinstance(said.get("correct"), bool):
            return f"sample {number} has no label: correct is {said.get('correct')!r}, and must be true or false"
        if (mode := said.get("mode", "")) not in (modes or [""]):
            there = f"its modes are {', '.join(modes)}" if modes else "it has no modes"
            return f"sample {number} has the mode {mode!r}, which this model does not have: {there}"
        ids = said.get("ids")
        if ids is not None and not (ids and all(isinstance(i, int) and 0 <= i < vocabulary for i in ids)):
            return (
                f"sample {number} has ids that are none of this model's {vocabulary} tokens, so they were made with "
                "another tokenizer: leave the ids out, and the text is encoded, or take a model with the same one"
            )
    return None
