"""The comparison of reward models, as it is read: on the screen and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.reporting.charts import panel, share_axis
from coconut.reporting.page import Legend, Part, Section, Table, Text, page, percent
from coconut.reporting.plots import LIGHT, draw_line, new_figure, styled
from coconut.reporting.run_table import aligned
from coconut.reporting.sections import figure_of
from coconut.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLOURS = ("green", "blue", "plum", "red", "peach", "sky")  # of scorers, in their order
SELECTION = (
    "{questions:,} unseen questions, {samples} sampled answers to each, {right} of them right. The share of "
    "questions for which the answer that is taken is right, in expectation over all ways to draw n of the "
    "answers; the band is the 95 % interval over questions."
)
WAYS = (
    "Sum, min and last: of the rewards of an answer's steps, the answer itself being the last; the sum is the "
    "reward of the whole. For value and rollouts it is how likely the answer is to come out right after each "
    "step, and there is no sum. Vote: each answer's vote weighs as much as its reward, squeezed between 0 and 1; these "
    "weighted votes are a mean over {draws} random draws where there are more, everything else is exact. Answers that "
    "are equal to the task are one answer, and tied answers are equally likely to be taken. "
    "95 % intervals at n = {most} are in selection.csv."
)
CURVES = (
    "Models by the sum of their rewards, value and rollouts by the last of theirs. The oracle takes a right one if "
    "there is one."
)
ERRORS = (
    "{answers:,} answers, {with_an_error:,} of them with a wrong step by the exact check. A scorer points at the "
    "first step below a threshold that other answers chose. F1 is the harmonic mean of two shares: of answers "
    "with an error those where it was found exactly, of the others those where none was found."
)
COSTS = (
    "From {answers:,} labelled answers to something that scores steps: a training, or rollouts that label every "
    "step, measured on some answers and scaled to as many. Two FLOPs for each parameter and token forward, four "
    "backward; a training on the labels from rollouts would come on top."
)
BOUNDS = (
    "q is the reward up to the prefix's end; E[r] and max r are of whole answers that the reference gives after "
    "it. In expectation E[r] ≤ q ≤ max r; the maximum of a sample can fall short of q, and its mean can exceed "
    "it."
)
BEST = ("sum", "last")  # the way that stands for a scorer in the figure: the first that it has


def on_screen(studies: Sequence[Study]) -> str:
    """All tables within the width of a terminal."""
    by_name = {study.name: study for study in studies}
    tables = [[["right, of n answers", *map(str, sizes(by_name["selection"]))], *selection_rows(by_name["selection"])]]
    if "first_errors" in by_name:
        tables.append([ERROR_COLUMNS, *error_rows(by_name["first_errors"])])
    tables += [[COST_COLUMNS, *cost_rows(by_name["costs"])], [BOUND_COLUMNS, *bound_rows(by_name["bounds"])]]
    return "\n\n".join("\n".join(aligned(table)) for table in tables if len(table) > 1)


def comparison_page(studies: Sequence[Study], name: str, folder: Path) -> str:
    """One page of all that was measured."""
    by_name = {study.name: study for study in studies}
    selection = by_name["selection"]
    facts, most = selection.facts, max(sizes(selection))
    columns = ["who chooses", "how", *(f"of {size}" for size in sizes(selection)), f"more than majority, of {most}"]
    more = [_more(row) for row in selection.rows if row["n"] == most]
    told_rows = zip(selection_rows(selection), more, strict=True)
    rows = [[*cells[0].split(", "), *cells[1:], gain] for cells, gain in told_rows]
    choosing: list[Part] = [
        Text(SELECTION.format(**facts, right=percent(facts["mean"]))),
        _legend(selection),
        figure_of(lambda width: selection_curves(selection, width), "selection", "Accuracy of the answer taken of n.",
                  CURVES),
        Table(columns, rows, len(columns) - 2),
        Text(WAYS.format(most=most, draws=by_name["selection"].facts["draws"])),
    ]  # fmt: skip
    sections = [Section("headline", None, choosing)]
    if errors := by_name.get("first_errors"):
        about = ERRORS.format(**errors.facts)
        sections.append(_tabled("errors", "The first wrong step", about, ERROR_COLUMNS, error_rows(errors)))
    about = COSTS.format(**by_name["costs"].facts)
    sections.append(_tabled("costs", "What it costs to know", about, COST_COLUMNS, cost_rows(by_name["costs"])))
    if rows := bound_rows(by_name["bounds"]):
        sections.append(_tabled("bounds", "The value of a prefix", BOUNDS, BOUND_COLUMNS, rows))
    what = "what each is good for, against votes, rollouts and the oracle"
    return page(name, "Reward models", what, folder, sections, kicker="comparison")


def _tabled(name: str, title: str, about: str, columns: list[str], rows: list[list[str]]) -> Section:
    return Section(name, title, [Text(about), Table(columns, rows, len(columns) - 1)])


@styled()
def selection_curves(study: Study, width: float) -> Drawing:
    """Accuracy over the number of answers, with intervals: a line for each scorer."""
    left, right, top, bottom, high = 40.0, 14.0, 12.0, 40.0, 230.0
    figure = new_figure(width, top + high + bottom)
    axes = panel(figure, left, top, width - left - right, high)
    for scorer, colour in colours(study).items():
        rows = curve(study, scorer)
        draw_line(axes, [(row["n"], row["accuracy"]) for row in rows], colour, 1.5, scorer, dots=True)
        axes.fill_between([r["n"] for r in rows], [r["low"] for r in rows], [r["high"] for r in rows],
                          color=LIGHT[colour], alpha=0.1, linewidth=0)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes(study), [str(size) for size in sizes(study)])
    axes.minorticks_off()
    share_axis(axes.yaxis, 6)
    axes.set_xlabel("sampled answers, n")
    return figure


def colours(study: Study) -> dict[str, str]:
    names = [name for name in dict.fromkeys(row["scorer"] for row in study.rows) if name not in ("oracle", "majority")]
    drawn = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    return {"oracle": "muted", "majority": "ink", **drawn}


def _more(row: dict[str, Any]) -> str:
    """In points."""
    if row["scorer"] == "majority":
        return ""
    more, low, high = (100 * row[key] for key in ("more", "more_low", "more_high"))
    return f"{more:+.1f} ({low:+.1f} to {high:+.1f})"


def _legend(study: Study) -> Legend:
    return Legend([(colour, scorer) for scorer, colour in colours(study).items()])


def curve(study: Study, scorer: str) -> list[dict[str, Any]]:
    """The rows of the way that stands for it."""
    rows = [row for row in study.rows if row["scorer"] == scorer]
    ways = {row["way"] for row in rows}
    way = next((way for way in BEST if way in ways), rows[0]["way"])
    return [row for row in rows if row["way"] == way]


def sizes(study: Study) -> list[int]:
    return sorted({row["n"] for row in study.rows})


def selection_rows(study: Study) -> list[list[str]]:
    kinds = dict.fromkeys((row["scorer"], row["way"]) for row in study.rows)
    cell = {(row["scorer"], row["way"], row["n"]): percent(row["accuracy"]) for row in study.rows}
    return [[f"{name}, {way}", *(cell[name, way, size] for size in sizes(study))] for name, way in kinds]


ERROR_COLUMNS = ["first error", "F1", "of wrong", "of right", "threshold"]


def error_rows(study: Study) -> list[list[str]]:
    return [
        [row["scorer"], *(percent(row[key]) for key in ("f1", "of_wrong", "of_right")), f"{row['threshold']:.3g}"]
        for row in study.rows
    ]


COST_COLUMNS = ["labels of steps", "seconds", "FLOPs", "times the cheapest"]


def cost_rows(study: Study) -> list[list[str]]:
    least = min(row["flops"] for row in study.rows)
    return [
        [row["scorer"], f"{row['seconds']:.0f}", f"{row['flops']:.2e}", f"{row['flops'] / least:.1f}"]
        for row in study.rows
    ]


BOUND_COLUMNS = ["prefixes", "number", "E[r] ≤ q", "q ≤ max r", "spread of q", "estimate off by"]


def bound_rows(study: Study) -> list[list[str]]:
    return [
        [
            row["scorer"], f"{row['prefixes']:,}", percent(row["mean_below"]), percent(row["below_max"]),
            f"{row['spread']:.3f}", f"{row['soft_error']:.3f}",
        ]
        for row in study.rows
    ]  # fmt: skip
