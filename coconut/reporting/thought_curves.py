"""Gradients and drift along the thoughts over training: their chart, their sentences, their parts of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from coconut.methods import Stage
from coconut.reporting.charts import SHADES
from coconut.reporting.page import Aside, Heading, Part, Table, Text, figure_of
from coconut.reporting.phrases import percent
from coconut.reporting.plots import Band, decades, draw_line, panels_over_updates, styled
from coconut.runs.record import DASH, RunRecord, rows_of_stage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENT, DRIFT = "thought_gradient", "thought_drift"  # of a validation's row, each a list over the thoughts
AT_REST = 0.1  # of the distance between two questions' thoughts: a smaller movement is called rest
STILL = 0.01  # of the norm: so is this
MAX_DOTS = 30  # on a line within a stage
Row = dict[str, Any]


def parts(run: RunRecord, bands: Sequence[Band]) -> list[Part]:
    """Chart, sentences and numbers; nothing for a run without thoughts."""
    stages = [rows for stage in run.stages if (rows := rows_of_stage(run.valid, stage))]
    drawn = [key for key in (GRADIENT, DRIFT) if any(_values(row, key) for rows in stages for row in rows)]
    if not drawn:
        return []
    slot = run.stages[-1].form.slot
    fed = "as the last iteration has made them" if slot.in_parallel else "as they are fed"
    of_key = {
        GRADIENT: f"Gradient: the norm of that of the loss with respect to the thoughts {fed}, the mean over some "
        "validation questions. The loss is that of the written tokens alone.",
        DRIFT: "Drift: how far the thoughts of the same questions have moved since the validation before, as a share "
        "of their norm. A stage begins anew: the places of the thoughts mean other things in it.",
    }
    most = f"At most {len(SHADES)} thoughts are drawn, the first and the last among them."
    caption = " ".join([*(of_key[key] for key in drawn), most])
    rows = [_numbers(run, rows[-1]) for rows in stages if _values(rows[-1], GRADIENT) or _values(rows[-1], DRIFT)]
    columns = ["stage", "update", "gradient at the first thought", "at the last", "ratio", "95 % interval", "drift"]
    alt = "Gradient norms and drift of each thought over updates; the numbers are in the table below."
    return [
        Heading("Gradients and drift along the thoughts"),
        Text(" ".join(describe(run.best, rows_of_stage(run.valid, run.stages[-1]), run.stages[-1]))),
        figure_of(partial(chart, stages, bands), "thought_curves", alt, caption),
        Aside("The numbers at the end of each stage", [Table(columns, rows, 6)]),
    ]


def describe(best: Row | None, rows: Sequence[Row], stage: Stage) -> list[str]:
    """Say whether gradients shrink along the thoughts at the best checkpoint, and whether thoughts still move.

    `rows`: the validations of the last stage.
    """
    sentences = []
    if best and (ratio := best.get(f"{GRADIENT}_ratio")) is not None:
        low, high = (best[f"{GRADIENT}_ratio_{end}"] for end in ("low", "high"))
        if stage.form.slot.in_parallel:
            shrinks, grows = "the first thoughts matter less than the last", "the first thoughts matter more"
            unclear = "whether the first thoughts matter less than the last is not clear"
            note = " Thoughts that are updated all at once do not pass it on to each other; what flows back through " \
                   "earlier iterations is not in it."  # fmt: skip
        else:
            shrinks, grows = "it shrinks on its way back along the thoughts", "it grows on its way back"
            unclear, note = "whether it shrinks on its way back along the thoughts is not clear", ""
        verdict = shrinks if high < 1 else grows if low > 1 else unclear
        sentences.append(
            f"At the best checkpoint the gradient of the loss is {ratio:.2g} times as large at the first thought as at "
            f"the last (95 % interval {low:.2g} to {high:.2g}): {verdict}.{note}"
        )
    if len(rows) > 1 and (moved := _values(rows[-1], DRIFT)):
        before, last = rows[-2], rows[-1]
        drift, across = sum(moved) / len(moved), last.get("thought_across")
        apart = across / last["thought_norm"] if across else 0.0
        compared = f", {drift / apart:.2g} times as far as the thoughts of two questions are apart" if apart else ""
        rest = drift < max(AT_REST * apart, STILL)
        sentences.append(
            f"Between the last two validations, updates {before['step']:,} and {last['step']:,}, the thoughts moved by "
            f"{percent(drift)} of their norm{compared}: {'they have come to rest' if rest else 'they still move'}."
        )
    elif rows and rows[-1].get("thought_norm"):
        sentences.append("Whether the thoughts still move is not known: no two validations of the last stage tell it.")
    return sentences


@styled()
def chart(stages: Sequence[Sequence[Row]], bands: Sequence[Band], width: float) -> Figure:
    """Gradient norms and below them drift, a line for each thought, over updates. `stages`: the rows of each."""
    keys = [key for key in (GRADIENT, DRIFT) if any(_values(row, key) for rows in stages for row in rows)]
    count = max(len(row.get(key) or ()) for rows in stages for row in rows for key in keys)
    lines = min(count, len(SHADES))
    shown = [line * (count - 1) // max(lines - 1, 1) for line in range(lines)]
    figure, panels = panels_over_updates(width, 98 + 120 * len(keys), bands, [1] * len(keys), below=44)
    for axes, key in zip(panels, keys, strict=True):
        for line, k in enumerate(shown):
            colour = SHADES[line * (len(SHADES) - 1) // max(lines - 1, 1)]
            for rows in stages:
                points = [(row["step"], row[key][k]) for row in rows if _has(row, key, k)]
                draw_line(axes, points, colour, 1.4, f"thought {k + 1}" if not line else str(k + 1),
                          dots=len(points) <= MAX_DOTS)  # fmt: skip
        if key == GRADIENT:
            decades(axes)
        else:
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        pad = 32 if axes is panels[0] else 6
        title = {GRADIENT: "Gradient at each thought", DRIFT: "Drift since the validation before"}[key]
        axes.set_title(title, loc="left", pad=pad)
    labels = {label: handle for handle, label in zip(*panels[0].get_legend_handles_labels(), strict=True)}
    panels[-1].legend(labels.values(), labels.keys(), loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=2.6,
                      ncols=lines, handlelength=1.2, columnspacing=1.2, handletextpad=0.4)  # fmt: skip
    return figure


def _has(row: Row, key: str, k: int) -> bool:
    """Whether the row has a number that can be drawn for thought k."""
    values = row.get(key) or ()
    value = values[k] if k < len(values) else None
    return value is not None and math.isfinite(value) and (key == DRIFT or value > 0)


def _values(row: Row, key: str) -> list[float]:
    return [value for k, value in enumerate(row.get(key) or ()) if _has(row, key, k)]


def _numbers(run: RunRecord, row: Row) -> list[str]:
    gradients, moved, ratio = row.get(GRADIENT), _values(row, DRIFT), row.get(f"{GRADIENT}_ratio")
    return [
        str(row["stage"]),
        f"{row['step']:,}",
        *([f"{gradients[0]:.2e}", f"{gradients[-1]:.2e}"] if gradients else [DASH, DASH]),
        *([DASH, DASH] if ratio is None else
          [f"{ratio:.2g}", f"{row[f'{GRADIENT}_ratio_low']:.2g} to {row[f'{GRADIENT}_ratio_high']:.2g}"]),
        percent(sum(moved) / len(moved)) if moved else DASH,
    ]  # fmt: skip
