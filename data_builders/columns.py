"""Make rows of the project's own format from records with other columns, by a rule that names them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from coconut.config import BadRows, Division, RowRule
from coconut.data.examples import BadRow, problem_of
from coconut.tasks import TASKS
from data_builders.dataset_writer import Row
from data_builders.release_formats import bad_rows, converted
from data_builders.tables import Table

DIVISIONS = {Division.lines: r"\r\n|[\r\n]", Division.sentences: r"[\r\n]+|(?<=[.!?])\s+"}
SHOWN_COLUMNS = 40

_MISSING = object()


@dataclass
class Report:
    """What was met in a table. `texts`: chains that are a text, and how many of them hold a place to divide them."""

    rows: int
    skipped: list[str] = field(default_factory=list)
    texts: int = 0
    divided: int = 0

    def described(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {"rows": self.rows, "skipped_rows": len(self.skipped), "skipped": self.skipped}


def rows_of_table(table: Table, rule: RowRule, task: str | None = None) -> tuple[list[Row], Report]:
    """The rows of a table, and what was met in it.

    Raises ValueError for a column that no record has, and, unless the rule skips them, for records of which no row can
    be made: without question or answer, with a value that is no text, with an answer that `task` judges wrong.
    """
    report = Report(len(table.records))
    maker = _RowMaker(rule, task, report)
    maker.check_columns(table)
    rows, report.skipped = converted(table.records, maker.row)
    if report.skipped and rule.bad_rows is BadRows.error:
        advice = "Mend or remove them, or leave them out with bad_rows=skip:"
        raise ValueError(bad_rows(table.name, report.skipped, report.rows, advice))
    if not rows:
        raise ValueError(bad_rows(table.name, report.skipped, report.rows, "None can be used:"))
    return rows, report


class _RowMaker:
    def __init__(self, rule: RowRule, task: str | None, report: Report):
        self.rule, self.report = rule, report
        self.question = rule.columns.question or "question"
        self.answer = rule.columns.answer or "answer"
        self.steps = rule.columns.steps or (None if rule.steps.mark else "steps")
        self.task = TASKS[task] if task else None
        separator, pattern, into = rule.steps.separator, rule.steps.pattern, rule.steps.into
        self.asked = bool(separator or pattern or into)
        self.place = re.compile(re.escape(separator) if separator else pattern or DIVISIONS[into or Division.lines])

    def check_columns(self, table: Table) -> None:
        """Raise ValueError for a column that is named, or needed, and that no record has."""
        named = {"columns.question": self.question, "columns.answer": self.answer}
        named |= {"columns.steps": self.steps} if self.rule.columns.steps else {}
        records = [record for _, record in table.records if isinstance(record, dict)]
        for key, name in [*named.items(), *(("keep", name) for name in self.rule.keep)]:
            if records and all(_value_at(record, name) is _MISSING for record in records):
                there = list(dict.fromkeys(column for record in records for column in _columns(record)))
                more = f" and {len(there) - SHOWN_COLUMNS} more" if len(there) > SHOWN_COLUMNS else ""
                raise ValueError(
                    f"{table.name} has no column {name!r}. Its columns are {', '.join(there[:SHOWN_COLUMNS])}{more}. "
                    f"Name the right one with {f'{key}=[NAME]' if key == 'keep' else f'{key}=NAME'}."
                )

    def row(self, record: Any) -> Row:
        """The row of a record. Raises ValueError if there is none."""
        if not isinstance(record, dict):
            raise ValueError(record if isinstance(record, BadRow) else f"it is {_kind(record)}, and no set of columns.")
        question = _text(_value_at(record, self.question), self.question)
        answer, chain = _text(_value_at(record, self.answer), self.answer, numbers=True), None
        if mark := self.rule.steps.mark:
            chain, found, rest = answer.rpartition(mark)
            if not found or not rest.strip():
                raise ValueError(f"{self.answer!r} has no answer after {mark!r}: {answer[-80:]!r}.")
            answer = rest.strip()
        if self.steps:
            chain = _value_at(record, self.steps)
        row = {"question": question, "steps": self._divided(chain), "answer": answer, **self._kept(record)}
        if problem := problem_of(row):
            raise ValueError(f"{problem}.")
        if self.task and not self.task.judge(answer, answer):
            raise ValueError(f"the task {self.task.name} would not judge its answer right: {answer!r}.")
        return row

    def _divided(self, chain: Any) -> list[str]:
        if chain is _MISSING or _is_empty(chain) or (isinstance(chain, str) and not chain.strip()):
            return []
        if isinstance(chain, str):
            self.report.texts += 1
            self.report.divided += self.place.search(chain) is not None
            parts = self._pieces(chain)
        elif isinstance(chain, list) and all(isinstance(step, str) for step in chain if not _is_empty(step)):
            texts = [step for step in chain if not _is_empty(step)]
            parts = [part for step in texts for part in self._pieces(step)] if self.asked else texts
        else:
            odd = next((step for step in chain if not isinstance(step, str | None)), None) if chain else None
            told = f"a list with {_kind(odd)} in it" if isinstance(chain, list) else _kind(chain)
            raise ValueError(f"{self.steps!r} is {told}; steps must be a text, or a list of texts.")
        return [part.strip() for part in parts if part.strip()]

    def _pieces(self, text: str) -> list[str]:
        begin, pieces = 0, []
        for found in self.place.finditer(text):
            pieces.append(text[begin : found.start()])
            begin = found.end()
        return [*pieces, text[begin:]]

    def _kept(self, record: Mapping[str, Any]) -> Row:
        values = {name: value for name in self.rule.keep if (value := _value_at(record, name)) is not _MISSING}
        for name, value in values.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ValueError(f"{name!r} is {_kind(value)}, which JSON cannot hold. Leave it out of keep.") from None
        return values


def _value_at(value: Any, name: str) -> Any:
    """The value of a column, found by its whole name or along the dots in it; _MISSING if there is none."""
    return value[name] if isinstance(value, dict) and name in value else _follow(value, name.split("."))


def _follow(value: Any, parts: list[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, dict):
        return _follow(value[parts[0]], parts[1:]) if parts[0] in value else _MISSING
    if not isinstance(value, list):
        return _MISSING
    if re.fullmatch(r"-?\d+", parts[0]):
        place = int(parts[0])
        return _follow(value[place], parts[1:]) if -len(value) <= place < len(value) else _MISSING
    found = [_follow(item, parts) for item in value]
    return _MISSING if any(item is _MISSING for item in found) else found


def _columns(record: Mapping[str, Any]) -> Iterator[str]:
    """The names of a record's columns, with dots for those that hold further ones."""
    for name, value in record.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) and value else (str(name),)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, name: str, numbers: bool = False) -> str:
    """A value as text without space around it. `numbers`: whether a number or a truth value may be one."""
    if value is _MISSING or _is_empty(value):
        raise ValueError(f"{name!r} is missing." if value is _MISSING else f"{name!r} is empty.")
    if numbers and isinstance(value, bool | int | float | Decimal):
        return json.dumps(value) if isinstance(value, float) else str(value)
    if not isinstance(value, str):
        hint = f" {name}.0 takes the first." if isinstance(value, list) and value else ""
        raise ValueError(f"{name!r} is {_kind(value)}; it must be a text{' or a number' if numbers else ''}.{hint}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty.")
    return value.strip()


def _kind(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, list):
        return f"a list of {len(value)} values" if value else "an empty list"
    if isinstance(value, dict):
        return f"a set of columns ({', '.join(map(str, value))})"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
