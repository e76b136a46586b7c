"""The verdict at the head of a run's page, and the comparison of several runs by their measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coconut.analysis.comparable_runs import expand_patterns
from coconut.analysis.config import MethodsConfig
from coconut.analysis.verdict import FINDINGS, Verdict, verdict
from coconut.methods import Reasoning
from coconut.reporting.page import Aside, Lead, Section, Table, Text, page
from coconut.reporting.phrases import between, percent, typeset
from coconut.reporting.run_table import aligned, common_folder, output_folder
from coconut.runs.record import DASH, RunRecord, read_run
from coconut.runs.study import Study
from coconut.utils.console import log
from coconut.utils.files import write_text

SPEAKS = {True: "for", False: "against", None: DASH}
RULE = (
    "Each measurement is evidence for thoughts that do work, against it, or neither, by a rule that docs/analysis.md "
    "states, with 95 % intervals."
)


def verdict_of(run: RunRecord) -> Verdict:
    """The verdict on a run's studies."""
    return verdict(run.studies, _before_answers(run.reasoning), above_chance=_above_chance(run))


def _above_chance(run: RunRecord) -> bool | None:
    """Whether the accuracy is clearly above chance, None if it is not known.

    It is that of the test; where a model was made to think otherwise than it decides, or on some questions alone, that
    of the interventions on its thoughts.
    """
    low, chance = None, run.chance_accuracy
    if run.decided_note:
        if audit := run.studies.get("audit_thoughts"):
            low, chance = audit.rows[0]["low"], audit.facts["chance_accuracy"]
    elif run.test:
        low = run.evaluations[run.test]["interval"][0]
    return None if low is None or chance is None else low > chance


def _before_answers(reasoning: Reasoning) -> str:
    if reasoning.modes:
        return "modes"
    if not reasoning.slot.is_empty:
        return f"{reasoning.slot.source.value}s"
    return "steps" if reasoning.steps_cut == 0 and reasoning.tokens_cut == 0 else "nothing"


def what_it_means(run: RunRecord) -> Section | None:
    """The verdict and the findings that it rests on; None without studies."""
    found = verdict_of(run)
    if not found.findings:
        return None
    rows = [[each.name, typeset(each.value), SPEAKS[each.speaks]] for each in found.findings]
    table = Table(["measurement", "what was found", "evidence"], rows)
    note = [Text(run.decided_note)] if run.decided_note else []
    return Section(
        "verdict", "What it means", [Lead([found.headline]), *note, table, Aside("How this was judged", [Text(RULE)])]
    )


def compare_methods(config: MethodsConfig) -> int:
    """Write a table of runs by measurements: methods.html, .csv and .json. Gives the exit status.

    Raises ValueError for a run that was not analyzed, or on other questions than the first.
    """
    folders = expand_patterns(config.runs)
    runs = [read_run(folder) for folder in folders]
    _refuse_incomparable(runs)
    study = comparison(runs)
    folder = output_folder(config, common_folder(folders))
    study.write(folder)
    write_text(folder / "methods.html", comparison_page(study, folder))
    log("\n".join(aligned([["run", "method", "accuracy"], *([*row[:3]] for row in _cells(study))])))
    for row in study.rows:
        log(f"{row['run']}: {row['headline']}")
    log(f"Table: {folder / 'methods.html'}, and the same as .csv and .json")
    return 0


def _refuse_incomparable(runs: Sequence[RunRecord]) -> None:
    for run in runs:
        if not run.studies:
            raise ValueError(f"{run.folder} was not analyzed. Run coconut analyze run={run.folder}")
        mine, first = (next(iter(each.studies.values())).facts for each in (run, runs[0]))
        if (mine["sha256"], mine["questions"]) != (first["sha256"], first["questions"]):
            raise ValueError(
                f"{run.folder} and {runs[0].folder} were analyzed on different questions: {mine['questions']} of "
                f"{mine['file']} and {first['questions']} of {first['file']}. Analyze both with the same "
                "data.test=FILE and limit."
            )


def comparison(runs: Sequence[RunRecord]) -> Study:
    """A row for each run: `kind` and `headline` of its verdict; the value of each finding, and what it is evidence for.

    `note`: if the accuracy is of another checkpoint or of other questions than the measurements, or if a model that
    decides by itself how it thinks was made to do something.

    facts: `questions` and `file` of the studies.
    """
    rows = []
    for run in runs:
        found = verdict_of(run)
        by_name = {each.name: each for each in found.findings}
        test = run.evaluations[run.test] if run.test else {}
        row = {
            "run": run.folder.resolve().name, "method": run.method, "seed": run.config["seed"],
            "accuracy": test.get("accuracy"), "low": test["interval"][0] if test else None,
            "high": test["interval"][1] if test else None, "kind": found.kind, "headline": found.headline,
            "note": " ".join(filter(None, [run.study_note, run.decided_note])),
        }  # fmt: skip
        for name in FINDINGS:
            each = by_name.get(name)
            row |= {name: each and each.value, f"{name}, speaks": each and SPEAKS[each.speaks]}
        rows.append(row)
    facts = next(iter(runs[0].studies.values())).facts
    return Study("methods", rows, {"questions": facts["questions"], "file": Path(facts["file"]).name})


def _cells(study: Study) -> list[list[str]]:
    """Run, method, accuracy, and a cell for each finding that any run has."""
    return [
        [row["run"], row["method"],
         DASH if row["accuracy"] is None else f"{percent(row['accuracy'])} ({between(row['low'], row['high'])})",
         *(_cell(row[name], row[f"{name}, speaks"]) for name in _shown(study))] for row in study.rows
    ]  # fmt: skip


def _cell(value: str | None, speaks: str | None) -> str:
    if value is None:
        return DASH
    return typeset(value if speaks == DASH else f"{speaks}: {value}")


def _shown(study: Study) -> list[str]:
    return [name for name in FINDINGS if any(row[name] is not None for row in study.rows)]


def comparison_page(study: Study, folder: Path) -> str:
    """The HTML of the comparison."""
    shown = _shown(study)
    by_run = [[row["run"], row["headline"]] for row in study.rows]
    cells = _cells(study)
    measured = [[name, *(row[3 + number] for row in cells)] for number, name in enumerate(shown)]
    head = ["accuracy", *(row[2] for row in cells)]
    tables = Table(["measurement", *(row["run"] for row in study.rows)], [head, *measured])
    notes = [Text(f"{row['run']}: {row['note']}") for row in study.rows if row["note"]]
    sections = [
        Section("verdicts", "What the thoughts of each do", [Table(["run", "verdict"], by_run), Text(RULE)]),
        Section("measurements", "The measurements", [tables, *notes]),
    ]
    questions = f"{study.facts['questions']:,} questions of {study.facts['file']}"
    methods = ", ".join(dict.fromkeys(row["method"] for row in study.rows))
    return page(
        "methods", f"{len(study.rows)} runs by what their thoughts do", f"{methods}. {questions}.", folder, sections,
        kicker="comparison of methods", made_by="coconut analyze compare-methods",
    )  # fmt: skip
