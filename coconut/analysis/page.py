"""What a page is made of, and the page itself.

Each kind of part is one dataclass here and one macro of its name in report.html.j2, which knows how it
looks and nothing of runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coconut.analysis.plots import DARK, LIGHT


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
    told: str  # for who cannot see it
    caption: str


@dataclass(frozen=True)
class Table:
    """`numbers`: how many columns, counted from the right, hold numbers."""

    columns: list[str]
    rows: list[list[str]]
    numbers: int = 0


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


Part = Text | Code | Score | Figure | Table | Facts | Answers | Legend | Folded


@dataclass(frozen=True)
class Section:
    """`title` is None for the head of the page."""

    name: str
    title: str | None
    parts: list[Part]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def page(name: str, method: str, summary: str, folder: Path, sections: Sequence[Section]) -> str:
    """The whole page about a run: one HTML text that loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["kind"] = lambda part: type(part).__name__
    text = environment.get_template("report.html.j2").render(
        name=name,
        method=method,
        summary=summary,
        folder=str(folder.resolve()),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=sections,
        light=LIGHT,
        dark=DARK,
    )
    return text.strip() + "\n"
