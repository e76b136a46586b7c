"""Measure how a hybrid model chooses its modes, against routers that choose for it."""

from __future__ import annotations

from dataclasses import replace

from coconut.analysis.config import AnalyzeConfig
from coconut.data.datasets import file_of_split
from coconut.data.examples import read_examples
from coconut.data.seen_questions import seen_by
from coconut.engine.base import autocast
from coconut.generation.room import indices_that_fit
from coconut.rl.mode_routing import choice_studies
from coconut.runs.loading import load_run
from coconut.runs.record import RunRecord
from coconut.runs.study import Study
from coconut.tasks import TASKS
from coconut.utils.console import log
from coconut.utils.files import sha256

SPLITS = ("train", "test")  # what routers are fitted on, and what they are compared on
MAX_FITTED_ON = 1000  # training questions


def examine_choices(config: AnalyzeConfig, record: RunRecord) -> list[Study]:
    """The studies of a run's choices on its test questions; none if its data files are not here."""
    try:
        files = {split: file_of_split(record.config["data"], split, getattr(config.data, split)) for split in SPLITS}
    except FileNotFoundError as error:
        log(f"Its choices are not compared. {error}")
        return []
    trained = load_run(config.run, config.checkpoint, config.engine)
    asked, others = read_examples(files["test"])[: config.limit], read_examples(files["train"])[:MAX_FITTED_ON]
    asked, others = (
        [part[i] for i in indices_that_fit(trained.lm, [e.question for e in part])] for part in (asked, others)
    )
    log(f"Looking into {trained.step:,}: {len(asked):,} questions of {files['test']}, in every mode")
    task = TASKS[record.config["data"]["task"]]
    with autocast(trained.lm.device, config.engine.precision):
        studies = choice_studies(trained.lm, task, asked, others, batch_size=config.batch_size)
    about = {
        "step": trained.step, "file": files["test"], "sha256": sha256(files["test"]), "questions": len(asked),
        "seen": seen_by(config.run, [example.question for example in asked]),
    }  # fmt: skip
    return [replace(study, facts=study.facts | about) for study in studies]
