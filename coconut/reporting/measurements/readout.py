"""What probes read out of the slot: the chart of their accuracy by place, the sentences, the parts of the page."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from coconut.analysis.verdict import CONTROLS, readable
from coconut.reporting.charts import NARROW, line_with_intervals, panel, share_axis
from coconut.reporting.page import Aside, Drawings, Part, Table, Text, figures
from coconut.reporting.phrases import between, counted, percent
from coconut.reporting.plots import CENTRED, DASHED, LIGHT, new_figure, styled, whole_ticks
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_STEPS = 4  # that sentences describe
MAX_PANELS = 6  # of the chart, one for each step
MOSTLY = 0.5  # a step is read only in part if its accuracy is not surely above this
Row = dict[str, Any]


def parts(study: Study, drawn: Drawings, noun: str) -> list[Part]:
    facts = study.facts
    caption = (
        f"How well linear probes name the tokens of each written step, from the hidden state at each {noun}; 0 is the "
        "token before the slot. Each place has the layer that is best on held-out fitting questions. The wide bars are "
        "95 % confidence intervals. "
    )
    if any(row["pauses"] is not None for row in study.rows):
        caption += "“Pauses”: probes fitted after pauses in place of thoughts. "
    caption += (
        f"“Another question”: the same probes on another question's {noun}s. “Shuffled”: probes fitted to the steps of "
        "other questions. The dashed line is the most frequent token."
    )
    columns = ["step", noun, "layer", "accuracy", "95 % interval", "majority", "another question", "shuffled", "pauses",
               "nats", "95 % interval", "of at most"]  # fmt: skip
    rows = [
        [str(row["step"]), str(row["place"]), str(row["layer"]), percent(row["accuracy"]),
         between(row["low"], row["high"]), *(_share(row[name]) for name in (*CONTROLS, "pauses")),
         f"{row['information']:.2f}", f"{row['information_low']:.2f} to {row['information_high']:.2f}",
         f"{row['entropy']:.2f}"] for row in study.rows
    ]  # fmt: skip
    where = "training questions" if facts["fitted_from"] == "training" else "of the test questions"
    text = (
        f"The probes were fitted on {facts['fitted_on']:,} {where} and measured on {facts['measured']:,} others. "
        f"A step that can be read is there; whether the answer depends on it, the interventions show."
    )
    figure = figures(drawn, "readout", "Accuracy of probes for each step and place, as in the table below.", caption)
    by_layer = (
        "How many points of accuracy a probe gains over one that was fitted to the steps of other questions "
        f"(selectivity), for each layer and {noun}. Layer 0 is the embeddings; {noun} 0 is the token before the slot. "
        "A cell is empty unless the two confidence intervals lie apart."
    )
    table = Aside("The numbers", [Table(columns, rows, 12)])
    return [
        Text(" ".join(describe(study, noun))),
        *figure,
        Text(text),
        *figures(
            drawn, "readout_layers", f"Selectivity of probes by layer and {noun}, a panel for each step.", by_layer
        ),
        table,
    ]


def _share(share: float | None) -> str:
    return DASH if share is None else percent(share)


def describe(study: Study, noun: str) -> list[str]:
    """Say in sentences from where on each step can be read, and whether the slot adds to it."""
    steps = list(dict.fromkeys(row["step"] for row in study.rows))
    sentences = []
    for step in steps[:MAX_STEPS]:
        sentences += _describe_step([row for row in study.rows if row["step"] == step], noun)
    if further := steps[MAX_STEPS:]:
        sentences.append(f"The table below has step{'s' * (len(further) > 1)} {listed(map(str, further))}, too.")
    return sentences


def _describe_step(rows: list[Row], noun: str) -> list[str]:
    before, best = rows[0], next(row for row in rows if row["best"])
    step, here = f"Step {before['step']}", [row["place"] for row in rows[1:] if readable(best) and readable(row)]
    names = f"a probe on {noun} {best['place']} names {percent(best['accuracy'])} of its tokens"
    controls = f"{percent(best['other'])} with another question's {noun}s"
    if not here:
        however = f"; from the token before the slot it can ({percent(before['accuracy'])})" if readable(before) else ""
        return [
            f"{step} cannot be read from any {noun}: {names}, {_frequent(best)} {percent(best['majority'])}{however}."
        ]
    until_end = here == list(range(here[0], rows[-1]["place"] + 1))
    if until_end and here[0] == 1 and readable(before):
        whence = f"from the token before the slot and from every {noun}"
    elif until_end and len(here) > 1:
        whence = f"from {noun} {here[0]} on"
    else:
        whence = f"from {noun}{'s' * (len(here) > 1)} {listed(map(str, here))}"
    in_part = "" if best["low"] > MOSTLY else " in part"
    compared: dict[str, list[str]] = {}
    for name, what in (("before", "the token before the slot"), ("pauses", "a pause in its place")):
        if best[name] is not None:
            compared.setdefault(_better(best, name), []).append(f"than {what} ({percent(best[name])})")
    return [
        f"{step} can be read{in_part} {whence}: {names}, {_frequent(best)} {percent(best['majority'])} and {controls}.",
        f"That is {' and '.join(f'{how} {listed(what)}' for how, what in compared.items())}.",
    ]


def _frequent(row: Row) -> str:
    return "against the most frequent token's" if row["tokens"] == 1 else "against the most frequent tokens'"


def _better(row: Row, than: str) -> str:
    if row[f"over_{than}_low"] > 0:
        return "clearly better"
    return "clearly worse" if row[f"over_{than}_high"] < 0 else "not clearly better"


@styled()
def chart(study: Study, width: float, noun: str = "thought") -> Figure:
    """Accuracy of the probes by place, a panel for each step, with the controls."""
    steps = list(dict.fromkeys(row["step"] for row in study.rows))[:MAX_PANELS]
    has_pauses = any(row["pauses"] is not None for row in study.rows)
    lines = {"other": ("plum", "another question"), "shuffled": ("muted", "shuffled")}
    if has_pauses:
        lines = {"pauses": ("amber", "pauses"), **lines}
    narrow = width < NARROW
    columns = 2 if narrow else min(3, max(2, len(steps)))
    legend, left, right, top, above, bottom, gap = (34 if narrow else 20), 40, 14, 24, 110, 40, 40
    pitch, wide = top + above + bottom, (width - left - right - gap * (columns - 1)) / columns
    figure = new_figure(width, legend + pitch * -(-len(steps) // columns))
    for number, step in enumerate(steps):
        line, column = divmod(number, columns)
        axes = panel(figure, left + column * (wide + gap), legend + line * pitch + top, wide, above)
        rows = [row for row in study.rows if row["step"] == step]
        axes.axhline(rows[0]["majority"], **DASHED, label="most frequent token")
        for name, (colour, label) in lines.items():
            found = [row for row in rows if row[name] is not None]
            axes.plot([row["place"] for row in found], [row[name] for row in found], color=LIGHT[colour],
                      linewidth=1.2, marker="o", markersize=3, label=label, clip_on=False)  # fmt: skip
        line_with_intervals(axes, rows, "accuracy", "blue", f"{noun}s", over="place")
        axes.set_xlim(-0.3, rows[-1]["place"] + 0.3)
        axes.xaxis.set_major_locator(whole_ticks(4 if narrow else 8))
        share_axis(axes.yaxis, 5)
        tokens = f", {counted(rows[0]['tokens'], 'token')}" if rows[0]["tokens"] > 1 else ""
        axes.set_title(f"Step {step}{tokens}", loc="left")
        axes.set_xlabel(f"{noun}, 0: before them", loc="right")
        if number == 0:
            handles, names = axes.get_legend_handles_labels()
            order = [len(names) - 1, *range(len(names) - 1)]
            figure.legend([handles[i] for i in order], [names[i] for i in order], ncols=3 if narrow else len(names),
                          loc="upper left", bbox_to_anchor=(axes.get_position().x0, 1), handlelength=1.2,
                          columnspacing=1.2, handletextpad=0.4, borderaxespad=0.6)  # fmt: skip
    return figure


@styled()
def layers_chart(study: Study, width: float, noun: str = "thought") -> Figure:
    """Selectivity of the probes, layer by place, a panel for each step: accuracy minus that of `shuffled`, in points.

    `study`: `readout_layers`. A cell is empty unless the intervals of the two lie apart.
    """
    own = f"{noun}s"
    steps = list(dict.fromkeys(row["step"] for row in study.rows))[:MAX_PANELS]
    by_cell = {(row["of"], row["step"], row["place"], row["layer"]): row for row in study.rows}
    places, layers = (1 + max(row[name] for row in study.rows) for name in ("place", "layer"))
    columns = min(len(steps), max(1, int(width // (60 + 34 * places))))
    left, right, top, bottom, gap, high = 40, 14, 24, 44, 40, min(20, 280 / layers)
    pitch, wide = top + high * layers + bottom, (width - left - right - gap * (columns - 1)) / columns
    wide = min(wide, 64 * places)
    numbered = wide / places >= 22 and high >= 14
    from matplotlib.patches import Rectangle

    figure = new_figure(width, pitch * -(-len(steps) // columns))
    for number, step in enumerate(steps):
        line, column = divmod(number, columns)
        axes = panel(figure, left + column * (wide + gap), line * pitch + top, wide, high * layers)
        axes.grid(visible=False)
        for place, layer in product(range(places), range(layers)):
            probe, control = by_cell[own, step, place, layer], by_cell["shuffled", step, place, layer]
            gain = probe["accuracy"] - control["accuracy"]
            if probe["low"] <= control["high"]:
                continue
            axes.add_patch(Rectangle((place - 0.5, layer - 0.5), 1, 1, color=LIGHT["blue"], alpha=0.6 * gain, lw=0))
            if numbered:
                axes.text(place, layer, f"{100 * gain:.0f}", fontsize="small", **CENTRED)
        axes.set(xlim=(-0.5, places - 0.5), ylim=(-0.5, layers - 0.5))
        axes.set_xlabel(f"{noun}, 0: before them", loc="right")
        axes.xaxis.set_major_locator(whole_ticks(8))
        axes.yaxis.set_major_locator(whole_ticks(min(layers, 6)))
        axes.set_title(f"Step {step}", loc="left")
        if not column:
            axes.set_ylabel("layer")
    return figure
