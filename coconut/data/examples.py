"""Read and check data files.

A data file is a JSON list, or has one JSON object per line. Each row has `question` (text), `steps` (a list of texts,
may be empty or missing) and `answer` (text, or a number). All other keys are kept in `meta`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coconut.utils.files import lone_surrogate, read_utf8

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Example:
    """One question with its written chain of steps and its answer."""

    question: str
    steps: tuple[str, ...]
    answer: str
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)  # "row N" or "line N" of the file


def read_examples(path: Path | str) -> list[Example]:
    """Read a data file.

    Raises FileNotFoundError if it does not exist, and ValueError if it is empty or any row is malformed; the message
    lists the first bad rows and counts all of them.
    """
    path = existing(path)
    examples, problems = [], []
    for where, row in json_rows(path):
        row = with_defaults(row)
        if problem := problem_of(row):
            problems.append(f"  {where}: {problem}")
        elif not problems:
            meta = {key: value for key, value in row.items() if key not in ("question", "steps", "answer")}
            examples.append(Example(row["question"], tuple(row["steps"]), row["answer"], meta, where))
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        more = len(problems) - len(shown)
        count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
        advice = "\nOther columns are named with data.columns.question=NAME data.columns.answer=NAME."
        raise ValueError(
            f"{path} has {count}:\n" + "\n".join(shown) + (f"\n  and {more} more" if more else "")
            + (advice if all("its keys are" in problem for problem in problems) else "")
        )  # fmt: skip
    if not examples:
        raise ValueError(f"{path} holds no example. It must be a JSON list, or have one JSON object per line.")
    return examples


def existing(path: Path | str, advice: str = "Make one with coconut data NAME, or name your own file.") -> Path:
    """Check that a file exists. Raises FileNotFoundError with the advice."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The file {path} {what}. {advice}")
    return path


class BadRow(str):
    """A row that is not valid JSON or cannot be encoded as UTF-8; the text says why."""


def json_rows(path: Path, text: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the position ("row N" or "line N") and the content of each row; a BadRow for one that cannot be used.

    `text`: the file's, if it is read already. Raises ValueError if the file is not UTF-8, or is a broken JSON list.
    """
    text = read_utf8(path) if text is None else text
    has_surrogates = re.search(r"\\u[dD][89a-fA-F]", text)
    for where, row in _parse_rows(path, text):
        broken = lone_surrogate(row) if has_surrogates else None
        yield where, row if broken is None else BadRow(f"holds half of a surrogate pair, which is not text: {broken!a}")


def _parse_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is a JSON list that breaks at line {error.lineno}: {error.msg}.") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = BadRow(f"not JSON ({error.msg} at column {error.colno}): {_short(line)}")
        yield f"line {number}", row


def with_defaults(row: Any) -> Any:
    """Add empty `steps` to a row that has none, and turn a numeric answer into text."""
    if not isinstance(row, dict):
        return row
    answer = row.get("answer")
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    steps = [] if row.get("steps") is None else row["steps"]
    return {**row, "steps": steps, **({"answer": json.dumps(answer)} if number else {})}


def problem_of(row: Any) -> str | None:
    """What is wrong with a row, or None."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return f"must be an object with question, steps and answer; it is {_short(row)}"
    missing = [key for key in ("question", "answer") if key not in row]
    if missing:
        return f"has no {' and no '.join(missing)}; its keys are: {', '.join(map(str, row)) or 'none'}"
    for key in ("question", "answer"):
        if not isinstance(row[key], str):
            return f"{key} must be text; it is {_short(row[key])}"
        if not row[key].strip():
            return f"{key} is empty"
    if "\n" in row["answer"]:
        return f"the answer must be one line; it is {_short(row['answer'])}"
    steps = row["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return f"steps must be a list of texts; it is {_short(steps)}"
    for number, step in enumerate(steps, 1):
        if not step.strip():
            return f"step {number} of {len(steps)} is empty (an example without steps has steps: [])"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
