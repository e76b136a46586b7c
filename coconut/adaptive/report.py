"""What a policy is worth, as it is read: on the screen and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.adaptive.experiments import BEST_FIXED, ORACLE, POLICY
from coconut.reporting.charts import panel, share_axis
from coconut.reporting.page import Lead, Legend, Section, Table, Text, page, percent, typeset
from coconut.reporting.plots import LIGHT, draw_line, new_figure, styled
from coconut.reporting.run_table import aligned, wrapped
from coconut.reporting.sections import figure_of
from coconut.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLOURS = ("blue", "green", "plum", "red", "peach", "sky")  # of dimensions, in their order
SMALL_HEADROOM = 0.01  # a headroom below which there is hardly anything to choose
SMALL_DIFFERENCE = (
    0.02  # a share of pairs of questions that are treated differently below which there is hardly a choice
)
ABOUT = (
    "{questions:,} questions, {configurations} configurations. Each of {seeds} policies learned from {few} questions "
    "of its own, and was asked the others; means over the {seeds}, with Student's 95 % interval: of other draws of "
    "what is learned from among these questions, not of other questions. The reward is the "
    "score of an answer less {cost:g} for each forward pass. A policy tried {tried:,.0f} pairs of a question and a "
    "configuration; the best fixed configuration was found from all {known_to_best_fixed:,}, and is most often "
    "{best_fixed} (in {best_fixed_seeds} of {seeds})."
)
ARMS = (
    "Random takes every configuration equally often. The blind policy learns likewise, but is shown no question. NAME "
    "alone: one dimension is learned, the others are as in the best fixed configuration. The oracle takes what is best "
    "for each test question. More: than the best fixed configuration, of the same seed; above: in so many seeds."
)
CURVE = (
    "How much less a policy got than the best there was for the question asked, and its entropy as a share of that of "
    "even odds, in the mean over seeds. Dashed: the best fixed configuration and the random one on the same questions."
)
HEADS = (
    "Entropy as a share of that of even odds, at the temperature of the last update. Distance: the mean total "
    "variation between what the policy would do for two test questions, 0 if it does the same for all. Differing: "
    "pairs of questions that are given different values."
)
CHOICES = (
    "Test questions by the number of steps in their written chain, over all seeds; what the policies take most often."
)


def sentences(studies: Sequence[Study]) -> list[str]:
    """What was found, the headroom first."""
    told = {study.name: study for study in studies}
    facts, rows = told["arms"].facts, {row["arm"]: row for row in told["arms"].rows}
    (low, high), policy, blind = facts["headroom_interval"], rows[POLICY], rows["blind policy"]
    found = [
        f"There is {facts['headroom']:+.3f} of reward ({low:+.3f} to {high:+.3f}) between the best "
        f"fixed configuration, {rows[BEST_FIXED]['reward']:.3f}, and the best for each question, "
        f"{rows[ORACLE]['reward']:.3f}."
    ]
    if facts["headroom"] < SMALL_HEADROOM:
        found.append("That is next to nothing: on these questions there is hardly anything to choose.")
    more, more_low, more_high = policy["more"], policy["more_low"], policy["more_high"]
    worth = "beats" if more_low > 0 else "is worse than" if more_high < 0 else "cannot be told from"
    found.append(
        f"The policy {worth} the best fixed configuration: {more:+.3f} ({more_low:+.3f} to {more_high:+.3f}), "
        f"above it in {policy['seeds_above']} of {facts['seeds']} seeds."
    )
    if more > 0:
        found[-1] += f" That is {100 * more / facts['headroom']:.0f} % of the headroom."
    found.append(f"A policy that is not shown the question comes to {blind['reward']:.3f}, where it comes to "
                 f"{policy['reward']:.3f}.")  # fmt: skip
    if max(row["differing"] for row in told["heads"].rows) < SMALL_DIFFERENCE:
        found.append("It does nearly the same for all questions, so it chooses nothing.")
    return found


def on_screen(studies: Sequence[Study]) -> str:
    """Within the width of a terminal."""
    told = {study.name: study for study in studies}
    rows = [
        ["who chooses", "reward", "more", "accuracy", "passes"],
        *([cells[0], cells[1], cells[3], cells[6], cells[7]] for cells in arm_rows(told["arms"])),
    ]
    return "\n".join([*map(wrapped, sentences(studies)), "", *aligned(rows)])


def adaptive_page(studies: Sequence[Study], name: str, folder: Path) -> str:
    """One page of all that was measured."""
    told = {study.name: study for study in studies}
    curve, names = told["curve"], told["curve"].facts["names"]
    sections = [
        Section("headline", None, [
            Lead(sentences(studies)),
            Table(ARM_COLUMNS, arm_rows(told["arms"]), len(ARM_COLUMNS) - 1),
            Text(ABOUT.format(**told["arms"].facts)),
            Text(ARMS),
        ]),
        Section("learning", "How it learned", [
            Legend([("ink", "regret"), *((colour, f"entropy, {name}") for name, colour in coloured(names))]),
            figure_of(lambda width: curves(curve, width), "curve", "Regret and entropy over updates.", CURVE),
        ]),
        Section("choices", "What it chooses", [
            Table(CHOICE_COLUMNS, choice_rows(told["choices"]), 7),
            Text(CHOICES),
            Table(HEAD_COLUMNS, head_rows(told["heads"]), 4),
            Text(HEADS),
        ]),
    ]  # fmt: skip
    what = "a policy that chooses how to answer each question, against fixed choices and the oracle"
    return page(name, "Adaptive", what, folder, sections, kicker="adaptive")


def coloured(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, COLOURS[number % len(COLOURS)]) for number, name in enumerate(names)]


@styled()
def curves(study: Study, width: float) -> Drawing:
    """Regret above, entropies below, over updates."""
    left, right, top, high, gap, low, bottom = 44.0, 14.0, 14.0, 150.0, 40.0, 90.0, 34.0
    figure = new_figure(width, top + high + gap + low + bottom)
    upper = panel(figure, left, top, width - left - right, high)
    lower = panel(figure, left, top + high + gap, width - left - right, low)
    x = [row["update"] for row in study.rows]
    draw_line(upper, [(row["update"], row["regret"]) for row in study.rows], "ink", 1.5, "regret", dots=False)
    upper.fill_between(x, [row["low"] for row in study.rows], [row["high"] for row in study.rows],
                       color=LIGHT["ink"], alpha=0.1, linewidth=0)  # fmt: skip
    for name, above in (("random", 3), ("best_fixed", 9)):
        upper.axhline(study.facts[name], color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)))
        upper.annotate(name.replace("_", " "), (1, study.facts[name]), (-2, above), xycoords=("axes fraction", "data"),
                       textcoords="offset points", ha="right", va="bottom", color=LIGHT["muted"],
                       fontsize=8.5)  # fmt: skip
    most = max(*(row["high"] for row in study.rows), study.facts["random"] * 1.1)
    upper.set_ylim(0, most or 1)
    upper.set_title("Regret, per question", loc="left")
    for name, colour in coloured(study.facts["names"]):
        points = [(row["update"], row[f"entropy_{name}"]) for row in study.rows]
        draw_line(lower, points, colour, 1.5, name, dots=False)
    share_axis(lower.yaxis, 3)
    lower.set_title("Entropy", loc="left")
    lower.set_xlabel("updates", loc="right")
    for axes in (upper, lower):
        axes.set_xlim(0, x[-1])
    return figure


ARM_COLUMNS = ["who chooses", "reward", "95 % interval", "more", "95 % interval", "above", "accuracy", "passes"]


def arm_rows(study: Study) -> list[list[str]]:
    return [
        [
            row["arm"], f"{row['reward']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
            *(["", "", ""] if row["arm"] == BEST_FIXED else _more(row, study.facts["seeds"])),
            percent(row["accuracy"]), f"{row['passes']:.1f}",
        ]
        for row in study.rows
    ]  # fmt: skip


def _more(row: dict[str, Any], seeds: int) -> list[str]:
    more, low, high = (typeset(f"{row[key]:+.3f}") for key in ("more", "more_low", "more_high"))
    return [more, f"{low} to {high}", f"{row['seeds_above']} of {seeds}"]


CHOICE_COLUMNS = ["steps", "takes", "share", "reward", "best fixed", "oracle", "accuracy", "passes", "passes, fixed"]


def choice_rows(study: Study) -> list[list[str]]:
    return [
        [
            str(row["steps"]), row["takes"], percent(row["share"]), f"{row['policy_reward']:.3f}",
            f"{row['best_fixed_reward']:.3f}", f"{row['oracle_reward']:.3f}", percent(row["policy_accuracy"]),
            f"{row['policy_passes']:.1f}", f"{row['best_fixed_passes']:.1f}",
        ]
        for row in study.rows
    ]  # fmt: skip


HEAD_COLUMNS = ["dimension", "values", "entropy", "distance", "differing"]


def head_rows(study: Study) -> list[list[str]]:
    return [
        [
            row["dimension"],
            str(row["values"]),
            percent(row["entropy"]),
            f"{row['distance']:.2f}",
            percent(row["differing"]),
        ]
        for row in study.rows
    ]
