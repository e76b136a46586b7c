"""Write the table of a suite of evaluation sets: on the screen, as a page, as CSV and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coconut.data.seen_questions import describe_questions
from coconut.evaluation.file_evaluation import FileEvaluator
from coconut.evaluation.record import describe_settings
from coconut.evaluation.suite import FOLDER, stem_of
from coconut.reporting.page import Code, Facts, Lead, Part, Section, Table, Text, page
from coconut.reporting.phrases import between, counted, percent
from coconut.reporting.run_page import command, describe_revision, describe_versions
from coconut.reporting.run_table import aligned, wrapped
from coconut.runs.description import environment_info
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import listed, log
from coconut.utils.files import write_text

COLUMNS = ["set", "rows", "accuracy", "95 % interval", "new tokens", "thoughts", "passes", "truncated", "s at batch 1",
           "s batched", "seen", "left out"]  # fmt: skip
ON_SCREEN = ["set", "rows", "acc. %", "95 %", "tokens", "latent", "passes", "trunc.", "s at 1", "s", "seen", "left"]


def write_table(
    evaluator: FileEvaluator, records: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str],
    settings: Sequence[str],
) -> None:  # fmt: skip
    """Write FOLDER/suites/NAME.json, .csv and .html, and show the table.

    `records`: those of the evaluated sets. `missing`: why the others were not evaluated. `settings`: the parts of NAME
    that say which settings are not the default.
    """
    study = study_of(evaluator, records, missing, settings)
    folder = evaluator.folder / FOLDER
    study.write(folder)
    write_text(folder / f"{study.name}.html", html(study, folder))
    log(on_screen(study))
    log(f"Table: {folder / study.name}.html, and the same as .csv and .json")


def study_of(
    evaluator: FileEvaluator, records: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str],
    settings: Sequence[str],
) -> Study:  # fmt: skip
    """The numbers of the table: a row for each set, in the order of the suite. Those of a missing set are None."""
    config, lm = evaluator.config, evaluator.lm
    rows = [_row(name, records.get(name), missing.get(name, "")) for name in config.suite.sets]
    accuracies = [record["accuracy"] for record in records.values()]
    facts = {
        "suite": config.suite.name, "run": config.run, "checkpoint": config.checkpoint, "step": evaluator.step,
        "evaluated": describe_settings(lm.reasoning, config), "settings": list(settings),
        "batch_size": config.batch_size, "timed": config.suite.timed,
        "samples": config.samples if config.sampling else None,
        "macro_average": sum(accuracies) / len(accuracies) if records and not missing else None,
        "session": environment_info(),
    }  # fmt: skip
    return Study(stem_of(config.suite.name, list(settings)), rows, facts)


def _row(name: str, record: Mapping[str, Any] | None, missing: str) -> dict[str, Any]:
    record = record or {}
    low, high = record.get("interval", (None, None))
    seen = record.get("seen") or {}
    return {
        "set": name, "missing": missing, "rows": record.get("count"), "correct": record.get("correct"),
        "accuracy": record.get("accuracy"), "low": low, "high": high,
        "chance_accuracy": record.get("chance_accuracy"), "new_tokens": record.get("mean_new_tokens"),
        "thoughts": record.get("num_thoughts"), "passes": record.get("passes"), "truncated": record.get("truncated"),
        "seconds_at_batch_1": record.get("seconds_at_batch_1"), "timed": record.get("timed"),
        "seconds_per_item": record.get("seconds_per_item"), "seen_train": seen.get("train"),
        "seen_valid": seen.get("valid"), "left_out": record.get("left_out"), "judge": record.get("judge"),
        "max_new_tokens": record.get("max_new_tokens"), "file": record.get("file"), "sha256": record.get("sha256"),
    }  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row, in the order of COLUMNS."""
    if row["missing"]:
        return [row["set"], DASH, "missing", *[DASH] * (len(COLUMNS) - 3)]
    return [
        row["set"],
        f"{row['rows']:,}",
        percent(row["accuracy"]),
        between(row["low"], row["high"]),
        f"{row['new_tokens']:.1f}",
        f"{row['thoughts']:.3g}",
        f"{row['passes']:.1f}",
        percent(row["truncated"]),
        DASH if row["seconds_at_batch_1"] is None else f"{row['seconds_at_batch_1']:.3g}",
        f"{row['seconds_per_item']:.3g}",
        DASH if row["seen_train"] is None else f"{row['seen_train'] + row['seen_valid']:,}",
        f"{row['left_out']:,}",
    ]


