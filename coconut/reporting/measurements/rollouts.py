"""Answers sampled after each number of thoughts: their chart, their sentences, their parts of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coconut.reporting.charts import NARROW, line_with_intervals, panel, share_axis
from coconut.reporting.page import Aside, Drawings, Part, Table, Text, figures
from coconut.reporting.phrases import between, counted, percent
from coconut.reporting.plots import LIGHT, new_figure, styled
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Place = tuple[bool, int]  # whether the chain is written without a slot, and the number of thoughts

MANY = 0.05  # a larger share of unreadable answers is named
# What is drawn, by panel: measure, colour, label.
PANELS = {
    "Variety (effective number)": (
        ("effective_next_steps", "blue", "next steps"), ("effective_answers", "green", "answers"),
        ("ahead", "muted", "possible next steps"),
    ),
    "Right answers": (
        ("pass_n", "blue", "any of {samples}"), ("maj_n", "green", "majority"), ("pass_1", "amber", "a single one"),
    ),
}  # fmt: skip
COUNTS = {"next_steps": "next steps", "effective_next_steps": "effective", "answers": "answers",
          "effective_answers": "effective", "ahead": "in the graph", "ahead_found": "of these sampled"}  # fmt: skip
SHARES = {"pass_1": "one sample right", "pass_n": "any right", "maj_n": "majority right", "with_steps": "with steps",
          "unreadable": "unreadable", "truncated": "truncated"}  # fmt: skip


def parts(study: Study, drawn: Drawings, noun: str) -> list[Part]:
    samples, by_place = study.facts["samples"], _by_place(study)
    caption = (
        f"{samples} answers to each question, sampled at temperature {study.facts['temperature']:g} after each number "
        f"of {noun}s. The effective number is exp of the entropy of the answers' shares: {samples} equally frequent "
        f"ones count as {samples}, and rare ones for less than 1. The next step is the first one that is written, or "
        f"else the answer. The band marks the trained number of {noun}s. The wide bars are 95 % confidence intervals "
        "over the questions."
    )
    tables = []
    for measures, show in ((COUNTS, _number), (SHARES, _share)):
        shown = {key: name for key, name in measures.items() if any(key in rows for rows in by_place.values())}
        cells = [
            [_tick(place), *(show(rows[key]) if key in rows else DASH for key in shown)]
            for place, rows in by_place.items()
        ]
        tables.append(Table([f"{noun}s", *shown.values()], cells, len(shown)))
    alt = "Variety and accuracy of sampled answers, as in the tables below."
    texts = [Text(text) for text in (" ".join(describe(study, noun)), study.facts["warning"]) if text]
    return [*texts, *figures(drawn, "rollouts", alt, caption), Aside("The numbers", tables)]


def describe(study: Study, noun: str = "thought") -> list[str]:
    """Say in sentences how the variety of the sampled answers changes with the thoughts, and against the chain's."""
    facts, by_place = study.facts, _by_place(study)
    K, samples = facts["trained_thoughts"], facts["samples"]
    first, last = by_place[False, 0], by_place[False, K]
    asked = f"{samples} answers to each of {first['answers']['questions']} questions were sampled"
    if not K:
        return [
            f"{asked}. To one question there are {_both(first, 'next_steps')} different next steps and "
            f"{_both(first, 'answers')} different answers, by the effective number; "
            f"{percent(first['with_steps']['value'])} of the answers write steps.",
            f"On average {_right(samples, first)}", *_of_the_graph(by_place, noun), *_unreadable(by_place, noun),
        ]  # fmt: skip
    trained = [f"The model was trained with fewer than {counted(K, noun)}, too."] * facts["trained_with_fewer"]
    return [
        f"{asked} after 0 to {counted(K, noun)}. From 0 to {K}, {_changed(first, last, 'next_steps', 'next steps')}; "
        f"{_changed(first, last, 'answers', 'answers')}.",
        f"{percent(first['with_steps']['value'])} of the answers write steps {_after(0, noun)} and "
        f"{percent(last['with_steps']['value'])} {_after(K, noun)}; in the others the answer is the next step.",
        _against_the_chain(study, noun),
        f"{_after(0, noun).capitalize()} and {_after(K, noun)} {_right(samples, first, last)}",
        *_of_the_graph(by_place, noun), *_unreadable(by_place, noun), *trained,
        "Variety alone is no search: a model that guesses is varied, too.",
    ]  # fmt: skip


def _changed(first: dict[str, Row], last: dict[str, Row], key: str, name: str) -> str:
    row = last[f"effective_{key}"]
    how = _direction(row, "change", "clearly rises", "clearly falls", "does not clearly change")
    return (
        f"the effective number of different {name} {how}, from {first[f'effective_{key}']['value']:.2f} to "
        f"{row['value']:.2f} ({_signed(row, 'change')}; {first[key]['value']:.2f} and {last[key]['value']:.2f} are "
        "counted)"
    )


