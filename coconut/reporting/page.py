"""The parts of a page, and the function that renders it.

Each kind of part is a dataclass here and a macro of the same name in report.html.j2, which determines its look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.reporting.phrases import percent, typeset, utc
from coconut.reporting.plots import DARK, LIGHT, as_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

WIDE, NARROW = 720, 350  # points
Drawings = dict[str, "Callable[[float], Drawing]"]  # charts by name, each a function of its width in points


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command to copy."""

    text: str


@dataclass(frozen=True)
class Score:
    """An accuracy as a large number, followed by `what`, and on a scale with its 95 % interval and chance accuracy."""

    share: float
    what: str
    interval: tuple[float, float]
    chance_accuracy: float | None


@dataclass(frozen=True)
class Figure:
    """A figure as two SVG elements, for wide pages and for narrow ones."""

    wide: str
    narrow: str
    alt: str  # for screen readers
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts.

    `numbers`: how many columns, counted from the right, hold numbers. `names`: the names of the columns on a narrow
    page, where each row is shown as a list; by default `columns`.
    """

    columns: list[str]
    rows: list[list[str]]
    numbers: int = 0
    names: list[str] | None = None


@dataclass(frozen=True)
class Facts:
    """A list of (name, value)."""

    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """A question and the model's answer to it."""

    question: str
    predicted: str
    gold: str
    correct: bool
    written: str  # the model's text, if it has more than the answer
    remark: str
    picture: str | None


@dataclass(frozen=True)
class Answers:
    """Answers side by side, under a title."""

    title: str
    answers: list[Answer]


@dataclass(frozen=True)
class Legend:
    """The meaning of colours: (name of a colour, meaning)."""

    entries: list[tuple[str, str]]


@dataclass(frozen=True)
class Heading:
    """The heading of a part of a section."""

    text: str


@dataclass(frozen=True)
class Lead:
    """The conclusions of a section, in large sentences."""

    sentences: list[str]


@dataclass(frozen=True)
class Ranked:
    """Named rows of words with their probabilities, the likeliest first."""

    rows: list[tuple[str, list[tuple[str, float]]]]


@dataclass(frozen=True)
class Aside:
    """Parts that are shown on a click on the title."""

    title: str
    parts: list[Part]


Part = Text | Code | Score | Figure | Table | Facts | Answers | Legend | Heading | Lead | Ranked | Aside


@dataclass(frozen=True)
class Section:
    """A section of the page. `name`: its HTML id. `title`: None for the head of the page."""

    name: str
    title: str | None
    parts: list[Part]


def figure_of(draw: Callable[[float], Drawing], name: str, alt: str, caption: str) -> Figure:
    """Draw a chart for wide pages and for narrow ones. `draw`: a function of the width in points."""
    wide, narrow = (as_svg(draw(width), f"{name}-{word}") for width, word in ((WIDE, "wide"), (NARROW, "narrow")))
    return Figure(wide, narrow, alt, caption)


def figures(drawn: Drawings, name: str, alt: str, caption: str) -> list[Part]:
    """The named chart as a figure; nothing if it is not among those that can be drawn."""
    return [figure_of(drawn[name], name, alt, caption)] if name in drawn else []


def page(
    name: str, subject: str, summary: str, folder: Path, sections: Sequence[Section], *, kicker: str = "run report",
    made_by: str = "coconut analyze",
) -> str:  # fmt: skip
    """Render the page as HTML that loads no other file.

    `kicker`: the kind of page. `subject`: what it is about. `made_by`: the command that makes it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "typeset": typeset, "kind": lambda part: type(part).__name__}
    text = environment.get_template("report.html.j2").render(
        name=name, kicker=kicker, subject=subject, summary=summary, folder=str(folder.resolve()), sections=sections,
        made_by=made_by, date=utc(datetime.now(UTC).isoformat()), light=LIGHT, dark=DARK,
    )  # fmt: skip
    return text.strip() + "\n"
