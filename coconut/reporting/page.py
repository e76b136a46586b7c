"""What a page is made of, and the page itself.

Each kind of part is one dataclass here and one macro of its name in report.html.j2, which knows how it
looks and nothing of runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coconut.reporting.plots import DARK, LIGHT


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Score:
    """A share as a big number with `what` it is of, and on a scale with its interval and that of guessing."""

    share: float
    what: str
    interval: tuple[float, float]
    guess: float | None


@dataclass(frozen=True)
class Figure:
    """One picture drawn twice, for wide pages and for narrow ones."""

    wide: str
    narrow: str
    alt: str  # for who cannot see it
    caption: str


@dataclass(frozen=True)
class Table:
    """`numbers`: how many columns, counted from the right, hold numbers. `names`: of the columns, where each
    row of a narrow page is a list; by default `columns`.
    """

    columns: list[str]
    rows: list[list[str]]
    numbers: int = 0
    names: list[str] | None = None


@dataclass(frozen=True)
class Facts:
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    question: str
    given: str
    gold: str
    correct: bool
    written: str  # the model's text, where it says more than the answer
    remark: str
    picture: str | None


@dataclass(frozen=True)
class Answers:
    title: str
    answers: list[Answer]


@dataclass(frozen=True)
class Legend:
    """Names of colours, each with what it stands for."""

    entries: list[tuple[str, str]]


@dataclass(frozen=True)
class Folded:
    title: str
    text: str


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


@dataclass(frozen=True)
class Lead:
    """What a section comes to, in sentences that stand out."""

    sentences: list[str]


@dataclass(frozen=True)
class Ranked:
    """Lines of words, each word with its share, the largest first."""

    rows: list[tuple[str, list[tuple[str, float]]]]


@dataclass(frozen=True)
class Aside:
    """Parts that are shown when asked for."""

    title: str
    parts: list[Part]


Part = Text | Code | Score | Figure | Table | Facts | Answers | Legend | Folded | Heading | Lead | Ranked | Aside


@dataclass(frozen=True)
class Section:
    """`title` is None for the head of the page."""

    name: str
    title: str | None
    parts: list[Part]


def typeset(text: str) -> str:
    """With signs of minus, and no line ending before a sign of percent."""
    return re.sub(r"(?<![\w.\-])-(?=\d)", "−", text).replace(" %", "\N{NO-BREAK SPACE}%")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def page(
    name: str, subject: str, summary: str, folder: Path, sections: Sequence[Section], *, kicker: str = "run report"
) -> str:
    """The whole page: one HTML text that loads nothing. `kicker` says what page it is, `subject` what it is about."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["typeset"] = typeset
    environment.filters["kind"] = lambda part: type(part).__name__
    text = environment.get_template("report.html.j2").render(
        name=name,
        kicker=kicker,
        subject=subject,
        summary=summary,
        folder=str(folder.resolve()),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=sections,
        light=LIGHT,
        dark=DARK,
    )
    return text.strip() + "\n"
