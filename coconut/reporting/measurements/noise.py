"""Accuracy under noise: its chart, its sentences, its parts of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coconut.analysis.verdict import clearly_fallen, noise_rows
from coconut.reporting.charts import line_with_intervals, panel, share_axis
from coconut.reporting.page import Aside, Drawings, Part, Table, Text, figures
from coconut.reporting.phrases import between, percent
from coconut.reporting.plots import chance_line, new_figure, styled
from coconut.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Where noise is added: colour, label.
WHERE = {
    "thoughts": ("blue", "on the thoughts"),
    "pauses": ("blue", "on the pauses"),
    "words": ("amber", "on as many words"),
}


def parts(study: Study, drawn: Drawings) -> list[Part]:
    caption = (
        "Gaussian noise is added to every thought (or pause) before it is fed, and in a second run to as many words of "
        "each question. A size of 1 is as large as thoughts differ between questions, or as words differ from each "
        "other. The wide bars are 95 % confidence intervals."
    )
    rows = [
        [WHERE[row["where"]][1], f"{row['sigma']:g}", percent(row["accuracy"]),
         between(row["low"], row["high"])] for row in study.rows
    ]  # fmt: skip
    table = Table(["noise", "size", "accuracy", "95 % interval"], rows, 3)
    figure = figures(drawn, "noise", "Accuracy for each size of noise, as in the table below.", caption)
    return [Text(" ".join(describe(study))), *figure, Aside("The numbers", [table])]


def describe(study: Study) -> list[str]:
    """Say in sentences from which size of noise on the accuracy clearly falls."""
    sentences = []
    for where in dict.fromkeys(row["where"] for row in study.rows):
        rows = noise_rows(study, where)
        clean, last, fallen = rows[0], rows[-1], clearly_fallen(rows)
        on = WHERE[where][1]
        if fallen:
            sentences.append(
                f"With noise {on} the accuracy falls clearly from size {fallen[0]['sigma']:g} on, from "
                f"{percent(clean['accuracy'])} to {percent(fallen[0]['accuracy'])}, and to {percent(last['accuracy'])} "
                f"at size {last['sigma']:g}."
            )
        else:
            sentences.append(
                f"With noise {on} no clear fall is seen up to size {last['sigma']:g}: {percent(last['accuracy'])} "
                f"instead of {percent(clean['accuracy'])}."
            )
    own = study.rows[0]["where"]
    sentences.append(
        f"An answer that ignores the {own} bears any noise on them. A fall may come from inputs that the model has "
        "never seen, too; the words show how much of that is usual for this model."
    )
    return sentences


@styled()
def chart(study: Study, width: float, chance_accuracy: float | None = None) -> Figure:
    """Accuracy for each size of the noise, in equal steps: one line for the slot, one for words of the question."""
    sizes = sorted({row["sigma"] for row in study.rows})
    left, right, top, bottom, above = 40, 14, 56, 36, 150
    figure = new_figure(width, top + above + bottom)
    axes = panel(figure, left, top, width - left - right, above)
    for where, (colour, label) in WHERE.items():
        rows = [row | {"place": sizes.index(row["sigma"])} for row in study.rows if row["where"] == where]
        if rows:
            line_with_intervals(axes, rows, "accuracy", colour, label, over="place")
    axes.set_xlim(-0.4, len(sizes) - 0.6)
    axes.set_xticks(range(len(sizes)), [f"{sigma:g}" for sigma in sizes])
    share_axis(axes.yaxis, 5)
    chance_line(axes, chance_accuracy)
    axes.set_xlabel("noise, in multiples of the dispersion", loc="right")
    axes.set_title("Accuracy under noise", loc="left", pad=32)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.07), handlelength=1.2, borderaxespad=0)
    return figure
