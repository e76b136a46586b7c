"""Labelled answers: sampled from a model, or brought along; written to a file, read and checked.

A file is JSON lines, one for each question:

    {"question": "...", "answer": "...", "steps": [...], "samples": [{"text": "...", "correct": true, ...}, ...]}

Besides text and label a sample may hold `ids`, the tokens that were said (with the end of the sequence, unless the
answer was cut off), `mode` and `num_thoughts`. Without ids the text is encoded, and taken to be whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data import Example, completed, encode_questions, encode_texts, existing, json_rows
from coconut.files import write_text
from coconut.rl.policy import Sample, sample_said
from coconut.rl.rollouts import Group

if TYPE_CHECKING:
    from coconut.model import LatentLM


@dataclass(frozen=True)
class Labelled:
    """The answers to one question, and which of them are right."""

    example: Example
    samples: tuple[Sample, ...]
    correct: tuple[bool, ...]


def as_row(group: Group, correct: Sequence[bool]) -> dict[str, Any]:
    """A line of the file."""
    samples = [
        {
            "text": sample.text,
            "correct": bool(right),
            "ids": sample.said,
            "mode": sample.mode,
            "num_thoughts": sample.num_thoughts,
            "new_tokens": sample.new_tokens,
            "cut": sample.cut,
        }
        for sample, right in zip(group.samples, correct, strict=True)
    ]
    example = group.example
    return {"question": example.question, "answer": example.answer, "steps": list(example.steps), "samples": samples}


def write_answers(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """The whole file or none of it."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_answers(path: Path | str, lm: LatentLM) -> list[Labelled]:
    """As this model has them. Raises ValueError for a line that is none, with its number."""
    rows = list(_checked(path, len(lm.tokenizer)))
    asked = encode_questions(lm.tokenizer, [row["question"] for row in rows], lm.reasoning.format)
    found = []
    for row, question in zip(rows, asked, strict=True):
        samples = tuple(_sample(lm, question, said) for said in row["samples"])
        example = Example(row["question"], tuple(row["steps"]), row["answer"])
        found.append(Labelled(example, samples, tuple(said["correct"] for said in row["samples"])))
    return found


def _sample(lm: LatentLM, question: list[int], said: dict[str, Any]) -> Sample:
    ids = said.get("ids")
    if ids is None:
        [ids] = encode_texts(lm.tokenizer, [said["text"]])
        ids = [*ids, lm.special.eos]
    return sample_said(
        lm, question, ids, text=said["text"], mode=said.get("mode", ""), num_thoughts=said.get("num_thoughts")
    )


def _checked(path: Path | str, vocabulary: int) -> Iterator[dict[str, Any]]:
    count = 0
    for where, row in json_rows(existing(path)):
        row = completed(row)
        if problem := _problem(row, vocabulary):
            raise ValueError(f"{path}, {where}: {problem}")
        count += 1
        yield row
    if not count:
        raise ValueError(f"{path} holds no answers.")


def _problem(row: Any, vocabulary: int) -> str | None:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        return "it must be an object with question, answer, steps and samples"
    if not isinstance(row.get("samples"), list) or not row["samples"]:
        return "it has no samples"
    if not isinstance(row.get("steps"), list):
        return f"steps is {row.get('steps')!r}; it must be a list of texts"
    for number, said in enumerate(row["samples"], 1):
        if not isinstance(said, dict) or not isinstance(said.get("text"), str):
            return f"sample {number} has no text"
        if not isinstance(said.get("correct"), bool):
            return f"sample {number} has no label: correct is {said.get('correct')!r}, and must be true or false"
        ids = said.get("ids")
        if ids is not None and not (ids and all(isinstance(i, int) and 0 <= i < vocabulary for i in ids)):
            return (
                f"sample {number} has ids that are none of this model's {vocabulary} tokens, so they were made with "
                "another tokenizer: leave the ids out, and the text is encoded, or take a model with the same one"
            )
    return None
