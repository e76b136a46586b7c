"""One table of several policies: what each chooses, what it earns, and how it learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coconut.analysis.comparable_runs import folders
from coconut.analysis.config import TableConfig
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.reporting import run_table
from coconut.reporting.page import Heading, Part, Section, Table, Text, page, percent
from coconut.rl.report import curves_figure, is_policy, mode_legend
from coconut.runs.record import RunRecord, read_run
from coconut.runs.study import Study
from coconut.utils.console import log
from coconut.utils.files import write_text

SEED = re.compile(r"-seed\d+$")


def write_table(config: TableConfig) -> int:
    """Write the table of policies, or that of trained models. Gives the exit status.

    Raises ValueError if there are runs of both kinds.
    """
    named = folders(config.runs)
    records = [read_run(folder) for folder in named]
    kinds = [is_policy(record) for record in records]
    if not any(kinds):
        return run_table.run(config)
    if not all(kinds):
        both = records[kinds.index(True)].folder, records[kinds.index(False)].folder
        raise ValueError(f"{both[0]} was trained by reward and {both[1]} was not: make a table of each kind.")
    study = comparison(records)
    folder = run_table.place_of(config, run_table.common_folder(named))
    study.write(folder)
    write_text(folder / "policies.html", comparison_page(study, records, folder))
    log("\n".join(run_table.aligned([columns(study.facts["modes"]), *table_rows(study)])))
    log(f"Table: {folder / 'policies.html'}, and beside it .csv, .json")
    return 0


def arm_of(run: RunRecord) -> str:
    """The name of its folder, without the seed."""
    return SEED.sub("", run.folder.resolve().name)


def arms(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of one arm together."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(arm_of(run), []).append(run)
    return found


def comparison(runs: Sequence[RunRecord]) -> Study:
    """A study with a row for each run: its choice of modes, and the results on test questions.

    Raises ValueError if a run is incomplete, was not analyzed, or has other modes or test questions than the first.
    """
    for run in runs:
        if run.step < run.config["num_steps"]:
            raise ValueError(f"{run.folder} is not complete: step {run.step:,} of {run.config['num_steps']:,}.")
        if "routers" not in run.studies:
            raise ValueError(f"{run.folder} was not analyzed. Run coconut analyze run={run.folder}.")
    first_facts = runs[0].studies["routers"].facts
    rows = []
    for run in runs:
        facts = run.studies["routers"].facts
        if any(facts[key] != first_facts[key] for key in ("modes", "sha256", "questions")):
            raise ValueError(f"{run.folder} and {runs[0].folder} differ in their modes or in their test questions.")
        model_row, *others = run.studies["routers"].rows
        by_name = {row["router"]: row for row in others}
        easy, *_, hard = run.studies["difficulty"].rows
        rows.append(
            {
                "arm": arm_of(run),
                "seed": run.config["seed"],
                "step": run.studies["routers"].facts["step"],
                "reward": _validated(run)["reward"],
                **{key: model_row[key] for key in ("accuracy", "low", "high", "new_tokens", "passes")},
                "at_random": by_name["at random, as often"]["accuracy"],
                "oracle": by_name["oracle"]["accuracy"],
                **{key: value for key, value in model_row.items() if key.startswith("share_")},
                **{f"easiest_{mode}": easy[f"chance_{mode}"] for mode in first_facts["modes"]},
                **{f"hardest_{mode}": hard[f"chance_{mode}"] for mode in first_facts["modes"]},
                "seconds": sum(row["seconds"] for row in run.train),
            }
        )
    facts_of_study = {key: first_facts[key] for key in ("modes", "sha256", "questions", "file")}
    return Study("policies", rows, facts_of_study | {"seen": most_seen([run.studies["routers"].facts for run in runs])})


def _validated(run: RunRecord) -> dict[str, Any]:
    """The validation of the checkpoint that was analyzed. Raises ValueError if there is none."""
    step = run.studies["routers"].facts["step"]
    rows = [row for row in run.valid if row["step"] == step]
    if not rows:
        raise ValueError(
            f"{run.folder} was analyzed at step {step:,}, which has no validation, so its reward is not known. "
            f"Analyze another checkpoint: coconut analyze run={run.folder} checkpoint=best"
        )
    return rows[-1]


def comparison_page(study: Study, runs: Sequence[RunRecord], folder: Path) -> str:
    """The page of several runs."""
    modes = study.facts["modes"]
    asked = describe_questions(study.facts["questions"], study.facts.get("seen"))
    note = (
        f"On {asked}; means over seeds. All numbers of a run are of the "
        "checkpoint that was examined, the best by its reward unless another was named; the reward is that on "
        "validation questions. Minutes: of the whole training. Chance on easy and on hard: how likely "
        "the first token is that of the mode, for questions of the fewest and of the most steps. At random: the "
        "accuracy if each mode were taken as often, whatever the question."
    )
    parts: list[Part] = [Table(columns(modes), table_rows(study), len(columns(modes)) - 1), Text(note)]
    curves: list[Part] = [mode_legend(modes)]
    for number, (arm, its) in enumerate(arms(runs).items()):
        figure, seeds = curves_figure(its, f"arm{number}"), ", ".join(str(run.config["seed"]) for run in its)
        said = f"Seed{'s' * (len(its) > 1)} {seeds}."
        curves += [Heading(arm), replace(figure, caption=f"{said} {figure.caption}" if not number else said)]
    return page(
        runs[0].description["name"],
        f"{len(runs)} policies",
        f"how each learned which of {', '.join(modes)} to answer in",
        folder,
        [Section("headline", None, parts), Section("learning", "How they learned", curves)],
        kicker="comparison",
    )


def columns(modes: Sequence[str]) -> list[str]:
    of_modes = [f"{mode}{kind}" for mode in modes[1:] for kind in ("", ", easy", ", hard")]
    return ["arm", "seeds", "reward", "accuracy", "at random", "oracle", *of_modes, "new tokens", "passes", "minutes"]


def table_rows(study: Study) -> list[list[str]]:
    """A row for each arm, as it is read, in the order of `columns`."""
    modes = study.facts["modes"]
    found = []
    for arm in dict.fromkeys(row["arm"] for row in study.rows):
        its = [row for row in study.rows if row["arm"] == arm]
        mean = {key: float(np.mean([row[key] for row in its])) for key in its[0] if key not in ("arm", "seed", "step")}
        shares = [percent(mean[f"{kind}_{mode}"]) for mode in modes[1:] for kind in ("share", "easiest", "hardest")]
        found.append(
            [
                arm,
                ", ".join(str(row["seed"]) for row in its),
                f"{mean['reward']:.3f}",
                *(percent(mean[key]) for key in ("accuracy", "at_random", "oracle")),
                *shares,
                f"{mean['new_tokens']:.1f}",
                f"{mean['passes']:.1f}",
                f"{mean['seconds'] / 60:.1f}",
            ]
        )
    return found
