"""Examples: reading and checking data files.

A data file is a JSON list, or one JSON object a line, of rows with `question` (text), `steps` (a list
of texts, may be empty or missing) and `answer` (text, or a number). Whatever else a row holds is kept in `meta`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.utils.files import lone_surrogate, read_utf8

if TYPE_CHECKING:
    pass


SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Example:
    """One question with its written chain and its answer."""

    question: str
    steps: tuple[str, ...]
    answer: str
    meta: dict[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False)  # its row or line in the file


def read_examples(path: Path | str) -> list[Example]:
    """Read a data file.

    Raises FileNotFoundError if there is none, and ValueError if it is empty or any row is malformed:
    the message names the first bad rows and counts all of them.
    """
    path = existing(path)
    examples, problems = [], []
    for where, row in json_rows(path):
        row = with_defaults(row)
        if problem := _problem(row):
            problems.append(f"  {where}: {problem}")
        elif not problems:
            meta = {key: value for key, value in row.items() if key not in ("question", "steps", "answer")}
            examples.append(Example(row["question"], tuple(row["steps"]), row["answer"], meta, where))
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        more = len(problems) - len(shown)
        count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
        raise ValueError(f"{path} has {count}:\n" + "\n".join(shown) + (f"\n  and {more} more" if more else ""))
    if not examples:
        raise ValueError(f"{path} holds no example. It must be a JSON list, or one JSON object a line.")
    return examples


def existing(
    path: Path | str, advice: str = "Make one with python -m data_builders.NAME, or name your own file."
) -> Path:
    """The path of a file. Raises FileNotFoundError that says how to get one."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"The file {path} {what}. {advice}")
    return path


class BadRow(str):
    """Why a row could not be parsed, or cannot be encoded."""


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row of a JSON list, or of one JSON object a line, stands, and the row, or why there is none.

    Raises ValueError if the file is no UTF-8 text, or begins as a list and breaks.
    """
    text = read_utf8(path)
    has_surrogates = re.search(r"\\u[dD][89a-fA-F]", text)
    for where, row in _parse_rows(path, text):
        broken = lone_surrogate(row) if has_surrogates else None
        yield where, row if broken is None else BadRow(f"holds half of a surrogate pair, no text: {broken!a}")


def _parse_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} begins as a JSON list but breaks at line {error.lineno}: {error.msg}.") from None
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
    """A row with the steps that are missing, none, and with an answer that is a number as text."""
    if not isinstance(row, dict):
        return row
    answer = row.get("answer")
    number = isinstance(answer, int | float) and not isinstance(answer, bool)
    steps = [] if row.get("steps") is None else row["steps"]
    return {**row, "steps": steps, **({"answer": json.dumps(answer)} if number else {})}


def _problem(row: Any) -> str | None:
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
