"""Where the thoughts lie: the chart of their spread in each layer, the sentences, the parts of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from coconut.analysis.verdict import SAME
from coconut.reporting.charts import NARROW, SHADES, panel, share_axis
from coconut.reporting.page import Aside, Drawings, Part, Table, Text, figures
from coconut.reporting.phrases import whole_percent
from coconut.reporting.plots import LIGHT, new_figure, styled
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LENGTHS = ("norm", "to_previous", "to_mean_word", "to_nearest_word")


def parts(study: Study, drawn: Drawings, noun: str) -> list[Part]:
    caption = (
        f"How much the hidden state at each {noun} differs between questions, as a share of its length, in each layer. "
        "The token before the slot is the same in every question, so that all of its spread comes from attention."
    )
    columns = [noun, "length", "to the one before", "to the mean word", "to the nearest word", "spread", "rank"]
    rows = [
        [str(row["thought"]), *(DASH if row[key] is None else f"{row[key]:.2f}" for key in LENGTHS),
         whole_percent(row["spread"]), f"{row['rank']:.1f}"] for row in study.rows
    ]  # fmt: skip
    figure = figures(drawn, "layers", "Spread over questions in each layer.", caption)
    return [Text(" ".join(describe(study, noun))), *figure, Aside("The numbers", [Table(columns, rows, 6)])]


def describe(study: Study, noun: str) -> list[str]:
    """Say in sentences how much the thoughts of different questions differ, and how far they are from words."""
    rows, facts = study.rows, study.facts
    spreads, ranks = [row["spread"] for row in rows], [row["rank"] for row in rows]
    if max(spreads) < SAME:
        return [f"The {noun}s are the same whatever the question, as they are fed."]
    same = [str(row["thought"]) for row in rows if row["spread"] < SAME]
    sentences = [
        f"Between questions a {noun} differs by {_from_to(spreads, whole_percent)} of its length; words differ from "
        f"each other by {whole_percent(facts['word_spread'])}. The {noun}s of all questions fill "
        f"{_from_to(ranks, '{:.1f}'.format)} of {facts['width']} directions (effective rank)."
    ]
    if same:
        sentences.append(f"Number {listed(same)} {'is' if len(same) == 1 else 'are'} the same whatever the question.")
    nearest, length = ([row[key] for row in rows] for key in ("to_nearest_word", "norm"))
    sentences.append(
        f"They are {_from_to(length, '{:.1f}'.format)} long and {_from_to(nearest, '{:.1f}'.format)} away from the "
        f"nearest word; words are {facts['word_norm']:.1f} long."
    )
    return sentences


def _from_to(values: list[float], show: Callable[[float], str]) -> str:
    least, most = show(min(values)), show(max(values))
    return least if least == most else f"{least} to {most}"


@styled()
def chart(study: Study, width: float, noun: str = "thought") -> Figure:
    """Spread over questions in each layer, a line for `<bot>`, the first positions and the last."""
    places = sorted({row["place"] for row in study.rows})
    shown = places if len(places) <= len(SHADES) + 1 else [*places[: len(SHADES) - 1], places[-1]]
    left, right, bottom, above = 40, 14, 36, 150
    columns = 2 if width < NARROW else 3
    top = 46 + 14 * -(-len(shown) // columns)
    figure = new_figure(width, top + above + bottom)
    axes = panel(figure, left, top, width - left - right, above)
    for number, place in enumerate(shown):
        rows = [row for row in study.rows if row["place"] == place]
        colour, label = (SHADES[number - 1], f"{noun} {place}") if place else ("muted", "before the slot")
        axes.plot([row["layer"] for row in rows], [row["spread"] for row in rows], color=LIGHT[colour], marker="o",
                  markersize=4, linewidth=1.2, label=label, clip_on=False)  # fmt: skip
    share_axis(axes.yaxis, 5)
    axes.set_xticks(sorted({row["layer"] for row in study.rows}))
    axes.set_xlabel("layer, 0 for its input", loc="right")
    axes.set_title("Spread over questions", loc="left", pad=14 + 14 * -(-len(shown) // columns))
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.05), handlelength=1.2, borderaxespad=0)
    return figure
