"""Write the table that compares runs: on the screen, as a page, as Markdown, CSV and JSON."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.analysis.comparable_runs import ComparableRun
from coconut.analysis.config import MethodsConfig, TableConfig
from coconut.analysis.run_comparison import (
    Comparison,
    Group,
    Pair,
    compare,
    describe_interval,
    describe_p,
    describe_seeds,
    differing,
    points,
    ranked,
    same_in_all,
)
from coconut.evaluation.intervals import RESAMPLES
from coconut.methods import get_method
from coconut.reporting.page import Aside, Code, Facts, Lead, Score, Section, Table, Text, figure_of, page
from coconut.reporting.phrases import between, counted, percent
from coconut.reporting.plots import DASHED, LIGHT, new_figure, styled
from coconut.reporting.run_page import command, data_table, describe_revision, describe_versions
from coconut.runs.record import DASH
from coconut.runs.study import Study
from coconut.utils.console import log
from coconut.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SCREEN = 100  # columns of the terminal
FEW_PAIRS = 6  # with more pairs the page shows a matrix first, and the screen none
COLUMNS = ["method", "seeds", "accuracy", "95 % interval", "sd", "new tokens", "passes", "ms a question", "updates"]


# The table in text.


def cells(row: dict[str, Any]) -> list[str]:
    """The texts of a row, in the order of COLUMNS."""
    return [
        row["method"],
        row["seeds"],
        percent(row["accuracy"]),
        between(row["low"], row["high"]),
        DASH if row["sd"] is None else f"{100 * row['sd']:.1f}",
        f"{row['new_tokens']:.1f}",
        f"{row['passes']:.1f}",
        f"{1000 * row['seconds_per_item']:.2f}",
        f"{row['updates']:,.0f}",
    ]


def on_screen(compared: Comparison) -> str:
    """The table for a terminal of SCREEN columns, with the pairs if there are at most FEW_PAIRS."""
    columns = [*COLUMNS[:7], "ms", "updates"]
    lines = [f"Accuracy on {compared.questions}", ""]
    lines += aligned([columns, *map(cells, compared.rows)])
    lines += ["", wrapped(" ".join(_notes(compared)[:2]))]
    if 0 < len(compared.pairs) <= FEW_PAIRS:
        lines += ["", *aligned([PAIR_COLUMNS, *map(pair_cells, compared.pairs)])]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Wrap a text to SCREEN columns."""
    return textwrap.fill(text, SCREEN, break_long_words=False, break_on_hyphens=False)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column left and the others right. A first cell that is too long gets a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = min(widths[0], SCREEN - sum(width + 2 for width in widths[1:]))
    lines = []
    for name, *rest in rows:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        lines += [f"{name:<{first}}{numbers}"] if len(name) <= first else [name, " " * first + numbers]
    return lines


PAIR_COLUMNS = ["pair", "difference", "95 % interval", "p", "p (Holm)"]


def pair_cells(pair: Pair) -> list[str]:
    p, corrected = (describe_p(value).removeprefix("p ") for value in (pair.p, pair.p_holm))
    return [f"{pair.a} to {pair.b}", points(pair.difference), describe_interval(pair), p, corrected]


def _notes(compared: Comparison) -> list[str]:
    """The explanations of the columns."""
    size = same_in_all([row["batch_size"] for row in compared.rows])
    at = f"in batches of {size}" if size else "in the batches of each evaluation"
    chance_accuracy = compared.evaluation["chance_accuracy"]
    notes = [
        ("" if chance_accuracy is None else f"Chance accuracy: {percent(chance_accuracy)}. ")
        + "Accuracy: mean over seeds; sd: over seeds; interval: over questions and seeds.",
        f"New tokens: text tokens and thoughts. Passes: forward passes for an answer. ms: for a question, {at}.",
        f"Intervals: 95 % bootstrap confidence intervals, {RESAMPLES:,} resamples of seeds and questions. Tests: exact "
        "two-sided sign-flip test over questions (McNemar's test with one seed); p corrected over all pairs (Holm).",
    ]
    if any(run.updates_before for run in compared.runs):
        notes.append("Updates: including those of the runs from which the weights were initialized.")
    return notes


