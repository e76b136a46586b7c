"""GSM8K and GSM8K-Aug: the released files, converted.

Run `python -m data_builders.gsm8k --help`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from coconut.cli import application
from coconut.tasks import gsm8k
from data_builders.sources import Kind, SourceKeys, expect, open_released, rows_of, text_field
from data_builders.writing import Row, write_splits

ANNOTATION = re.compile(r"<<([^<>\n]*)>>")


class Steps(StrEnum):
    equations = "equations"  # <<48/2=24>>
    sentences = "sentences"


@dataclass
class Gsm8kBuild(SourceKeys):
    name: str = "gsm8k"
    steps: Steps = Steps.equations

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError(
                "No file is given. GSM8K is at https://github.com/openai/grade-school-math (train.jsonl, "
                "test.jsonl), GSM8K-Aug at https://github.com/da03/Internalize_CoT_Step_by_Step (train.txt, "
                "valid.txt, test.txt). Give them as train=FILE valid=FILE test=FILE, or one as source=FILE."
            )


def build(config: Gsm8kBuild) -> None:
    splits = config.read(partial(released_rows, kind=config.steps))
    made = {"task": "gsm8k", "dials": {"steps": config.steps.value}, "seed": config.seed}
    write_splits(config.out_dir, config.name, splits, {**made, "sources": config.described()})


def released_rows(path: str, kind: Steps = Steps.equations) -> list[Row]:
    """The rows of a file in either released form; which one it is, its content says."""
    released = open_released(path)
    expect(released, Kind.gsm8k, Kind.gsm8k_aug)
    if released.kind is Kind.gsm8k:
        return rows_of(released, partial(from_original, kind=kind))
    if kind is Steps.sentences:
        raise ValueError(f"{path} is GSM8K-Aug, which has no sentences. Leave out steps=sentences.")
    return rows_of(released, from_aug)


def from_original(line: str, kind: Steps = Steps.equations) -> Row:
    """A JSON object on one line; its "answer" is the solution, a line a sentence, and `#### answer`."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}).") from None
    question = text_field(record, "question")
    solution, answer = _solution_and_answer(text_field(record, "answer"))
    if kind is Steps.equations:
        return _row(question, _equations(solution), answer)
    sentences = [ANNOTATION.sub("", sentence).strip() for sentence in solution.split("\n")]
    return _row(question, [sentence for sentence in sentences if sentence], answer)


def from_aug(line: str) -> Row:
    question, mark, rest = line.rpartition("||")
    if not mark or not question.strip():
        raise ValueError(f"it has no question before a '||': {line[:80]!r}.")
    chain, answer = _solution_and_answer(rest)
    steps = _equations(chain)
    if left := ANNOTATION.sub("", chain).strip():
        raise ValueError(f"between question and answer stands more than <<...>>: {left[:80]!r}.")
    return _row(question.strip(), steps, answer)


def _solution_and_answer(text: str) -> tuple[str, str]:
    solution, mark, answer = text.rpartition("####")
    if not mark:
        raise ValueError(f"it has no '####' before the answer: {text[-80:]!r}.")
    value = gsm8k.number(answer)
    if value is None:
        raise ValueError(f"the answer {answer.strip()!r} is not a number.")
    return solution, f"{value:f}"


def _equations(text: str) -> list[str]:
    equations = [found[0] for found in ANNOTATION.finditer(text)]
    if text.count("<<") != len(equations) or text.count(">>") != len(equations):
        raise ValueError(f"a '<<' and a '>>' do not match: {text.strip()[:80]!r}.")
    return equations


def _row(question: str, steps: list[str], answer: str) -> Row:
    return {"question": question, "steps": steps, "answer": answer}


main = application("build_gsm8k", Gsm8kBuild, build)

if __name__ == "__main__":
    main()
