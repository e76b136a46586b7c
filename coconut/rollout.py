"""coconut rollout: sample answers from a model and judge them, as training data for reward models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coconut.completions.config import RolloutConfig
from coconut.config import TooLong
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.engine.world import World


def run(config: RolloutConfig) -> int:
    """Sample answers to the questions of a split, judge them and write them to a file. Gives the exit status."""
    from coconut.engine.launch import run_on_processes
    from coconut.utils.console import silence_libraries

    silence_libraries()
    return run_on_processes(config.launch, config.engine, "coconut.rollout", lambda world: run_rank(config, world))


def run_rank(config: RolloutConfig, world: World) -> int:
    """The work of each process. The processes share the questions."""
    from coconut.completions.rollout_file import write_rollouts
    from coconut.completions.rollouts import CorrectnessReward, examples_that_fit
    from coconut.data.datasets import file_of_split
    from coconut.data.examples import read_examples
    from coconut.evaluation.evaluator import task_of
    from coconut.evaluation.gold_answers import read_back, warn_of_limit
    from coconut.runs.description import read_config
    from coconut.runs.loading import load_run
    from coconut.utils.files import sha256

    data = read_config(config.run)["data"]
    path = world.on_main_process(lambda: file_of_split(data, config.split, config.data))
    examples = read_examples(path)[: config.limit]
    trained = load_run(config.run, config.checkpoint, config.engine, world)
    lm, task = trained.lm, task_of(data)
    skip = config.too_long is TooLong.skip
    examples = examples_that_fit(lm, examples, 1, skip, str(path), "Leave them out with too_long=skip.", config.mode)
    with world.main_process_first():
        gold, right = read_back(lm, examples, task, file=str(path), unreadable=config.unreadable,
                                cache_dir=data["cache_dir"])  # fmt: skip
    limit = config.max_new_tokens or lm.reasoning.max_new_tokens
    warn_of_limit(gold, lm.reasoning.forms(config.mode), limit, str(path))
    examples = [examples[i] for i in right]
    about = {
        "run": str(Path(config.run).resolve()), "step": trained.step, "file": str(Path(path).resolve()),
        "sha256": sha256(path), "questions": len(examples), "samples": config.samples,
        "temperature": config.temperature, "mode": config.mode, "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }  # fmt: skip
    output = Path(config.output or Path(config.run) / "rollouts" / f"{config.split}.jsonl")
    write_rollouts(lm, examples, CorrectnessReward(task, lm.reasoning.format), config, output, about, world)
    return 0


main = application("rollout", RolloutConfig, run)

if __name__ == "__main__":
    main()
