"""coconut evaluate: answer every question of a file with a trained model, and judge the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coconut.evaluation.config import EvaluateConfig
from coconut.generation.config import StopRule
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.engine.world import World


def run(config: EvaluateConfig) -> int:
    """Evaluate a run on one of its splits, or a run or a saved model on any data file. Gives the exit status."""
    from coconut.engine.launch import run_on_processes
    from coconut.utils.console import silence_libraries

    silence_libraries()
    return run_on_processes(config.launch, config.engine, "coconut.evaluate", lambda world: run_rank(config, world))


def run_rank(config: EvaluateConfig, world: World) -> int:
    """The work of each process. The main process writes the result."""
    from coconut.data.datasets import file_of_split
    from coconut.data.examples import read_examples
    from coconut.engine.base import autocast
    from coconut.evaluation import record
    from coconut.evaluation.evaluator import describe, evaluate, task_of
    from coconut.evaluation.sampling import SampledResult, describe_samples, evaluate_samples
    from coconut.evaluation.selection import select_examples, warn_of_questions
    from coconut.runs.description import read_config
    from coconut.runs.loading import classifier_of, load_model, load_run
    from coconut.utils.console import log, progress_bar
    from coconut.utils.files import ensure_writable

    saved = record.is_saved_model(config)
    data: dict[str, Any] = {"task": config.task} if saved else read_config(config.run)["data"]
    if config.task not in (None, data["task"]):
        raise ValueError(f"task={config.task} is for saved models; {config.run} was made for {data['task']}.")
    file = str(world.on_main_process(lambda: file_of_split(data, config.split, config.data)))
    examples = read_examples(file)[: config.limit]
    folder = record.output_folder(config, saved)
    world.on_main_process(lambda: ensure_writable(folder))

    trained = None if saved else load_run(config.run, config.checkpoint, config.engine, world)
    lm = trained.lm if trained else load_model(config.run, config.checkpoint, config.engine, world)
    step = trained.step if trained else None
    task, cache_dir = task_of(data), data.get("cache_dir")
    selected = select_examples(lm, examples, task, config, file=file, cache_dir=cache_dir, world=world)
    stop = None
    if trained and config.stop is StopRule.classifier:
        with world.main_process_first():
            stop = classifier_of(config.run, trained, config.batch_size).stop

    which = f"{record.describe_settings(lm.reasoning, config)}{f', update {step}' if trained else ''}"
    log(f"Evaluating {which}, on {len(selected.examples)} questions of {file}")
    warn_of_questions(lm, selected, config, file)
    share = -(-len(selected.examples) // world.size)
    with progress_bar("evaluating", share) as bar, autocast(lm.device, config.engine.precision):
        options: dict[str, Any] = {
            "question_ids": selected.question_ids, "num_thoughts": config.num_thoughts, "stop": stop,
            "mode": config.mode, "max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size,
            "on_batch": lambda done, correct: bar(done, f"accuracy so far {100 * correct / done:.1f} %"),
            "world": world,
        }  # fmt: skip
        if sampling := config.sampling:
            result, predictions = evaluate_samples(
                lm, task, selected.examples, sampling, rows=selected.rows, **options
            )  # fmt: skip
        else:
            result, predictions, _ = evaluate(lm, task, selected.examples, **options)
    if world.is_main:
        result.left_out = len(examples) - len(selected.examples)
        log(describe_samples(result) if isinstance(result, SampledResult) else describe(result))
        record.write_evaluation(folder, config, result, predictions, file=file, step=step, reasoning=lm.reasoning)
    return 0


main = application("evaluate", EvaluateConfig, run)

if __name__ == "__main__":
    main()