def notes(study: Study) -> list[str]:
    """What the columns mean, and the macro average."""
    facts = study.facts
    sampled, timed = facts["samples"], facts["timed"]
    measured = (
        f"pass@1 of {counted(sampled, 'sampled answer')} to each question, with a bootstrap interval over questions"
        if sampled
        else "greedy decoding, with Wilson's 95 % interval"
    )
    alone = f"one by one, over the first {counted(timed, 'question')} of a set; and " if timed else ""
    explained = [
        f"Accuracy: {measured}. New tokens, thoughts and passes: means of an answer. Truncated: answers that ended at "
        f"the limit of new tokens. Seen: questions in the run's training or validation data; {DASH} if that is not "
        "known. Left out: rows that are too long, or whose gold answer would be judged wrong.",
        f"Seconds a question{', with all its answers' if sampled else ''}: {alone}in batches of "
        f"{facts['batch_size']:,}, over all. Only times of the same machine are comparable.",
    ]
    if facts["macro_average"] is not None and len(study.rows) > 1:
        explained.insert(0, f"Macro average over the {len(study.rows)} sets, each with the same weight: "
                            f"{percent(facts['macro_average'])}. It is no share of questions.")  # fmt: skip
    return explained


def warnings(study: Study) -> list[str]:
    """The missing sets with the reasons, and the sets of which questions were seen."""
    found = [f"{row['set']} is missing: {row['missing']}" for row in study.rows if row["missing"]]
    for row in study.rows:
        seen = {split: row[f"seen_{split}"] for split in ("train", "valid")}
        if any(seen.values()):
            found.append(f"{row['set']}: {describe_questions(row['rows'], seen)}.")
    return found


def on_screen(study: Study) -> str:
    """The table for a terminal."""
    rows = ([cell.removesuffix(" %") for cell in cells(row)] for row in study.rows)
    table = aligned([ON_SCREEN, *rows])
    said = [f"warning: {warning}" for warning in warnings(study)]
    return "\n".join(["", *table, "", *map(wrapped, notes(study)), *said])


def html(study: Study, folder: Path) -> str:
    """The table as an HTML page that loads no other file."""
    facts, session = study.facts, study.facts["session"]
    parts: list[Part] = [Lead(found)] if (found := warnings(study)) else []
    parts += [Table(COLUMNS, [cells(row) for row in study.rows], len(COLUMNS) - 1), Text(" ".join(notes(study)))]
    asked = [
        [row["set"], Path(row["file"]).name, row["judge"], f"{row['max_new_tokens']:,}", row["sha256"][:12]]
        for row in study.rows
        if not row["missing"]
    ]
    machine = session["machine"]
    rows = [
        ("model", facts["run"]),
        ("checkpoint", DASH if facts["step"] is None else f"{facts['checkpoint']}, update {facts['step']:,}"),
        ("evaluated", facts["evaluated"]),
        ("settings", listed(facts["settings"]) if facts["settings"] else "the default"),
        ("machine", f"{machine['gpu'] or 'CPU'}, {counted(machine['cpus'], 'core')}, {machine['system']}"),
        ("versions", describe_versions(session)),
        ("code", describe_revision(session)),
    ]
    provenance: list[Part] = [
        Table(["set", "file", "judge", "limit of new tokens", "SHA-256 begins"], asked, 2), Facts(rows),
        Text("The command:"), Code(command(session["command"])),
    ]  # fmt: skip
    sections = [Section("table", None, parts), Section("provenance", "What exactly was evaluated", provenance)]
    count = f"{len(study.rows) - len([row for row in study.rows if row['missing']])} of {len(study.rows)} sets"
    return page(facts["suite"], facts["run"], f"{count}, {facts['evaluated']}", folder, sections, kicker="suite",
                made_by="coconut evaluate")  # fmt: skip
