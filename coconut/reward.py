"""Train a reward model; after the word `compare`, set several side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from coconut.cli import application
from coconut.rewards.config import CompareConfig, RewardModelConfig
from coconut.rewards.train import run
from coconut.screen import only_our_words, say, working

SIZES = (1, 2, 4, 8, 16, 32, 64)


def compare(config: CompareConfig) -> int:
    """Score the same answers with several reward models, and write what each is good for."""
    from coconut.analysis.entrants import folders
    from coconut.analysis.table import aligned, common_folder
    from coconut.build import load_run
    from coconut.engine.base import autocast, set_up
    from coconut.model import LatentLM
    from coconut.rewards import compare as scoring
    from coconut.rewards.answers import read_answers
    from coconut.rewards.implicit import ImplicitReward, reference_of
    from coconut.rl.rollouts import Correctness
    from coconut.tasks import TASKS
    from coconut.tracking import read_config

    only_our_words()
    runs = folders(config.runs)
    configs = [read_config(folder) for folder in runs]
    inits = {str(reference_of(folder)) for folder in runs}
    if len(inits) != 1:
        raise ValueError(f"The reward models started from different models: {', '.join(sorted(inits))}.")
    reference = LatentLM.from_pretrained(inits.pop()).eval().to(set_up(config.engine))
    task = TASKS[_task(configs[0]["init"])]
    judge = Correctness(task, reference.reasoning.format)
    asked = read_answers(config.answers, reference)
    development = read_answers(config.development or configs[0]["data"]["valid"], reference)
    parts = [scoring.first_answers(labelled, config.stepwise) for labelled in (development, asked)]
    scored, stepwise, bounds = [], [], []
    with (
        working("scoring", len(runs) + bool(config.rollouts)) as bar,
        autocast(reference.device, config.engine.precision),
    ):
        for number, (folder, its) in enumerate(zip(runs, configs, strict=True)):
            lm = load_run(folder, config.checkpoint, config.engine).lm
            reward = ImplicitReward(lm, reference, its["beta"])
            scored.append(scoring.implicit(folder.name, reward, asked, config.batch_size))
            dev, test = (scoring.implicit(folder.name, reward, part, config.batch_size) for part in parts)
            stepwise.append((dev, test))
            bounds.append(scoring.bounds(reward, asked, seed=config.seed))
            bar(number + 1, folder.name)
        if config.rollouts:
            options: dict[str, Any] = {"rollouts": config.rollouts, "seed": config.seed}
            dev, test = (scoring.monte_carlo(reference, judge, part, **options) for part in parts)
            stepwise.append((dev, test))
    studies = [scoring.selections(asked, scored, judge, SIZES)]
    if hasattr(task, "first_wrong"):
        studies.append(scoring.localisation(parts[0], parts[1], stepwise, judge))
    folder = Path(config.output) if config.output else common_folder(runs)
    for study in studies:
        study.write(folder)
    for run_folder, study in zip(runs, bounds, strict=True):
        study.write(folder / run_folder.name / "analysis")
    say("\n".join(aligned(_selection_table(studies[0].rows))))
    if len(studies) > 1:
        say("\n".join(aligned([["first error", "F1", "of wrong", "of right", "tokens", "seconds"], *(
            [row["scorer"], *(f"{100 * row[key]:.1f} %" for key in ("f1", "of_wrong", "of_right")),
             f"{row['tokens']:,}", f"{row['seconds']:.1f}"] for row in studies[1].rows)])))  # fmt: skip
    for run_folder, study in zip(runs, bounds, strict=True):
        low, high = (f"{100 * study.facts[key]:.1f} %" for key in ("mean_below", "below_max"))
        say(f"{run_folder.name}: of {len(study.rows)} prefixes E[r] <= q in {low}, q <= max r in {high}")
    say(f"Data: {folder}")
    return 0


def _task(init: str) -> str:
    """Whose answers the first model gave."""
    from coconut.build import run_of
    from coconut.tracking import read_config

    return str(read_config(run_of(init))["data"]["task"])


def _selection_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    sizes = sorted({row["n"] for row in rows})
    kinds = dict.fromkeys((row["scorer"], row["way"]) for row in rows)
    cell = {(row["scorer"], row["way"], row["n"]): f"{100 * row['accuracy']:.1f}" for row in rows}
    found = [["accuracy (%) with n samples", *(str(size) for size in sizes)]]
    return found + [[f"{name}, {way}", *(cell[name, way, size] for size in sizes)] for name, way in kinds]


train = application("reward", RewardModelConfig, run)
comparison = application("compare", CompareConfig, compare)


def main() -> None:
    """Train one, or, after the word `compare`, set several side by side."""
    if sys.argv[1:2] == ["compare"]:
        del sys.argv[1]
        comparison()
    train()


if __name__ == "__main__":
    main()