def _against_the_chain(study: Study, noun: str) -> str:
    written, K, by_place = study.facts["written_chain"], study.facts["trained_thoughts"], _by_place(study)
    if written is None:
        return f"Too few answers {_after(0, noun)} write steps for a comparison with a written chain."
    row, chain = (by_place[place]["effective_answers"] for place in ((False, K), (written == "without slot", 0)))
    how = _direction(row, "to_chain", "clearly more", "clearly less", "not clearly more or less")
    own = "of the chain that the same weights write without a slot"
    return (
        f"Answers sampled {_after(K, noun)} are {how} varied than those "
        f"{own if written == 'without slot' else f'{_after(0, noun)}, where the chain is written'}: an effective "
        f"number of {row['value']:.2f} against {chain['value']:.2f} ({_signed(row, 'to_chain')})."
    )


def _of_the_graph(by_place: dict[Place, dict[str, Row]], noun: str) -> list[str]:
    found = [(place, rows["ahead"], rows["ahead_found"]) for place, rows in by_place.items() if "ahead" in rows]
    if not found:
        return []
    shown = "; ".join(
        f"{ahead['value']:.2f} {'in the written chain' if is_chain else _after(count, noun)}, of which "
        f"{sampled['value']:.2f} are sampled" for (is_chain, count), ahead, sampled in found[:1] + found[1:][-1:]
    )  # fmt: skip
    return [f"Next steps that the graph allows: {shown}."]


def _unreadable(by_place: dict[Place, dict[str, Row]], noun: str) -> list[str]:
    shares = [
        f"{percent(rows['unreadable']['value'])} {'in the written chain' if is_chain else _after(count, noun)}"
        for (is_chain, count), rows in by_place.items() if rows["unreadable"]["value"] > MANY
    ]  # fmt: skip
    return [f"Many answers cannot be read and count as no answer: {listed(shares)}."] if shares else []


def _direction(row: Row, key: str, more: str, less: str, neither: str) -> str:
    return more if row[f"{key}_low"] > 0 else less if row[f"{key}_high"] < 0 else neither


def _right(samples: int, *moments: dict[str, Row]) -> str:
    one, majority, some = (" and ".join(percent(rows[key]["value"]) for rows in moments)
                           for key in ("pass_1", "maj_n", "pass_n"))  # fmt: skip
    return f"a single sample is right in {one}, the majority in {majority}, at least one of {samples} in {some}."


def _by_place(study: Study) -> dict[Place, dict[str, Row]]:
    """The rows by place and measure, in the order of the study: the written chain first."""
    by_place: dict[Place, dict[str, Row]] = {}
    for row in study.rows:
        by_place.setdefault((row["chain"], row["thoughts"]), {})[row["measure"]] = row
    return by_place


def _both(rows: dict[str, Row], key: str) -> str:
    return f"{rows[f'effective_{key}']['value']:.2f} ({rows[key]['value']:.2f} counted)"


def _after(count: int, noun: str) -> str:
    return f"after {counted(count, noun)}" if count else f"without {noun}s"


def _tick(place: Place) -> str:
    return "chain" if place[0] else str(place[1])


def _number(row: Row) -> str:
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _share(row: Row) -> str:
    return f"{percent(row['value'])} ({between(row['low'], row['high'])})"


def _signed(row: Row, key: str) -> str:
    value, low, high = (f"{row[f'{key}{end}']:+.2f}".replace("-", "−") for end in ("", "_low", "_high"))
    return f"{value}, {low} to {high}"


@styled()
def chart(study: Study, width: float, noun: str = "thought") -> Figure:
    """Variety and accuracy for each number of thoughts, and to the left of them for the written chain.

    A band marks the trained number.
    """
    places = list(_by_place(study))
    left, right, top, bottom, above, gap = 40, 14, 46, 36, 150, 44
    narrow = width < NARROW
    wide = width - left - right if narrow else (width - left - right - gap) / 2
    pitch = top + above + bottom
    figure = new_figure(width, pitch * (1 + narrow))
    for number, (title, lines) in enumerate(PANELS.items()):
        x, y = (0, number * pitch) if narrow else (number * (wide + gap), 0)
        axes = panel(figure, left + x, top + y, wide, above)
        shown = [line for line in lines if any(row["measure"] == line[0] for row in study.rows)]
        for beside, (measure, colour, label) in enumerate(shown):
            rows = [row | {"place": places.index((row["chain"], row["thoughts"])) + 0.14 * (beside - 1)}
                    for row in study.rows if row["measure"] == measure]  # fmt: skip
            label = label.format(samples=study.facts["samples"])
            for part in ([row for row in rows if not row["chain"]], [row for row in rows if row["chain"]]):
                if part:
                    line_with_intervals(axes, part, "value", colour, label, over="place")
                    label = ""
        trained = places.index((False, study.facts["trained_thoughts"]))
        axes.axvspan(trained - 0.5, trained + 0.5, color=LIGHT["band"], linewidth=0, zorder=0)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xticks(range(len(places)), [_tick(place) for place in places])
        axes.xaxis.set_tick_params(length=0)
        if number:
            share_axis(axes.yaxis, 5)
        else:
            drawn = [row["low"] for row in study.rows if row["measure"] in {measure for measure, *_ in shown}]
            axes.set_ylim(min(1.0, *drawn), None)
        axes.set_title(title, loc="left", pad=24)
        axes.legend(ncols=len(shown), loc="lower left", bbox_to_anchor=(0, 1.02), handlelength=1.2, columnspacing=1.2,
                    handletextpad=0.4, borderaxespad=0)  # fmt: skip
        axes.set_xlabel(f"{noun}s before the words", loc="right")
    return figure
