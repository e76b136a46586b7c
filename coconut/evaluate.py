"""coconut evaluate: answer every question of a file, or of a suite of sets, with a trained model; judge the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coconut.evaluation.config import EvaluateConfig
from coconut.generation.config import StopRule
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.engine.world import World
    from coconut.evaluation.file_evaluation import FileEvaluator

SET_MISSING = 1  # the exit status if a set of a suite could not be evaluated


def run(config: EvaluateConfig) -> int:
    """Evaluate a run on one of its splits, or a run or a saved model on any file or suite. Gives the exit status."""
    from coconut.engine.launch import run_on_processes
    from coconut.utils.console import silence_libraries

    silence_libraries()
    return run_on_processes(config.launch, config.engine, "coconut.evaluate", lambda world: run_rank(config, world))


def run_rank(config: EvaluateConfig, world: World) -> int:
    """The work of each process. The main process writes the results."""
    from coconut.evaluation.record import is_saved_model
    from coconut.runs.description import read_config

    data = {"task": None} if is_saved_model(config) else read_config(config.run)["data"]
    return (run_suite if config.suite.sets else run_file)(config, data, world)


def run_file(config: EvaluateConfig, data: dict[str, Any], world: World) -> int:
    """Evaluate one file. `data`: that section of the run's configuration."""
    from coconut.data.datasets import file_of_split
    from coconut.data.examples import read_examples
    from coconut.evaluation.evaluator import task_of
    from coconut.evaluation.record import are_default, file_stem, non_default_settings

    judge = config.judge or data["task"]
    task = task_of({"task": judge})
    file = str(world.on_main_process(lambda: file_of_split(data, config.split, config.data)))
    examples = read_examples(file)[: config.limit]
    evaluator = load(config, data, world)
    selected = evaluator.select(examples, task, file)
    settings = non_default_settings(config, data["task"] or judge)
    evaluator.evaluate(
        "-".join([file_stem(config, file), *settings]), selected, task, file=file,
        left_out=len(examples) - len(selected.examples), judge=judge,
        default_settings=are_default(settings),
    )  # fmt: skip
    return 0


def run_suite(config: EvaluateConfig, data: dict[str, Any], world: World) -> int:
    """Evaluate the sets of a suite and write one table of them."""
    from coconut.evaluation.record import non_default_settings
    from coconut.evaluation.suite import evaluate_suite, find_sets
    from coconut.reporting.suite_page import write_table

    settings = non_default_settings(config, None)
    sets = world.on_main_process(lambda: find_sets(config.suite, data.get("cache_dir")))
    evaluator = load(config, data, world)
    records = evaluate_suite(evaluator, sets, settings)
    if world.is_main:
        write_table(evaluator, records, sets.missing, settings)
    return SET_MISSING if sets.missing else 0


def load(config: EvaluateConfig, data: dict[str, Any], world: World) -> FileEvaluator:
    """Load the model, after a check that the folder of results can be written to."""
    from coconut.evaluation.file_evaluation import FileEvaluator
    from coconut.evaluation.record import is_saved_model, output_folder
    from coconut.rewards.answer_scores import load_scorer
    from coconut.runs.loading import classifier_of, load_model, load_run
    from coconut.utils.files import ensure_writable

    saved = is_saved_model(config)
    folder = output_folder(config, saved)
    world.on_main_process(lambda: ensure_writable(folder))
    trained = None if saved else load_run(config.run, config.checkpoint, config.engine, world)
    lm = trained.lm if trained else load_model(config.run, config.checkpoint, config.engine, world)
    if config.rate is not None:
        lm.reasoning = lm.reasoning.at_rate(config.rate)
    stop = None
    if trained and config.stop is StopRule.classifier:
        with world.main_process_first():
            stop = classifier_of(config.run, trained, config.batch_size).stop
    scorer = load_scorer(config, lm, world)
    step, cache_dir = trained.step if trained else None, data.get("cache_dir")
    return FileEvaluator(lm, step, stop, config, folder, cache_dir, world, scorer)


main = application("evaluate", EvaluateConfig, run)

if __name__ == "__main__":
    main()
