"""coconut reward compare: score the same answers with several reward models, and write what each is good for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from coconut.analysis.comparable_runs import expand_patterns
from coconut.completions.rollouts import CorrectnessReward
from coconut.config import TooLong
from coconut.engine.base import autocast, set_up_device
from coconut.models.latent_lm import LatentLM
from coconut.reporting.run_table import common_folder
from coconut.rewards import compare, report
from coconut.rewards.config import CompareConfig
from coconut.rewards.implicit import ImplicitReward, reference_of
from coconut.rewards.labelled_answers import LabelledAnswers, read_answers
from coconut.rewards.losses import Loss, get_loss
from coconut.rewards.value_model import ValueModel
from coconut.runs.description import read_config, read_metrics
from coconut.runs.loading import load_run, match_dtypes, run_folder_of, to_float32
from coconut.runs.study import Study
from coconut.tasks import TASKS
from coconut.utils.console import log, progress_bar, silence_libraries
from coconut.utils.files import write_text

SIZES = (1, 2, 4, 8, 16, 32, 64)  # numbers of answers to choose the best of

Score = Callable[[Sequence[LabelledAnswers]], compare.ScorerResult]


class Scored(NamedTuple):
    """What one scorer gives: for all answers, and for those whose first wrong steps are looked for."""

    answers: compare.ScorerResult
    steps: tuple[compare.ScorerResult, compare.ScorerResult]  # of the development answers and of the others


@dataclass(frozen=True)
class Setting:
    """What all scorers have in common: the reference and the answers."""

    init: str
    reference: LatentLM
    judge: CorrectnessReward
    answers: list[LabelledAnswers]
    step_answers: tuple[list[LabelledAnswers], list[LabelledAnswers]]  # of the development answers and of the others

    def scored(self, score: Score) -> Scored:
        development, others = self.step_answers
        return Scored(score(self.answers), (score(development), score(others)))


def compare_runs(config: CompareConfig) -> int:
    """Compare reward models that started from one model. Gives the exit status."""
    silence_libraries()
    runs = expand_patterns(config.runs)
    configs = [read_config(folder) for folder in runs]
    setting = _setting(config, runs, configs[0])
    reference = setting.reference
    scored: list[Scored] = []
    trained: list[compare.TrainedRewardModel] = []
    bounds: dict[str, Study] = {}
    with (
        progress_bar("scoring", len(runs) + bool(config.rollouts)) as bar,
        autocast(reference.device, config.engine.precision),
    ):
        for number, (folder, its) in enumerate(zip(runs, configs, strict=True), 1):
            loss, lm = get_loss(its["loss"]), load_run(folder, config.checkpoint, config.engine).lm
            score: Score
            if loss.is_value_model:
                score = partial(
                    compare.score_with_value_model, folder.name, ValueModel(lm), batch_size=config.batch_size
                )
                scored.append(setting.scored(score))
            else:
                reward = _implicit_reward(setting, lm, its["beta"])
                score = partial(compare.score_with_implicit_reward, folder.name, reward, batch_size=config.batch_size)
                scored.append(setting.scored(score))
                bounds[folder.name] = compare.bounds(reward, setting.answers, seed=config.seed)
            trained.append(_training(folder, loss))
            bar(number, folder.name)
        if config.rollouts:
            options = {"rollouts": config.rollouts, "seed": config.seed}
            scored.append(setting.scored(partial(compare.score_with_rollouts, reference, setting.judge, **options)))
            bar(len(runs) + 1, "rollouts")

    learned_from = read_answers(configs[0]["data"]["train"], reference, skip=True)
    parameters = sum(weight.numel() for weight in reference.parameters())
    rollouts = scored[-1].steps[1] if config.rollouts else None
    count = len(compare.all_completions(setting.step_answers[1]))
    studies = [
        compare.selections(setting.answers, [one.answers for one in scored], setting.judge, SIZES),
        compare.costs(trained, learned_from, parameters, rollouts, count),
    ]
    if hasattr(setting.judge.task, "first_wrong"):
        studies.append(compare.error_localisation(*setting.step_answers, [one.steps for one in scored], setting.judge))
    studies.append(compare.all_bounds(bounds))
    _write(studies, Path(config.output) if config.output else common_folder(runs), configs[0]["name"])
    return 0


def _setting(config: CompareConfig, runs: Sequence[Path], first: dict[str, Any]) -> Setting:
    """Raises ValueError if the reward models started from different models."""
    inits = {str(reference_of(folder)) for folder in runs}
    if len(inits) != 1:
        raise ValueError(f"The reward models started from different models: {', '.join(sorted(inits))}.")
    [init] = inits
    reference = to_float32(LatentLM.from_pretrained(init)).to(set_up_device(config.engine))
    reference.acceleration.mechanisms = config.engine.mechanisms
    task = TASKS[str(read_config(run_folder_of(init))["data"]["task"])]
    skip = config.too_long is TooLong.skip
    answers = read_answers(config.answers, reference, skip, whole_questions=True)
    development = read_answers(config.development or first["data"]["valid"], reference, skip, whole_questions=True)
    first_development, first_answers = (
        compare.first_answers(labelled, config.num_step_questions) for labelled in (development, answers)
    )
    judge = CorrectnessReward(task, reference.reasoning.format)
    return Setting(init, reference, judge, answers, (first_development, first_answers))


def _implicit_reward(setting: Setting, lm: LatentLM, beta: float) -> ImplicitReward:
    """Against the common reference, or a copy of it where the model has other dtypes."""
    reference = setting.reference
    alike = all(a.dtype is b.dtype for a, b in zip(reference.parameters(), lm.parameters(), strict=True))
    if not alike:
        reference = match_dtypes(LatentLM.from_pretrained(setting.init), lm, reference.device)
    return ImplicitReward(lm, reference, beta)


def _training(folder: Path, loss: Loss) -> compare.TrainedRewardModel:
    """What a run's updates took."""
    rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
    seconds, items = (sum(row[key] for row in rows) for key in ("seconds", "items"))
    return compare.TrainedRewardModel(
        folder.name,
        seconds,
        int(items) * (2 if loss.pairs else 1),
        uses_reference=not loss.is_value_model,
        uses_reference_point=loss.uses_reference_point,
    )


def _write(studies: Sequence[Study], folder: Path, name: str) -> None:
    for study in studies:
        study.write(folder)
    log(report.on_screen(studies))
    page = folder / "comparison.html"
    write_text(page, report.comparison_page(studies, name, folder))
    log(f"Page: {page}\nData: {folder}")
