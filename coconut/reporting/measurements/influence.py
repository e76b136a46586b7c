"""How changes of a thought reach later thoughts and the answer: the charts, the sentences, the parts of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coconut.analysis.verdict import describe_arcs, effects, effects_between, later_of, roles
from coconut.reporting.charts import NARROW, panel, share_axis
from coconut.reporting.page import Aside, Drawings, Part, Table, Text, figures
from coconut.reporting.phrases import between, percent
from coconut.reporting.plots import CENTRED, LIGHT, new_figure, styled
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOUNS = {"thoughts": "thought", "pauses": "pause", "steps": "written step"}
LABELS = {
    "other": "of another question", "step_mean": "its mean over questions", "mean": "the mean of all", "zeros": "zeros",
    "noise": "noise of the same norm", "cache": "keys and values of another question", "only": "all others their means",
    "none": "all their means",
}  # fmt: skip
# Changes whose right answers are drawn: change, control, colour, label.
DRAWN = (
    ("other", False, "blue", "of another question"),
    ("other", True, "muted", "as large, in a random direction"),
    ("only", False, "green", "kept alone"),
)
Row = dict[str, Any]


def parts(study: Study, drawn: Drawings) -> list[Part]:
    found: list[Part] = []
    for of, noun in NOUNS.items():
        if of not in study.facts["units"]:
            continue
        caption = (
            f"Each {noun} is replaced by that of another question. Above: an arc is the wider, the more the prediction "
            "at its end changes (divergence in nats, relative to the widest of its kind; those to the answer are "
            "green). Below: how many answers are then right; the lines are as trained. Grey: the same change turned in "
            f"a random direction. Green: only this {noun} is kept and all others are replaced by their means. The wide "
            "bars are 95 % confidence intervals."
        )
        alt = f"The effect of each {noun} on later ones and on the answer; the numbers are in the table below."
        found += [Text(" ".join(describe(study, of))), *figures(drawn, f"influence_{of}", alt, caption)]
        rows = [
            [str(row["unit"] or DASH), LABELS[row["change"]], "turned" if row["control"] else DASH, row["later"],
             f"{row['kl']:.2f} ({row['kl_low']:.2f} to {row['kl_high']:.2f})", f"{row['log_prob']:+.2f}",
             f"{percent(row['right'])} ({between(row['right_low'], row['right_high'])})"]
            for row in study.rows if row["of"] == of and row["on"] is None
        ]  # fmt: skip
        columns = [noun, "replaced by", "control", "later ones", "divergence", "log-probability", "right"]
        found.append(Aside(f"The effects on the answer, by {noun}", [Table(columns, rows, 4)]))
    return found


def describe(study: Study, of: str) -> list[str]:
    """Say which units the answer needs, which suffice, and through what they act."""
    noun, trained, later, found = NOUNS[of], study.facts["right"][of], later_of(study, of), roles(study, of)
    other = effects(study, of, "other", later=later)
    after = f", and {noun}s after it computed from that" if later == "recomputed" else ""
    first = (
        f"In {percent(trained)} of the questions every word of the right answer is the model's first choice, given "
        f"those before it: the answer is right. With one {noun} of another question in place{after}"
    )
    if found.missed:
        shares = listed(f"{percent(other[unit]['right'])} (number {unit})" for unit in found.missed)
        sentences = [f"{first}, fewer are right: {shares}."]
        if found.necessary == found.missed:
            sentences.append("A change of the same size in a random direction has clearly less effect.")
        elif found.necessary:
            numbers = listed(map(str, found.necessary))
            sentences.append(f"Only for {numbers} is the effect clearly larger than in a random direction.")
        else:
            sentences.append("For none of them is the effect clearly larger than in a random direction.")
        if found.through_later:
            kept = effects(study, of, "other")
            shares = listed(f"{percent(kept[unit]['right'])} (number {unit})" for unit in found.through_later)
            sentences.append(f"With later {noun}s kept as they were, more are right: {shares}.")
    else:
        sentences = [f"{first}, no fall was seen for any of them."]
    if found.arcs:
        sentences.append(
            f"Between {noun}s these effects are clearly larger than in a random direction: {describe_arcs(found)}."
        )
    elif found.count > 1:
        sentences.append(f"No {noun} clearly acts on a later one more than a random change of the same size.")
    none, only = effects(study, of, "none")[0], effects(study, of, "only")
    helps = "no single one alone clearly helps"
    if found.sufficient:
        alone = listed(f"number {unit} ({percent(only[unit]['right'])})" for unit in found.sufficient)
        helps = f"keeping one alone clearly helps for {alone}"
    sentences.append(f"With all of them at their means {percent(none['right'])} are right; {helps}.")
    if cache := effects(study, of, "cache", later=later):
        worst = min(cache.values(), key=lambda row: row["right"])
        sentences.append(
            f"With the keys and values of one {noun} exchanged between questions, and its own state passed on, at "
            f"least {percent(worst['right'])} are right (lowest for number {worst['unit']})."
        )
    elif reason := study.facts["left_out"].get(f"cache of {of}"):
        sentences.append(f"Keys and values were not exchanged. {reason}")
    return sentences


@styled()
def chart(study: Study, width: float, of: str) -> Figure:
    """Arcs from each unit to later ones and to the answer, and below each unit how many answers are right."""
    later, noun = later_of(study, of), NOUNS[of]
    units = sorted({row["unit"] for row in study.rows if row["of"] == of} - {0})
    left, right, top, arcs_high, dots_high, bottom = 40, 14, 26, 90, 110, 30
    lines = 3 if width < NARROW else 1
    gap = 34 + 14 * lines
    figure = new_figure(width, top + arcs_high + gap + dots_high + bottom)
    place = {unit: i for i, unit in enumerate(units)} | {None: len(units)}
    above = panel(figure, left, top, width - left - right, arcs_high)
    above.grid(visible=False)
    arcs = [row for (_, on), row in effects_between(study, of, "other", later=later).items() if on in place]
    _draw_arcs(above, arcs, place, "blue")
    _draw_arcs(above, list(effects(study, of, "other", later=later).values()), place, "green")
    for unit, x in place.items():
        name = "answer" if unit is None else str(unit)
        above.text(x, -0.12, name, color=LIGHT["ink"], **CENTRED)
        above.plot([x], [0], "o", color=LIGHT["ink" if unit is None else "blue"], markersize=5, clip_on=False)
    above.set_ylim(-0.3, 0.9)
    above.set_yticks([])
    above.set_xticks([])
    above.spines["bottom"].set_visible(False)
    above.set_title(f"What a {noun} acts on", loc="left", pad=8)
    below = panel(figure, left, top + arcs_high + gap, width - left - right, dots_high)
    for number, (change, control, colour, label) in enumerate(DRAWN):
        rows = effects(study, of, change, control=control, later="kept" if change == "only" else later)
        x = [place[unit] + 0.16 * (number - 1) for unit in rows]
        shares = [[row[f"right{end}"] for row in rows.values()] for end in ("", "_low", "_high")]
        below.vlines(x, shares[1], shares[2], color=LIGHT[colour], alpha=0.45, linewidth=4.5, clip_on=False)
        below.plot(x, shares[0], "o", color=LIGHT[colour], markersize=4, label=label, clip_on=False)
    for unit, row in effects(study, of, "other", later=later).items():
        middle, trained = place[unit], row["right"] - row["difference"]
        below.hlines(trained, middle - 0.35, middle + 0.35, color=LIGHT["blue"], linewidth=1, zorder=0)
    share_axis(below.yaxis, 5)
    below.set_xticks(range(len(units)), list(map(str, units)))
    below.set_title("Right answers", loc="left", pad=14 + 14 * lines)
    for axes in (above, below):
        axes.set_xlim(-0.5, len(units) + 0.5)
    corner = left / width, (bottom + dots_high + 10) / (figure.get_size_inches()[1] * 72)
    figure.legend(*below.get_legend_handles_labels(), ncols=len(DRAWN) // lines, loc="lower left", handlelength=1,
                  bbox_to_anchor=corner, borderaxespad=0, columnspacing=1.4, handletextpad=0.4)  # fmt: skip
    return figure


def _draw_arcs(axes: Axes, rows: list[Row], place: dict[int | None, int], colour: str) -> None:
    """Half ellipses, as wide as the divergence relative to the largest; none for one below a hundredth of it."""
    from matplotlib.patches import Arc

    most = max((row["kl"] for row in rows), default=0.0)
    for row in rows:
        start, end = place[row["unit"]], place[row["on"]]
        if row["kl"] > most / 100:
            middle, wide, high = ((start + end) / 2, 0), end - start, 1.8 * (end - start) / len(place)
            thick = 0.5 + 4 * row["kl"] / most
            axes.add_patch(Arc(middle, wide, high, theta2=180, color=LIGHT[colour], linewidth=thick, alpha=0.75))
