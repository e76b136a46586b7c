"""A table of several policies that choose their modes: modes, rewards and accuracies, and learning curves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from coconut.analysis.comparable_runs import expand_patterns
from coconut.analysis.config import TableConfig
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.reporting import run_table, sampled_table, suite_table
from coconut.reporting.page import Heading, Part, Section, Table, Text, page
from coconut.reporting.phrases import percent
from coconut.rl.report import curves_figure, mode_legend, modes_of
from coconut.rl.training_comparison import training_sections
from coconut.runs.record import RunRecord, read_run
from coconut.runs.study import Study
from coconut.utils.console import log
from coconut.utils.files import write_text

SEED = re.compile(r"-seed\d+$")


def write_table(config: TableConfig) -> int:
    """Write the table of runs, supervised ones or policies. Gives the exit status.

    If all are policies that choose their modes, it is the table of their modes. With `sampled` it is the comparison of
    sampled evaluations.
    """
    if config.sampled:
        return sampled_table.run(config)
    if config.suite.sets:
        return suite_table.run(config)
    run_folders = expand_patterns(config.runs)
    records = [read_run(folder) for folder in run_folders]
    if not all(record.is_policy and modes_of(record) for record in records):
        return run_table.run(config, training_sections)
    study = comparison(records)
    folder = run_table.output_folder(config, run_table.common_folder(run_folders))
    study.write(folder)
    write_text(folder / "policies.html", comparison_page(study, records, folder))
    log("\n".join(run_table.aligned([columns(study.facts["modes"]), *table_rows(study)])))
    log(f"Table: {folder / 'policies.html'}, and the same as .csv and .json")
    return 0


def arm_of(run: RunRecord) -> str:
    """The arm of a run: the name of its folder without the seed."""
    return SEED.sub("", run.folder.resolve().name)


def comparison(runs: Sequence[RunRecord]) -> Study:
    """A study with a row for each run: its choice of modes, and its results on the test questions.

    Raises ValueError if a run is incomplete, was not analyzed, has no validation at the analyzed step, or differs from
    the first in modes or test questions.
    """
    for run in runs:
        if run.step < run.config["num_steps"]:
            raise ValueError(f"{run.folder} is not complete: step {run.step:,} of {run.config['num_steps']:,}.")
        if "routers" not in run.studies:
            raise ValueError(f"{run.folder} was not analyzed. Run coconut analyze run={run.folder}.")
    first_facts, rows = runs[0].studies["routers"].facts, []
    for run in runs:
        facts = run.studies["routers"].facts
        if any(facts[key] != first_facts[key] for key in ("modes", "sha256", "questions")):
            raise ValueError(f"{run.folder} and {runs[0].folder} differ in their modes or in their test questions.")
        by_name = {row["router"]: row for row in run.studies["routers"].rows}
        model_row, modes, valid = by_name["the model"], facts["modes"], {row["step"]: row for row in run.valid}
        if facts["step"] not in valid:
            raise ValueError(
                f"{run.folder} was analyzed at step {facts['step']:,}, which has no validation, so its reward is "
                f"unknown. Analyze another checkpoint: coconut analyze run={run.folder} checkpoint=best"
            )
        easy, *_, hard = run.studies["difficulty"].rows
        rows.append({
            "arm": arm_of(run), "seed": run.config["seed"], "step": facts["step"],
            "reward": valid[facts["step"]]["reward"],
            **{key: model_row[key] for key in ("accuracy", "low", "high", "new_tokens", "passes")},
            "at_random": by_name["at random, as often"]["accuracy"], "oracle": by_name["oracle"]["accuracy"],
            **{f"share_{mode}": model_row[f"share_{mode}"] for mode in modes},
            **{f"easiest_{mode}": easy[f"chance_{mode}"] for mode in modes},
            **{f"hardest_{mode}": hard[f"chance_{mode}"] for mode in modes},
            "seconds": sum(row["seconds"] for row in run.train),
        })  # fmt: skip
    facts_of_study = {key: first_facts[key] for key in ("modes", "sha256", "questions", "file")}
    return Study("policies", rows, facts_of_study | {"seen": most_seen([run.studies["routers"].facts for run in runs])})


def comparison_page(study: Study, runs: Sequence[RunRecord], folder: Path) -> str:
    """The HTML page that compares the policies."""
    modes = study.facts["modes"]
    questions = describe_questions(study.facts["questions"], study.facts.get("seen"))
    note = (
        f"Means over seeds, on {questions}. The numbers of a run are those of its analyzed checkpoint, by default the "
        "one with the best reward. Reward: on validation questions. Minutes: of the whole training. Easy and hard: the "
        "probability of the mode's control token for questions with the fewest and with the most steps. At random: the "
        "accuracy if modes were chosen with the same frequencies but independently of the question. Oracle: the "
        "accuracy if a mode that answers right were chosen wherever there is one."
    )
    parts: list[Part] = [Table(columns(modes), table_rows(study), len(columns(modes)) - 1), Text(note)]
    curves: list[Part] = [mode_legend(modes)]
    for number, arm in enumerate(dict.fromkeys(map(arm_of, runs))):
        arm_runs = [run for run in runs if arm_of(run) == arm]
        figure, seeds = curves_figure(arm_runs, f"arm{number}"), ", ".join(str(run.config["seed"]) for run in arm_runs)
        caption = f"Seed{'s' * (len(arm_runs) > 1)} {seeds}." + ("" if number else f" {figure.caption}")
        curves += [Heading(arm), replace(figure, caption=caption)]
    sections = [Section("headline", None, parts), Section("learning", "How they learned", curves)]
    summary = f"trained to choose between {', '.join(modes)}"
    return page(runs[0].description["name"], f"{len(runs)} policies", summary, folder, sections, kicker="comparison")


def columns(modes: Sequence[str]) -> list[str]:
    """The heads of the table's columns."""
    of_modes = [f"{mode}{kind}" for mode in modes[1:] for kind in ("", ", easy", ", hard")]
    return ["arm", "seeds", "reward", "accuracy", "at random", "oracle", *of_modes, "new tokens", "passes", "minutes"]


def table_rows(study: Study) -> list[list[str]]:
    """The texts of a row for each arm, in the order of `columns`; numbers are means over seeds."""
    modes = study.facts["modes"]
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in study.rows):
        arm_rows = [row for row in study.rows if row["arm"] == arm]
        mean = {key: float(np.mean([row[key] for row in arm_rows])) for key in arm_rows[0] if key != "arm"}
        seeds = ", ".join(str(row["seed"]) for row in arm_rows)
        shares = [f"{kind}_{mode}" for mode in modes[1:] for kind in ("share", "easiest", "hardest")]
        percents = [percent(mean[key]) for key in ("accuracy", "at_random", "oracle", *shares)]
        numbers = [f"{mean['new_tokens']:.1f}", f"{mean['passes']:.1f}", f"{mean['seconds'] / 60:.1f}"]
        rows.append([arm, seeds, f"{mean['reward']:.3f}", *percents, *numbers])
    return rows
