"""Questions without answers, read from a file."""

from __future__ import annotations

import re

from coconut.data.examples import BadRow, existing, json_rows
from coconut.utils.files import read_utf8

JSON_NAMES = (".json", ".jsonl", ".ndjson")
TEXT_NAMES = (".txt", ".text", "")


def read_questions(path: str) -> list[str]:
    """One a line, or the `question` of each row of a JSON list or of one JSON object a line.

    The name says which of them it is, or the beginning of the text. Raises FileNotFoundError, or ValueError if the
    file holds no question, or if it may be a table of another kind, whose lines are no questions.
    """
    file = existing(path, "Name a text file with a question a line, or JSON rows with a question each.")
    suffix, text = file.suffix.lower(), read_utf8(file)
    if suffix in JSON_NAMES or re.match(r'\s*(\[\s*)?\{\s*"', text):
        found = []
        for where, row in json_rows(file):
            question = row.get("question") if isinstance(row, dict) else None
            if not isinstance(question, str) or not question.strip():
                reason = row if isinstance(row, BadRow) else "there is no question in it."
                raise ValueError(f"{path}, {where}: {reason}")
            found.append(question)
    elif suffix in TEXT_NAMES:
        found = [line.strip() for line in text.split("\n") if line.strip()]
    else:
        raise ValueError(
            f"{path}: its name says neither text ({', '.join(filter(None, TEXT_NAMES))}), a question a line, nor JSON "
            f"({', '.join(JSON_NAMES)}). Write it as one of them."
        )
    if not found:
        raise ValueError(f"{path} holds no question.")
    return found
