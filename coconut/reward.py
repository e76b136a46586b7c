"""Train a reward model; after the word `compare`, set several side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.rewards.config import CompareConfig, RewardModelConfig
from coconut.rewards.trainer import run
from coconut.utils.console import log, progress_bar, silence_libraries
from coconut.utils.hydra_app import application, subcommands

if TYPE_CHECKING:
    from coconut.rewards.compare import TrainedRewardModel
    from coconut.rewards.losses import Loss

SIZES = (1, 2, 4, 8, 16, 32, 64)


def compare(config: CompareConfig) -> int:
    """Score the same answers with several reward models, and write what each is good for."""
    from coconut.analysis.comparable_runs import folders
    from coconut.completions.rollouts import CorrectnessReward
    from coconut.config import TooLong
    from coconut.engine.base import autocast, set_up_device
    from coconut.models.latent_lm import LatentLM
    from coconut.reporting.run_table import common_folder
    from coconut.rewards import compare as scoring
    from coconut.rewards import report
    from coconut.rewards.implicit import ImplicitReward, reference_of
    from coconut.rewards.labelled_answers import read_answers
    from coconut.rewards.losses import get_loss
    from coconut.rewards.value_model import ValueModel
    from coconut.runs.description import read_config
    from coconut.runs.loading import in_float32, load_run, match_dtypes
    from coconut.runs.study import Study
    from coconut.tasks import TASKS
    from coconut.utils.files import write_text

    silence_libraries()
    runs = folders(config.runs)
    configs = [read_config(folder) for folder in runs]
    inits = {str(reference_of(folder)) for folder in runs}
    if len(inits) != 1:
        raise ValueError(f"The reward models started from different models: {', '.join(sorted(inits))}.")
    [init] = inits
    device = set_up_device(config.engine)
    reference = in_float32(LatentLM.from_pretrained(init)).to(device)
    reference.acceleration.mechanisms = config.engine.mechanisms
    task = TASKS[_task(init)]
    judge = CorrectnessReward(task, reference.reasoning.format)
    skip = config.too_long is TooLong.skip
    asked = read_answers(config.answers, reference, skip, alike=True)
    development = read_answers(config.development or configs[0]["data"]["valid"], reference, skip, alike=True)
    parts = [scoring.first_answers(labelled, config.num_step_questions) for labelled in (development, asked)]
    scored, stepwise, trained = [], [], []
    bounds: dict[str, Study] = {}
    with (
        progress_bar("scoring", len(runs) + bool(config.rollouts)) as bar,
        autocast(reference.device, config.engine.precision),
    ):
        for number, (folder, its) in enumerate(zip(runs, configs, strict=True)):
            lm = load_run(folder, config.checkpoint, config.engine).lm
            alike = all(a.dtype is b.dtype for a, b in zip(reference.parameters(), lm.parameters(), strict=True))
            beside = reference if alike else match_dtypes(LatentLM.from_pretrained(init), lm, device)
            loss, reward = get_loss(its["loss"]), ImplicitReward(lm, beside, its["beta"])
            score: Callable[..., scoring.ScorerResult] = (
                partial(scoring.valued, folder.name, ValueModel(lm))
                if loss.is_value_model
                else partial(scoring.implicit, folder.name, reward)
            )
            scored.append(score(asked, config.batch_size))
            dev, test = (score(part, config.batch_size) for part in parts)
            stepwise.append((dev, test))
            if not loss.is_value_model:
                bounds[folder.name] = scoring.bounds(reward, asked, seed=config.seed)
            trained.append(_training(folder, loss))
            bar(number + 1, folder.name)
        if config.rollouts:
            options: dict[str, Any] = {"rollouts": config.rollouts, "seed": config.seed}
            dev, test = (scoring.monte_carlo(reference, judge, part, **options) for part in parts)
            stepwise.append((dev, test))
            scored.append(scoring.monte_carlo(reference, judge, asked, **options))
            bar(len(runs) + 1, "rollouts")
    learned_from = read_answers(configs[0]["data"]["train"], reference, skip=True)
    studies = [
        scoring.selections(asked, scored, judge, SIZES),
        scoring.costs(
            trained,
            learned_from,
            sum(weight.numel() for weight in reference.parameters()),
            stepwise[-1][1] if config.rollouts else None,
            len(scoring.samples_of(parts[1])),
        ),
    ]
    if hasattr(task, "first_wrong"):
        studies.append(scoring.localisation(parts[0], parts[1], stepwise, judge))
    folder = Path(config.output) if config.output else common_folder(runs)
    studies.append(scoring.all_bounds(bounds))
    for study in studies:
        study.write(folder)
    log(report.on_screen(studies))
    page = folder / "comparison.html"
    write_text(page, report.comparison_page(studies, configs[0]["name"], folder))
    log(f"Page: {page}\nData: {folder}")
    return 0


def _training(folder: Path, loss: Loss) -> TrainedRewardModel:
    """What a run's updates took."""
    from coconut.rewards.compare import TrainedRewardModel
    from coconut.runs.description import read_metrics

    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    seconds, items = (sum(row[key] for row in rows) for key in ("seconds", "items"))
    return TrainedRewardModel(
        folder.name,
        seconds,
        int(items) * (2 if loss.pairs else 1),
        compared=not loss.is_value_model,
        shifted=loss.uses_reference_point,
    )


def _task(init: str) -> str:
    """Of the run whose answers are judged."""
    from coconut.runs.description import read_config
    from coconut.runs.loading import run_folder_of

    return str(read_config(run_folder_of(init))["data"]["task"])


main = subcommands(
    application("reward", RewardModelConfig, run), compare=application("compare", CompareConfig, compare)
)


if __name__ == "__main__":
    main()
