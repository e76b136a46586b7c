"""Write the table that compares runs over a suite: on the screen, as a page, as Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coconut.analysis.config import TableConfig
from coconut.analysis.suite_comparison import SuiteComparison, compare_suite
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.evaluation.intervals import RESAMPLES
from coconut.reporting.page import Heading, Lead, Part, Section, Table, Text, page
from coconut.reporting.phrases import between, counted, percent
from coconut.reporting.run_table import (
    PAIR_COLUMNS,
    SCREEN,
    aligned,
    common_folder,
    markdown_table,
    output_folder,
    pair_cells,
    provenance,
    wrapped,
)
from coconut.runs.study import Study
from coconut.utils.console import log
from coconut.utils.files import write_text

NOTE = (
    "Accuracy: mean over seeds, in percent, with its 95 % interval over questions and seeds "
    f"({RESAMPLES:,} bootstrap resamples). Tests: exact two-sided sign-flip test over the same questions (McNemar's "
    "test with one seed); p corrected over all sets and pairs (Holm)."
)


def run(config: TableConfig) -> int:
    """Compare runs over a suite and write the table in all forms. Gives the exit status."""
    compared = compare_suite(config)
    of_runs = common_folder([run.folder for run in compared.first.runs])
    folder, name = output_folder(config, of_runs), f"table-{compared.suite}"
    study(compared).write(folder)
    write_text(folder / f"{name}.md", markdown(compared))
    write_text(folder / f"{name}.html", html(compared, of_runs))
    log(on_screen(compared))
    for warning in compared.warnings:
        log(wrapped(f"warning: {warning}"))
    log(f"Table: {folder / name}.html, and the same as .md, .csv and .json")
    return 0


def columns(compared: SuiteComparison) -> list[str]:
    """The heads of the table: method, seeds, and the sets."""
    return ["method", "seeds", *compared.sets]


def cells(compared: SuiteComparison) -> list[list[str]]:
    """The texts of the table: a row for each method, with accuracy and interval on each set."""
    return [
        [row["method"], row["seeds"], *(_accuracy(each.rows[number]) for each in compared.sets.values())]
        for number, row in enumerate(compared.first.rows)
    ]


def _accuracy(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ({between(row['low'], row['high'])})"


def pair_rows(compared: SuiteComparison) -> list[list[str]]:
    """The texts of all pairs, set by set."""
    return [[name, *pair_cells(pair)] for name, pair in compared.pairs]


def set_rows(compared: SuiteComparison) -> list[list[str]]:
    """The texts of the sets: questions, and the costs of each method."""
    return [
        [name, row["method"], f"{row['questions']:,}", f"{row['new_tokens']:.1f}", f"{row['passes']:.1f}",
         percent(row["truncated"]), f"{1000 * row['seconds_per_item']:.2f}"]
        for name, each in compared.sets.items()
        for row in each.rows
    ]  # fmt: skip


SET_COLUMNS = ["set", "method", "questions", "new tokens", "passes", "truncated", "ms a question"]


def on_screen(compared: SuiteComparison) -> str:
    """The table for a terminal, with all pairs. Where there is no room for the intervals, they are left out."""
    rows = cells(compared)
    if sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) > SCREEN:
        rows = [[cell.split(" (")[0] for cell in row] for row in rows]
    lines = [f"Accuracy on the sets of {compared.suite}", ""]
    lines += [*aligned([columns(compared), *rows]), "", wrapped(NOTE)]
    if compared.pairs:
        lines += ["", *aligned([["set", *PAIR_COLUMNS], *pair_rows(compared)])]
    return "\n".join(lines)


def markdown(compared: SuiteComparison) -> str:
    """The table as Markdown, with the pairs and the questions of each set."""
    parts = [
        _markdown_table(columns(compared), cells(compared)),
        NOTE,
        "\n".join(f"- {text}" for text in questions(compared)),
    ]
    if compared.pairs:
        parts.append(_markdown_table(["set", *PAIR_COLUMNS], pair_rows(compared)))
    parts += [
        f"`{compared.command}`",
        *(["\n".join(f"- {text}" for text in compared.warnings)] if compared.warnings else []),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table([head, ["---"] * len(head), *rows]))


def questions(compared: SuiteComparison) -> list[str]:
    """A phrase for each set: its questions, how many were seen, its judge, and the digest of its file."""
    found = []
    for name, each in compared.sets.items():
        evaluation, seen = each.evaluation, most_seen([run.evaluation for run in each.runs])
        what = describe_questions(evaluation["count"], seen, Path(evaluation["file"]).name)
        found.append(f"{name}: {what}, judged by {evaluation['judge']} (SHA-256 {evaluation['sha256'][:12]})")
    return found


def study(compared: SuiteComparison) -> Study:
    """The numbers of the table: a row for each set and method, and all pairs."""
    rows = [{"set": name, **row} for name, each in compared.sets.items() for row in each.rows]
    facts = {
        "suite": compared.suite, "command": compared.command, "resamples": RESAMPLES, "warnings": compared.warnings,
        "pairs": [
            {"set": name, **asdict(pair), "told_apart": pair.distinguishable} for name, pair in compared.pairs
        ],
        "sets": [
            {"set": name, **{key: each.evaluation[key] for key in ("count", "file", "sha256", "judge")}}
            for name, each in compared.sets.items()
        ],
        "runs": [str(run.folder) for run in compared.first.runs],
    }  # fmt: skip
    return Study(f"table-{compared.suite}", rows, facts)


def html(compared: SuiteComparison, folder: Path) -> str:
    """The table as an HTML page that loads no other file. `folder`: the folder of the runs."""
    head, rows = columns(compared), cells(compared)
    parts: list[Part] = [Lead(compared.warnings)] if compared.warnings else []
    parts += [Table(head, rows, len(head) - 1), Text(NOTE)]
    costs: list[Part] = [Heading("Cost of an answer"), Table(SET_COLUMNS, set_rows(compared), 5)]
    pairs: list[Part] = [Text("There is no pair of methods with a seed in common. Nothing is compared.")]
    if compared.pairs:
        note = (
            "Differences of accuracy in percentage points, on the same questions and seeds. Two methods can be "
            "distinguished on a set if the corrected p is at most 0.05 and the interval excludes 0."
        )
        pairs = [Table(["set", *PAIR_COLUMNS], pair_rows(compared), 4), Text(note)]
    asked = [Text(f"{text}.") for text in questions(compared)]
    sections = [
        Section("table", None, parts),
        Section("pairs", "Pairs", pairs),
        Section("sets", "The sets", [*asked, *costs]),
        provenance(compared.first, compared.sets),
    ]
    methods, of = counted(len(compared.first.groups), "method"), counted(len(compared.first.runs), "run")
    return page(methods, of, f"on {counted(len(compared.sets), 'set')} of {compared.suite}", folder, sections,
                kicker="table of runs")  # fmt: skip