def markdown(compared: Comparison) -> str:
    """The table as Markdown, with questions, seeds, machines and dates."""
    evaluation = compared.evaluation
    lines = markdown_table([COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(cells, compared.rows)])
    sessions = [session for run in compared.runs for session in run.record.description["sessions"]]
    dates = sorted({datetime.fromisoformat(session["started"]).date().isoformat() for session in sessions})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    seeds = sorted({run.seed for run in compared.runs})
    measured = (
        f"{evaluation['count']:,} questions of {Path(evaluation['file']).name} (SHA-256 {evaluation['sha256'][:12]}), "
        f"asked once of each run's best checkpoint; seed{'s' * (len(seeds) > 1)} {describe_seeds(seeds)}; "
        f"{'; '.join(_machines(compared.runs))}; {when}."
    )
    lines += ["", measured, *_notes(compared), "", f"`{compared.command}`"]
    if compared.warnings:
        lines += ["", *(f"- {warning}" for warning in compared.warnings)]
    return "\n".join(lines) + "\n"


def markdown_table(rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table. The second row says how columns are aligned."""
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _machines(runs: Sequence[ComparableRun]) -> list[str]:
    """Describe the machines of the runs' last sessions, each once."""
    machines = (run.record.description["sessions"][-1]["machine"] for run in runs)
    return list(dict.fromkeys(
        f"{m['gpu'] or 'CPU'}, {counted(m['cpus'], 'core')}, {counted(m['threads'], 'thread')}, {m['system']}"
        for m in machines
    ))  # fmt: skip


def study(compared: Comparison) -> Study:
    """The numbers of the table as a study."""
    evaluation = compared.evaluation
    facts = {
        "questions": evaluation["count"], "file": evaluation["file"], "sha256": evaluation["sha256"],
        "chance_accuracy": evaluation["chance_accuracy"], "command": compared.command, "resamples": RESAMPLES,
        "pairs": [{**asdict(pair), "told_apart": pair.distinguishable} for pair in compared.pairs],
        "warnings": compared.warnings,
        "runs": [_run_facts(group, run) for group in compared.groups for run in group.runs],
    }  # fmt: skip
    return Study("table", compared.rows, facts)


def _run_facts(group: Group, run: ComparableRun) -> dict[str, Any]:
    description = run.record.description
    return {
        "group": group.label, "run": str(run.folder), "seed": run.seed, "checkpoint": run.evaluation["step"],
        "accuracy": run.evaluation["accuracy"], "correct": run.evaluation["correct"],
        "updates": run.record.updates_done, "updates_before": run.updates_before, "init": description["init"],
        "data": description["data"], "sessions": description["sessions"],
    }  # fmt: skip


# The page.


def html(compared: Comparison, folder: Path, more: Sequence[Section] = ()) -> str:
    """The table as an HTML page that loads no other file, with `more` sections. `folder`: the folder of the runs."""
    sections = [headline(compared), table(compared), differences(compared), *more, provenance(compared)]
    title, subject = counted(len(compared.groups), "method"), counted(len(compared.runs), "run")
    return page(title, subject, f"on {compared.questions}", folder, sections, kicker="table of runs")


def headline(compared: Comparison) -> Section:
    """The highest accuracy, and the warnings."""
    best = compared.best
    what = best["method"] + (f", the highest of {len(compared.groups)}" if len(compared.groups) > 1 else "")
    score = Score(best["accuracy"], what, (best["low"], best["high"]), compared.evaluation["chance_accuracy"])
    return Section("headline", None, [score, Lead(compared.warnings)] if compared.warnings else [score])


def table(compared: Comparison) -> Section:
    """The accuracies as a figure and a table."""
    alt = "; ".join(f"{row['method']} {percent(row['accuracy'])}" for row in compared.rows)
    caption = "The dot is the mean over seeds, the bar its 95 % confidence interval, and each ring a seed."
    if compared.evaluation["chance_accuracy"] is not None:
        caption += " The dashed line is the chance accuracy."
    figure = figure_of(partial(accuracies, compared), "accuracies", f"Accuracies with their intervals: {alt}.", caption)
    shown = Table(COLUMNS, [cells(row) for row in compared.rows], len(COLUMNS) - 1)
    return Section("table", "The table", [figure, shown, Text(" ".join(_notes(compared)))])


def differences(compared: Comparison) -> Section:
    """All pairs, as a matrix first if there are many."""
    if not compared.pairs:
        why = "There is only one method." if len(compared.groups) == 1 else "No two methods have a seed in common."
        return Section("pairs", "Pairs", [Text(f"{why} Nothing is compared.")])
    note = Text(
        "Differences of accuracy in percentage points, on the same questions and seeds. Two methods can be "
        "distinguished if the corrected p is at most 0.05 and the interval excludes 0. The test is about these models; "
        "the interval includes the variation between seeds, which a few seeds estimate only roughly."
    )
    every = Table(PAIR_COLUMNS, [pair_cells(pair) for pair in compared.pairs], 4)
    if len(compared.pairs) <= FEW_PAIRS:
        return Section("pairs", "Pairs", [every, note])
    how = Text(
        "Accuracy of the row minus that of the column, in percentage points; in brackets if the two cannot be "
        "distinguished."
    )
    return Section("pairs", "Pairs", [_matrix(compared), how, note, Aside("Every pair, with interval and p", [every])])


def _matrix(compared: Comparison) -> Table:
    order = [group.label for group in ranked(compared.groups)]
    cell_of = {}
    for pair in compared.pairs:
        for key, difference in (((pair.a, pair.b), pair.difference), ((pair.b, pair.a), -pair.difference)):
            cell_of[key] = points(difference) if pair.distinguishable else f"({points(difference)})"
    rows = [[f"{i} {row}", *(cell_of.get((row, column), "") for column in order)] for i, row in enumerate(order, 1)]
    return Table(["", *(str(i) for i in range(1, len(order) + 1))], rows, len(order), ["", *order])


def provenance(compared: Comparison, sets: Mapping[str, Comparison] | None = None) -> Section:
    """The settings, data and code of the compared runs, and their results.

    `sets`: comparisons of the same runs on the sets of a suite, whose results are then shown.
    """
    runs, results = compared.runs, sets or {"right": compared}
    right = zip(*([_right(run) for run in each.runs] for each in results.values()), strict=True)
    labels = [group.label for group in compared.groups for _ in group.runs]
    rows = [[*_run_row(label, run), *its] for label, run, its in zip(labels, runs, right, strict=True)]
    methods = list(dict.fromkeys(group.runs[0].method for group in compared.groups))
    data = {(split, row["sha256"]): row for run in runs for split, row in run.record.description["data"].items()}
    asked = [(name, {**each.evaluation, "used": each.evaluation["count"]}) for name, each in (sets or {}).items()]
    trained_on = [(split, row) for (split, _), row in data.items()]
    files = data_table([*trained_on, *asked], None if sets else compared.evaluation)
    last_sessions = [run.record.description["sessions"][-1] for run in runs]
    alike = [[run.settings for run in runs if run.record.is_policy is kind] for kind in (False, True)]
    keys = list(dict.fromkeys(key for settings in alike for key in differing(settings)))
    facts = [
        *((method, get_method(method).summary) for method in methods),
        ("settings that differ", ", ".join(keys) if keys else "none but the seed"),
        ("machine", "; ".join(_machines(runs))),
        ("versions", "; ".join(dict.fromkeys(map(describe_versions, last_sessions)))),
        ("code", "; ".join(dict.fromkeys(map(describe_revision, last_sessions)))),
    ]
    commands = [command(run.record.description["sessions"][0]["command"]) for run in runs]
    table_of_runs = Table(["run", "method", "seed", "updates", "checkpoint", *results], rows, 3 + len(results))
    trained = Aside("The commands that trained the runs", [Code("\n".join(commands))])
    parts = [Facts(facts), table_of_runs, files, Text("The command for this page:"), Code(compared.command), trained]
    return Section("provenance", "What exactly was compared", parts)


def _run_row(label: str, run: ComparableRun) -> list[str]:
    updates = f"{run.record.updates_done:,}"
    if origin := run.record.description["init"]:
        updates = f"{run.updates_before:,} of {Path(origin).parent.parent.name} + {updates}"
    return [str(run.folder), label, str(run.seed), updates, f"{run.evaluation['step']:,}"]


def _right(run: ComparableRun) -> str:
    return f"{run.evaluation['correct']:,} of {run.evaluation['count']:,}"


@styled()
def accuracies(compared: Comparison, width: float) -> Drawing:
    """Draw the accuracy, interval and seeds of each method on a common scale. `width` in points."""
    longest = max(len(row["method"]) for row in compared.rows)
    above = 6 * longest > 0.3 * width  # no room beside the scale
    left, right, row_height = (8 if above else 6 * longest + 12), 46, (42 if above else 26)
    height = row_height * len(compared.rows) + 30
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, 26 / height, 1 - (left + right) / width, 1 - 30 / height))
    chance_accuracy = compared.evaluation["chance_accuracy"]
    seeds = [[run.evaluation["accuracy"] for run in group.runs] for group in compared.groups]
    lowest = min([row["low"] for row in compared.rows] + [min(shares) for shares in seeds] + [chance_accuracy or 1.0])
    axes.set_xlim(max(0.0, (20 * lowest - 0.5) // 1 / 20), 1)
    axes.set_ylim(len(compared.rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    if chance_accuracy is not None:
        axes.axvline(chance_accuracy, **DASHED)
    for y, (row, seed_accuracies) in enumerate(zip(compared.rows, seeds, strict=True)):
        line = y + 0.2 if above else y
        axes.plot([row["low"], row["high"]], [line, line], color=LIGHT["blue"], linewidth=5, alpha=0.35,
                  solid_capstyle="round", clip_on=False)  # fmt: skip
        if len(seed_accuracies) > 1:
            axes.plot(seed_accuracies, [line] * len(seed_accuracies), "o", markersize=6, fillstyle="none",
                      color=LIGHT["muted"], clip_on=False)  # fmt: skip
        axes.plot([row["accuracy"]], [line], "o", markersize=7, color=LIGHT["blue"], clip_on=False)
        axes.annotate(row["method"], (0, line), (0, 14) if above else (-left, 0),
                      xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                      color=LIGHT["ink"], parse_math=False,
                      bbox={"facecolor": LIGHT["paper"], "linewidth": 0, "pad": 1})  # fmt: skip
        axes.annotate(percent(row["accuracy"]), (1, line), (right, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", ha="right", color=LIGHT["ink"])  # fmt: skip
    return figure


# The command.


def run(config: TableConfig, more: Callable[[Comparison], Sequence[Section]] = lambda compared: ()) -> int:
    """Compare runs and write the table in all forms; the page gets the sections of `more`. Gives the exit status."""
    compared = compare(config)
    of_runs = common_folder([run.folder for run in compared.runs])
    folder = output_folder(config, of_runs)
    texts = {"table.md": markdown(compared), "table.html": html(compared, of_runs, more(compared))}
    study(compared).write(folder)
    for name, text in texts.items():
        write_text(folder / name, text)
    log(on_screen(compared))
    for warning in compared.warnings:
        log(wrapped(f"warning: {warning}"))
    log(f"Table: {folder / 'table.html'}, and the same as .md, .csv and .json")
    return 0


def output_folder(config: TableConfig | MethodsConfig, of_runs: Path) -> Path:
    """The folder for the table, by default the common folder of the runs. Raises ValueError if they have none."""
    if not config.output and of_runs == of_runs.parent:
        raise ValueError("The runs have no common folder. Name one for the table: output=DIR.")
    return Path(config.output) if config.output else of_runs


def common_folder(runs: Sequence[Path]) -> Path:
    """The deepest folder that contains all runs, relative to the current folder if it is inside it."""
    common = Path(os.path.commonpath([path.resolve().parent for path in runs]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common
