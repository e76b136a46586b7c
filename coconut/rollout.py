"""The command that samples answers from a model and judges them: what a reward model is trained on."""

from __future__ import annotations

import json
from pathlib import Path

from coconut.completions.rollouts import CorrectnessReward, examples_that_fit, sample_groups
from coconut.config import TooLong
from coconut.data.datasets import file_of_split
from coconut.data.examples import read_examples
from coconut.engine.base import autocast
from coconut.engine.launch import run_on_processes
from coconut.engine.world import World
from coconut.evaluation.evaluator import task_of
from coconut.evaluation.gold_answers import read_back, warn_of_limit
from coconut.rewards.config import RolloutConfig
from coconut.rewards.labelled_answers import answer_row, write_answers
from coconut.runs.description import read_config
from coconut.runs.loading import load_run
from coconut.utils.console import log, progress_bar, silence_libraries
from coconut.utils.files import sha256, write_json
from coconut.utils.hydra_app import application

CHUNK = 256  # questions; what is sampled for one depends on the seed and its number alone


def run(config: RolloutConfig) -> int:
    """Sample answers to the questions of a split, judge them and write them down."""
    silence_libraries()
    return run_on_processes(config.launch, config.engine, "coconut.rollout", lambda world: run_rank(config, world))


def run_rank(config: RolloutConfig, world: World) -> int:
    """What each process does. Chunks are kept beside the file until it is whole, so that a killed command goes on."""
    data = read_config(config.run)["data"]
    path = world.on_main_process(lambda: file_of_split(data, config.split, getattr(config.data, config.split)))
    examples = read_examples(path)[: config.limit]
    trained = load_run(config.run, config.checkpoint, config.engine, world)
    lm = trained.lm
    skip = config.too_long is TooLong.skip
    examples = examples_that_fit(lm, examples, 1, skip, str(path), "Leave them out with too_long=skip.", config.mode)
    task = task_of(data)
    with world.main_process_first():
        gold, right = read_back(
            lm, examples, task, file=str(path), unreadable=config.unreadable, cache_dir=data["cache_dir"]
        )
    limit = config.max_new_tokens or lm.reasoning.max_new_tokens
    warn_of_limit(gold, lm.reasoning.forms(config.mode), limit, str(path))
    examples = [examples[i] for i in right]
    output = Path(config.output or Path(config.run) / "rollouts" / f"{config.split}.jsonl")
    about = {
        "run": str(Path(config.run).resolve()), "step": trained.step, "file": str(Path(path).resolve()),
        "sha256": sha256(path), "questions": len(examples), "samples": config.samples,
        "temperature": config.temperature, "mode": config.mode, "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }  # fmt: skip
    parts = output.with_name(f".{output.name}.chunks")
    world.on_main_process(lambda: _begin(parts, about))
    judge = CorrectnessReward(task, lm.reasoning.format)
    chunks = [range(first, min(first + CHUNK, len(examples))) for first in range(0, len(examples), CHUNK)]
    with progress_bar("sampling", len(chunks)) as bar, autocast(lm.device, config.engine.precision):
        for number, places in list(enumerate(chunks))[world.rank :: world.size]:
            world.set_activity(f"sampling chunk {number}")
            chunk = parts / f"{number:06d}.jsonl"
            if not chunk.is_file():
                groups = sample_groups(
                    lm, [examples[i] for i in places], lambda *_: 0.0, samples=config.samples,
                    seed=(config.seed, number), temperature=config.temperature, mode=config.mode,
                    max_new_tokens=config.max_new_tokens, batch_size=config.batch_size,
                )  # fmt: skip
                write_answers(
                    chunk, (answer_row(g, [judge.is_correct(g.example, s.text) for s in g.completions]) for g in groups)
                )
            bar(number + 1, "")
    world.all_gather_object(None)
    if world.is_main:
        texts = [(parts / f"{number:06d}.jsonl").read_text(encoding="utf-8") for number in range(len(chunks))]
        rows = [json.loads(line) for text in texts for line in text.split("\n") if line]
        write_answers(output, rows)
        write_json(output.with_suffix(".json"), about)
        for left in parts.iterdir():
            left.unlink()
        parts.rmdir()
        labels = [said["correct"] for row in rows for said in row["completions"]]
        right = f"{100 * sum(labels) / len(labels):.1f} % of them right"
        log(f"{len(rows):,} questions, {len(labels):,} answers, {right}: {output}")
    return 0


def _begin(parts: Path, about: dict[str, object]) -> None:
    """Chunks of another command are no part of this one."""
    told = parts / "about.json"
    if told.is_file() and json.loads(told.read_text()) != about:
        for left in parts.iterdir():
            left.unlink()
    if not told.is_file():
        write_json(told, about)


main = application("rollout", RolloutConfig, run)

if __name__ == "__main__":
    main()
