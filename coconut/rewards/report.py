"""The report of a comparison of reward models: tables for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.reporting.charts import panel, share_axis
from coconut.reporting.page import Legend, Part, Section, Table, Text, figure_of, page
from coconut.reporting.phrases import percent
from coconut.reporting.plots import LIGHT, draw_line, new_figure, styled
from coconut.reporting.run_table import aligned
from coconut.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLOURS = ("green", "blue", "plum", "red", "peach", "sky")  # of scorers, in their order
SELECTION = (
    "{questions:,} unseen questions, {samples} completions sampled for each, {right} of them right. Accuracy of the "
    "completion that is chosen among n, in expectation over all draws of n completions; the band is the 95 % interval "
    "over questions."
)
AGGREGATIONS = (
    "Sum, min and last aggregate the rewards of a completion's steps and, last, of its answer; the sum is the reward "
    "of the whole completion. The scores of value models and rollouts are the probability that the completion comes "
    "out right after each step, and have no sum. Vote: a majority vote weighted by the sigmoid of the reward, or by "
    "the last value. Weighted votes are averaged over {draws} random draws where there are more; everything else is "
    "exact. Answers that are equal to the task count as one, and tied answers are equally likely to be chosen. "
    "95 % intervals at n = {most} are in selection.csv."
)
CURVES = (
    "Implicit reward models by the sum of their rewards, value models and rollouts by their last score. The oracle "
    "chooses a right completion if there is one."
)
ERRORS = (
    "{answers:,} completions, {with_an_error:,} of them with a wrong step by the exact check. A scorer predicts the "
    "first step below a threshold, which was chosen on other completions. F1 is the harmonic mean of two shares: "
    "completions with an error for which it was found exactly, and completions without one for which none was found."
)
COSTS = (
    "The cost of turning {answers:,} labelled completions into a scorer of steps: training a reward model, or "
    "labelling every step by rollouts, measured on some completions and scaled to the same number. Two FLOPs for each "
    "parameter and token forward, four backward. Training on the labels of rollouts is not included."
)
BOUNDS = (
    "q is the reward up to the prefix's end; E[r] and max r are of whole completions that the reference model samples "
    "after it. In expectation E[r] ≤ q ≤ max r; the maximum of a sample can be below q, and its mean above it."
)
PREFERRED = ("sum", "last")  # the aggregation that the figure shows for a scorer: the first of these that it has


def on_screen(studies: Sequence[Study]) -> str:
    """All tables as text for a terminal."""
    by_name = {study.name: study for study in studies if study.rows}
    tables = [table(by_name[name]) for name, table in TABLES.items() if name in by_name]
    return "\n\n".join("\n".join(aligned([table.columns, *table.rows])) for table in tables)


def comparison_page(studies: Sequence[Study], name: str, folder: Path) -> str:
    """The HTML page of all studies."""
    selection, *others = studies
    facts, most = selection.facts, max(sizes(selection))
    columns = ["who chooses", "how", *(f"of {size}" for size in sizes(selection)), f"more than majority, of {most}"]
    differences = [_more(row) for row in selection.rows if row["n"] == most]
    labelled_rows = zip(selection_table(selection).rows, differences, strict=True)
    rows = [[*cells[0].split(", "), *cells[1:], difference] for cells, difference in labelled_rows]
    choosing: list[Part] = [
        Text(SELECTION.format(**facts, right=percent(facts["mean"]))),
        Legend([(colour, scorer) for scorer, colour in colours(selection).items()]),
        figure_of(lambda width: selection_curves(selection, width), "selection", "Accuracy of the choice among n.",
                  CURVES),
        Table(columns, rows, len(columns) - 2),
        Text(AGGREGATIONS.format(most=most, draws=facts["draws"])),
    ]  # fmt: skip
    sections = [Section("headline", None, choosing)]
    by_name = {study.name: study for study in others if study.rows}
    for name_of_study, (title, text) in SECTIONS.items():
        if study := by_name.get(name_of_study):
            parts = [Text(text.format(**study.facts)), TABLES[study.name](study)]
            sections.append(Section(name_of_study.replace("first_", ""), title, parts))
    description = "accuracy and cost, beside majority vote, rollouts and the oracle"
    return page(name, "Reward models", description, folder, sections, kicker="comparison")


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
    baselines = {"oracle": "muted", "majority": "ink"}
    scorers = dict.fromkeys(row["scorer"] for row in study.rows if row["scorer"] not in baselines)
    return baselines | dict(zip(scorers, cycle(COLOURS), strict=False))


def _more(row: dict[str, Any]) -> str:
    """The difference to majority vote, in percentage points, with its interval."""
    if row["scorer"] == "majority":
        return ""
    difference, low, high = (100 * row[key] for key in ("more", "more_low", "more_high"))
    return f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"


def curve(study: Study, scorer: str) -> list[dict[str, Any]]:
    """The rows of a scorer with its PREFERRED aggregation."""
    rows = [row for row in study.rows if row["scorer"] == scorer]
    names = {row["aggregation"] for row in rows}
    aggregation = next((name for name in PREFERRED if name in names), rows[0]["aggregation"])
    return [row for row in rows if row["aggregation"] == aggregation]


def sizes(study: Study) -> list[int]:
    return sorted({row["n"] for row in study.rows})


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    return Table(columns, rows, len(columns) - 1)


def selection_table(study: Study) -> Table:
    choices = dict.fromkeys((row["scorer"], row["aggregation"]) for row in study.rows)
    accuracies = {(row["scorer"], row["aggregation"], row["n"]): percent(row["accuracy"]) for row in study.rows}
    rows = [[", ".join(choice), *(accuracies[*choice, size] for size in sizes(study))] for choice in choices]
    return _table(["right, of n answers", *map(str, sizes(study))], rows)


def error_table(study: Study) -> Table:
    shares = ("f1", "of_wrong", "of_right")
    rows = [[row["scorer"], *(percent(row[key]) for key in shares), f"{row['threshold']:.3g}"] for row in study.rows]
    return _table(["first error", "F1", "of wrong", "of right", "threshold"], rows)


def cost_table(study: Study) -> Table:
    least = min(row["flops"] for row in study.rows)
    rows = [
        [row["scorer"], f"{row['seconds']:.0f}", f"{row['flops']:.2e}", f"{row['flops'] / least:.1f}"]
        for row in study.rows
    ]
    return _table(["labels of steps", "seconds", "FLOPs", "times the cheapest"], rows)


def bound_table(study: Study) -> Table:
    rows = [
        [row["scorer"], f"{row['prefixes']:,}", percent(row["mean_below"]), percent(row["below_max"]),
         f"{row['spread']:.3f}", f"{row['soft_error']:.3f}"]
        for row in study.rows
    ]  # fmt: skip
    return _table(["prefixes", "number", "E[r] ≤ q", "q ≤ max r", "spread of q", "estimate off by"], rows)


TABLES = {"selection": selection_table, "first_errors": error_table, "costs": cost_table, "bounds": bound_table}
SECTIONS = {
    "first_errors": ("The first wrong step", ERRORS),
    "costs": ("The cost of scoring steps", COSTS),
    "bounds": ("Bounds on the value of a prefix", BOUNDS),
}
