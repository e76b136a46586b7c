"""coconut reward compare: score the same answers with several reward models, and write what each is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.analysis.comparable_runs import expand_patterns
from coconut.completions.rollouts import CorrectnessReward
from coconut.config import TooLong
from coconut.engine.base import autocast, set_up_device
from coconut.models.latent_lm import LatentLM
from coconut.reporting.run_table import common_folder
from coconut.rewards import compare, report
from coconut.rewards.config import CompareConfig
from coconut.rewards.implicit import ImplicitReward, reference_of
from coconut.rewards.labelled_answers import LabelledAnswers, all_completions, read_answers
from coconut.rewards.losses import get_loss
from coconut.rewards.value_model import ValueModel
from coconut.runs.description import read_config, read_metrics
from coconut.runs.loading import load_run, match_dtypes, run_folder_of, to_float32
from coconut.runs.study import Study
from coconut.tasks import TASKS
from coconut.utils.console import log, progress_bar, silence_libraries
from coconut.utils.files import write_text

SIZES = (1, 2, 4, 8, 16, 32, 64)  # numbers of answers to choose the best of
STEP_ANSWERS = 8  # the first answers of a question, whose first wrong steps are looked for


@dataclass(frozen=True)
class Setting:
    """What all scorers have in common: the reference and the answers."""

    init: str
    reference: LatentLM
    judge: CorrectnessReward
    answers: list[LabelledAnswers]
    step_answers: list[list[LabelledAnswers]]  # of the development answers and of the others


def compare_runs(config: CompareConfig) -> int:
    """Compare reward models that started from one model. Gives the exit status."""
    silence_libraries()
    runs = expand_patterns(config.runs)
    configs = [read_config(folder) for folder in runs]
    setting = _setting(config, runs, configs[0])
    reference, parts = setting.reference, [setting.answers, *setting.step_answers]
    scored: list[list[compare.ScorerResult]] = []  # for each scorer: of all answers, and of both `step_answers`
    trained: list[compare.TrainedRewardModel] = []
    bounds: dict[str, Study] = {}
    with (
        progress_bar("scoring", len(runs) + bool(config.rollouts)) as bar,
        autocast(reference.device, config.engine.precision),
    ):
        for number, (folder, its) in enumerate(zip(runs, configs, strict=True), 1):
            loss, lm = get_loss(its["loss"]), load_run(folder, config.checkpoint, config.engine).lm
            model = ValueModel(lm) if loss.is_value_model else _implicit_reward(setting, lm, its["beta"])
            scored.append([compare.score_with_model(folder.name, model, part, config.batch_size) for part in parts])
            if isinstance(model, ImplicitReward):
                bounds[folder.name] = compare.bounds(model, setting.answers, seed=config.seed)
            rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
            seconds, items = (sum(row[key] for row in rows) for key in ("seconds", "items"))
            trained.append(compare.TrainedRewardModel(folder.name, seconds, int(items), loss))
            bar(number, folder.name)
        if config.rollouts:
            scored.append([
                compare.score_with_rollouts(reference, setting.judge, part, config.rollouts, config.seed)
                for part in parts
            ])  # fmt: skip
            bar(len(runs) + 1, "rollouts")

    learned_from = read_answers(configs[0]["data"]["train"], reference, skip=True)
    parameters = sum(weight.numel() for weight in reference.parameters())
    rollouts = scored[-1][2] if config.rollouts else None
    count = len(all_completions(setting.step_answers[1]))
    studies = [
        compare.selections(setting.answers, [results[0] for results in scored], setting.judge, SIZES),
        compare.costs(trained, learned_from, parameters, rollouts, count),
    ]
    if hasattr(setting.judge.task, "first_wrong"):
        results_of_steps = [results[1:] for results in scored]
        studies.append(compare.error_localisation(setting.step_answers, results_of_steps, setting.judge))
    studies.append(compare.all_bounds(bounds))
    output = Path(config.output) if config.output else common_folder(runs)
    for study in studies:
        study.write(output)
    log(report.on_screen(studies))
    page = output / "comparison.html"
    write_text(page, report.comparison_page(studies, configs[0]["name"], output))
    log(f"Page: {page}\nData: {output}")
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
    step_answers = [
        [row.select([True] * STEP_ANSWERS) for row in labelled[: config.num_step_questions]]
        for labelled in (development, answers)
    ]
    return Setting(init, reference, CorrectnessReward(task, reference.reasoning.format), answers, step_answers)


def _implicit_reward(setting: Setting, lm: LatentLM, beta: float) -> ImplicitReward:
    """Against the common reference, or a copy of it where the model has other dtypes."""
    reference = setting.reference
    if any(a.dtype is not b.dtype for a, b in zip(reference.parameters(), lm.parameters(), strict=True)):
        reference = match_dtypes(LatentLM.from_pretrained(setting.init), lm, reference.device)
    return ImplicitReward(lm, reference, beta)
