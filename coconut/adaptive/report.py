"""The report of configuration policies: sentences and tables for the terminal, and a page."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.adaptive.experiments import BEST_FIXED, ORACLE, POLICY
from coconut.reporting.charts import panel, share_axis
from coconut.reporting.page import Lead, Legend, Section, Table, Text, figure_of, page
from coconut.reporting.phrases import percent, typeset
from coconut.reporting.plots import LIGHT, draw_line, new_figure, styled
from coconut.reporting.run_table import aligned, wrapped
from coconut.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLOURS = ("blue", "green", "plum", "red", "peach", "sky")  # of dimensions, in their order
ARM_COLUMNS = ["who chooses", "reward", "95 % interval", "more", "95 % interval", "above", "accuracy", "passes"]
CHOICE_COLUMNS = ["steps", "takes", "share", "reward", "best fixed", "oracle", "accuracy", "passes", "passes, fixed"]
HEAD_COLUMNS = ["dimension", "values", "entropy", "distance", "differing"]
SMALL_HEADROOM = 0.01  # below this headroom there is hardly anything to gain by choosing
SMALL_DIFFERENCE = 0.02  # below this share of pairs of questions with different values, the policy hardly chooses
ABOUT = (
    "{questions:,} questions, {configurations} configurations. Each of {seeds} policies was trained on its own "
    "{num_train_questions} questions and tested on the others. Means over seeds, with Student's 95 % interval, which "
    "covers the draw of training questions from this set, not other sets of questions. The reward is the score of an "
    "answer minus {cost:g} for each forward pass. A policy tried {tried:,.0f} pairs of a question and a configuration; "
    "the best fixed configuration was found from all {known_to_best_fixed:,}, and is most often {best_fixed} (in "
    "{best_fixed_seeds} of {seeds} seeds)."
)
ARMS = (
    "Random takes every configuration equally often. The blind policy is trained in the same way on embeddings of "
    "zeros. NAME alone: one dimension is learned, the others are as in the best fixed configuration. The oracle takes "
    "the best configuration of each test question. More: the gain over the best fixed configuration of the same seed; "
    "above: the number of seeds with a gain."
)
CURVE = (
    "Regret to the best configuration of each question, and entropy divided by that of the uniform distribution, means "
    "over seeds. Dashed: the best fixed configuration and random choice on the same questions."
)
HEADS = (
    "Entropy divided by that of the uniform distribution, at the temperature of the last update. Distance: the mean "
    "total variation distance between the policy's distributions for two test questions, 0 if they are equal. "
    "Differing: the share of pairs of questions with different values."
)
CHOICES = (
    "Test questions by the number of steps in their written chain, over all seeds, with the policies' most frequent "
    "configuration."
)


def sentences(studies: dict[str, Study]) -> list[str]:
    """The results in sentences: headroom, gain of the policy, and what it owes to the question."""
    facts, rows = studies["arms"].facts, {row["arm"]: row for row in studies["arms"].rows}
    (low, high), policy, blind = facts["headroom_interval"], rows[POLICY], rows["blind policy"]
    lines = [
        f"The headroom is {facts['headroom']:+.3f} of reward ({low:+.3f} to {high:+.3f}): from the best fixed "
        f"configuration, {rows[BEST_FIXED]['reward']:.3f}, to the best for each question, "
        f"{rows[ORACLE]['reward']:.3f}."
    ]
    if facts["headroom"] < SMALL_HEADROOM:
        lines.append("That is close to zero: on these questions there is hardly anything to gain by choosing.")
    gain, gain_low, gain_high = policy["more"], policy["more_low"], policy["more_high"]
    verdict = "beats" if gain_low > 0 else "is worse than" if gain_high < 0 else "does not differ significantly from"
    lines.append(
        f"The policy {verdict} the best fixed configuration: {gain:+.3f} ({gain_low:+.3f} to {gain_high:+.3f}), "
        f"above it in {policy['seeds_above']} of {facts['seeds']} seeds."
    )
    if gain > 0:
        lines[-1] += f" That is {100 * gain / facts['headroom']:.0f} % of the headroom."
    lines.append(f"The reward of a policy that does not see the question is {blind['reward']:.3f}; that of the policy "
                 f"is {policy['reward']:.3f}.")  # fmt: skip
    if max(row["differing"] for row in studies["heads"].rows) < SMALL_DIFFERENCE:
        lines.append("The policy takes nearly the same configuration for all questions.")
    return lines


def on_screen(studies: dict[str, Study]) -> str:
    """Sentences and table as text for a terminal."""
    rows = [[cells[i] for i in (0, 1, 3, 6, 7)] for cells in (ARM_COLUMNS, *arm_rows(studies["arms"]))]
    return "\n".join([*map(wrapped, sentences(studies)), "", *aligned(rows)])


def adaptive_page(studies: dict[str, Study], name: str, folder: Path) -> str:
    """The HTML page of all studies."""
    arms, curve = studies["arms"], studies["curve"]
    entropies = [
        (colour, f"entropy, {name}") for name, colour in zip(curve.facts["names"], cycle(COLOURS), strict=False)
    ]
    sections = [
        Section("headline", None, [
            Lead(sentences(studies)),
            Table(ARM_COLUMNS, arm_rows(arms), len(ARM_COLUMNS) - 1),
            Text(ABOUT.format(**arms.facts)),
            Text(ARMS),
        ]),
        Section("learning", "How it learned", [
            Legend([("ink", "regret"), *entropies]),
            figure_of(lambda width: curves(curve, width), "curve", "Regret and entropy over updates.", CURVE),
        ]),
        Section("choices", "What it chooses", [
            Table(CHOICE_COLUMNS, choice_rows(studies["choices"]), 7),
            Text(CHOICES),
            Table(HEAD_COLUMNS, head_rows(studies["heads"]), 4),
            Text(HEADS),
        ]),
    ]  # fmt: skip
    what = "a policy that chooses a configuration for each question, beside fixed choices and the oracle"
    return page(name, "Adaptive", what, folder, sections, kicker="adaptive")


@styled()
def curves(study: Study, width: float) -> Drawing:
    """Draw regret above and entropies below, over updates."""
    left, right, top, upper_height, gap, lower_height, bottom = 44.0, 14.0, 14.0, 150.0, 40.0, 90.0, 34.0
    figure = new_figure(width, top + upper_height + gap + lower_height + bottom)
    upper = panel(figure, left, top, width - left - right, upper_height)
    lower = panel(figure, left, top + upper_height + gap, width - left - right, lower_height)
    x, low, high = ([row[key] for row in study.rows] for key in ("update", "low", "high"))
    draw_line(upper, [(row["update"], row["regret"]) for row in study.rows], "ink", 1.5, "regret", dots=False)
    upper.fill_between(x, low, high, color=LIGHT["ink"], alpha=0.1, linewidth=0)
    for name, offset in (("random", 3), ("best_fixed", 9)):
        upper.axhline(study.facts[name], color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)))
        upper.annotate(name.replace("_", " "), (1, study.facts[name]), (-2, offset), xycoords=("axes fraction", "data"),
                       textcoords="offset points", ha="right", va="bottom", color=LIGHT["muted"],
                       fontsize=8.5)  # fmt: skip
    upper.set_ylim(0, max(*high, study.facts["random"] * 1.1) or 1)
    upper.set_title("Regret, per question", loc="left")
    for name, colour in zip(study.facts["names"], cycle(COLOURS), strict=False):
        points = [(row["update"], row[f"entropy_{name}"]) for row in study.rows]
        draw_line(lower, points, colour, 1.5, name, dots=False)
    share_axis(lower.yaxis, 3)
    lower.set_title("Entropy", loc="left")
    lower.set_xlabel("updates", loc="right")
    for axes in (upper, lower):
        axes.set_xlim(0, x[-1])
    return figure


def arm_rows(study: Study) -> list[list[str]]:
    return [
        [row["arm"], f"{row['reward']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}",
         *(["", "", ""] if row["arm"] == BEST_FIXED else _more(row, study.facts["seeds"])),
         percent(row["accuracy"]), f"{row['passes']:.1f}"]
        for row in study.rows
    ]  # fmt: skip


def _more(row: dict[str, Any], seeds: int) -> list[str]:
    gain, low, high = (typeset(f"{row[key]:+.3f}") for key in ("more", "more_low", "more_high"))
    return [gain, f"{low} to {high}", f"{row['seeds_above']} of {seeds}"]


def choice_rows(study: Study) -> list[list[str]]:
    return [
        [str(row["steps"]), row["takes"], percent(row["share"]), f"{row['policy_reward']:.3f}",
         f"{row['best_fixed_reward']:.3f}", f"{row['oracle_reward']:.3f}", percent(row["policy_accuracy"]),
         f"{row['policy_passes']:.1f}", f"{row['best_fixed_passes']:.1f}"]
        for row in study.rows
    ]  # fmt: skip


def head_rows(study: Study) -> list[list[str]]:
    return [
        [row["dimension"], str(row["values"]), percent(row["entropy"]), f"{row['distance']:.2f}",
         percent(row["differing"])]
        for row in study.rows
    ]  # fmt: skip
