"""Shortcuts: the chart of accuracy on changed questions, the sentences, the parts of the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coconut.analysis.verdict import CLEAR_FALL, mostly_changed, reliance
from coconut.reporting.charts import Dots, dot_chart
from coconut.reporting.page import Aside, Drawings, Facts, Lead, Part, Table, Text, figures
from coconut.reporting.phrases import between, counted, percent, signed, whole_percent
from coconut.reporting.plots import styled
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
ELSEWHERE = "Out of distribution"  # how sentences on other questions than those trained on begin
# What a model relies on if its accuracy falls in this row. Those of rules are named by their label.
RELIES = {
    "option_order": "the order of the options",
    "edge_order": "the order in which the facts are told",
    "new_names": "the names of the nodes",
    "equal_depth": "the depth of the options",
    "hint_wrong": "the hint",
}


def parts(study: Study, drawn: Drawings) -> list[Part]:
    caption = (
        "Accuracy on the test questions as they are (the blue line), changed so that the truth stays, on those of them "
        "where a shallow rule is right or wrong, and on questions unlike those trained on. Right: the share of answers "
        "that change with the question although the truth does not. The wide bars are 95 % confidence intervals."
    )
    figure = figures(drawn, "shortcuts", "Accuracy on each set of questions, as in the table below.", caption)
    columns = ["the questions", "number", "accuracy", "chance", "difference", "answers changed"]
    tables: list[Part] = [Table(columns, [_cells(row) for row in study.rows], 5)]
    if left_out := study.facts["left_out"]:
        tables += [Text("Not asked, with the reason:"), Facts(list(left_out.items()))]
    first, *rest = describe(study)
    elsewhere = [sentence for sentence in rest if sentence.startswith(ELSEWHERE)]
    texts = [" ".join(sentence for sentence in rest if sentence not in elsewhere), " ".join(elsewhere)]
    return [
        Lead([first]),
        *(Text(text) for text in texts if text),
        *figure,
        Aside("The numbers, and what was not asked", tables),
    ]


def describe(study: Study) -> list[str]:
    """Say in sentences which shortcuts the model was seen to use, which not, and how it does out of distribution."""
    rows, found = {row["change"]: row for row in study.rows}, reliance(study)
    used, unused, unclear = found.used, found.unused, found.unclear
    sentences = []
    own, chance = rows["none"], rows["none"]["chance_accuracy"]
    if used:
        sentences.append(f"The model relies on {listed(map(_relied_on, used))}.")
        sentences += [_evidence(row, rows) for row in used]
    elif unused:
        sentences.append("No use of a shortcut was seen.")
    else:
        sentences.append("It is not clear whether a shortcut is used.")
    if chance is not None and own["low"] <= chance:
        sentences.append(
            f"Its accuracy, {percent(own['accuracy'])}, is not clearly above chance ({percent(chance)}), so that there "
            "is little to lose, and a change of the answers says more."
        )
    elif unused:
        sentences.append(
            f"Less than {100 * CLEAR_FALL:.0f} points of its accuracy, if any, hang on each of these: "
            f"{listed(map(_relied_on, unused))}."
        )
    if unclear:
        sentences.append(f"Too few questions to tell: {listed(map(_relied_on, unclear))}.")
    for row in (*unused, *unclear):
        if (row["changed_low"] or 0) > CLEAR_FALL and row["kind"] == "edit":
            sentences.append(
                f"With {row['label']} {percent(row['changed'])} of the answers change, though about as many are right."
            )
    return [*sentences, *_hint_sentences(study), *_out_of_distribution(rows)]


def _relied_on(row: Row) -> str:
    return RELIES.get(row["change"]) or row["label"].removesuffix(" is wrong")


def _evidence(row: Row, rows: dict[str, Row]) -> str:
    what = f"with {row['label']}"
    if row["kind"] == "rule":
        which = "with" if row["against"] == "rest" else "where"
        what = f"on the {counted(row['questions'], 'question')} {which} {row['label']}"
    than = f", against {percent(rows[row['against']]['accuracy'])}" if row["against"] in rows else ""
    if row["kind"] == "rule" and than:
        than += f" where it is right ({counted(rows[row['against']]['questions'], 'question')})"
    changed = f"; {percent(row['changed'])} of the answers change" if mostly_changed(row) else ""
    return f"{what[0].upper()}{what[1:]} {percent(row['accuracy'])} are right{than}: {_points(row)}{changed}."


def _hint_sentences(study: Study) -> list[str]:
    if "followed_wrong_hint" not in study.facts:
        return []
    followed, low, high = (study.facts[f"followed_wrong_hint{end}"] for end in ("", "_low", "_high"))
    return [
        f"{whole_percent(study.facts['hinted'])} of the training questions have a hint; a wrong one is followed by "
        f"{percent(followed)} of the answers ({between(low, high)}), and {percent(study.facts['named_without_hint'])} "
        "name the same wrong answer without it."
    ]


def _out_of_distribution(rows: dict[str, Row]) -> list[str]:
    sentences = []
    for row in rows.values():
        if row["kind"] == "distribution":
            sentences.append(
                f"{ELSEWHERE}, on {row['label']}, {percent(row['accuracy'])} are right, {_points(row)}"
                f"{_like_chance(row)}."
            )
    return sentences


def _like_chance(row: Row) -> str:
    chance = row["chance_accuracy"]
    return f"; this is not clearly above chance ({percent(chance)})" if chance and row["low"] <= chance else ""


def _points(row: Row) -> str:
    value, low, high = (signed(100 * row[f"difference{end}"], 1) for end in ("", "_low", "_high"))
    return f"{value} points ({low} to {high})"


def _cells(row: Row) -> list[str]:
    chance = DASH if row["chance_accuracy"] is None else percent(row["chance_accuracy"])
    changed = DASH
    if row["changed"] is not None:
        changed = f"{percent(row['changed'])} ({between(row['changed_low'], row['changed_high'])})"
    return [
        row["label"], f"{row['questions']:,}", f"{percent(row['accuracy'])} ({between(row['low'], row['high'])})",
        chance, DASH if row["difference"] is None else _points(row).replace(" points", ""), changed,
    ]  # fmt: skip


@styled()
def chart(study: Study, width: float) -> Figure:
    """Accuracy on each set of questions, and the share of answers that change although the truth stays."""
    rows = study.rows
    accuracy = [(row["accuracy"], row["low"], row["high"]) for row in rows]
    changed = [None if row["changed"] is None else (row["changed"], row["changed_low"], row["changed_high"])
               for row in rows]  # fmt: skip
    panels = [
        Dots("Accuracy", "blue", accuracy, rows[0]["accuracy"], rows[0]["chance_accuracy"]),
        Dots("Answers changed", "red", changed),
    ]
    return dot_chart([row["label"] for row in rows], panels, width)
