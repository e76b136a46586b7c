"""Measure how a hybrid model chooses its modes, and compare it with routers."""

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

SPLITS = ("train", "test")  # routers are fitted on the first and compared on the second
MAX_FITTED_ON = 1000  # how many training questions routers are fitted on at most


def examine_choices(config: AnalyzeConfig, record: RunRecord) -> list[Study]:
    """The studies of a run's choice of modes on its test questions; none if its data files are missing."""
    try:
        files = {split: file_of_split(record.config["data"], split, config.data) for split in SPLITS}
    except FileNotFoundError as error:
        log(f"The choice of modes is not analyzed. {error}")
        return []
    trained = load_run(config.run, config.checkpoint, config.engine)
    read = read_examples(files["test"])[: config.limit], read_examples(files["train"])[:MAX_FITTED_ON]
    test_examples, train_examples = (
        [examples[i] for i in indices_that_fit(trained.lm, [e.question for e in examples])] for examples in read
    )
    log(f"Analyzing step {trained.step:,} with {len(test_examples):,} questions of {files['test']}, in every mode")
    task = TASKS[record.config["data"]["task"]]
    with autocast(trained.lm.device, config.engine.precision):
        studies = choice_studies(trained.lm, task, test_examples, train_examples, batch_size=config.batch_size)
    about = {
        "step": trained.step, "file": files["test"], "sha256": sha256(files["test"]), "questions": len(test_examples),
        "seen": seen_by(config.run, [example.question for example in test_examples]),
    }  # fmt: skip
    return [replace(study, facts=study.facts | about) for study in studies]
