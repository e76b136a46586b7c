"""Evaluate a model on a file: select the rows, answer them, judge the answers, write them down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.examples import Example
from coconut.engine.base import autocast
from coconut.engine.world import World
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.evaluator import EvalResult, Prediction, describe, evaluate
from coconut.evaluation.record import describe_settings, write_evaluation
from coconut.evaluation.sampling import (
    AnswerScorer,
    SampledAnswers,
    SampledResult,
    describe_samples,
    evaluate_samples,
)
from coconut.evaluation.selection import Selection, select_examples, warn_of_questions
from coconut.generation.thoughts import StopCriterion
from coconut.tasks import Task
from coconut.utils.console import log, progress_bar

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class FileEvaluator:
    """A loaded model, with the settings by which it is evaluated on files.

    `step`: the update of its checkpoint, None for a saved model. `stop`: a criterion that ends thinking early.
    `folder`: where results are written. `cache_dir`: of tokenized data. `scorer`: chooses among sampled answers.
    """

    lm: LatentLM
    step: int | None
    stop: StopCriterion | None
    config: EvaluateConfig
    folder: Path
    cache_dir: str | None
    world: World
    scorer: AnswerScorer | None = None

    def with_limit(self, max_new_tokens: int | None) -> FileEvaluator:
        """The same with this limit of new tokens, if the configuration has none."""
        limit = self.config.max_new_tokens or max_new_tokens
        return replace(self, config=replace(self.config, max_new_tokens=limit))

    def select(self, examples: Sequence[Example], task: Task, file: str) -> Selection:
        """The rows that can be answered and judged. Raises ValueError as `select_examples` does."""
        return select_examples(
            self.lm, examples, task, self.config, file=file, cache_dir=self.cache_dir, world=self.world
        )

    def evaluate(
        self, name: str, selected: Selection, task: Task, *, file: str, left_out: int, **more: Any
    ) -> dict[str, Any]:  # fmt: skip
        """Answer the selected rows of a file and judge the answers. Returns the record of NAME.json, which it writes.

        `left_out`: how many rows of the file are not selected. `more`: further entries of the record.
        """
        config, world = self.config, self.world
        which = describe_settings(self.lm.reasoning, config) + ("" if self.step is None else f", update {self.step}")
        log(f"Evaluating {which}, on {len(selected.examples)} questions of {file}")
        warn_of_questions(self.lm, selected, config, file)
        if config.samples > 1 and not (config.sampling and config.sampling.is_random):
            log(
                f"warning: all {config.samples} answers are the greedy one. Set temperature, thought_noise or "
                "thought_dropout."
            )
        with progress_bar("evaluating", -(-len(selected.examples) // world.size)) as bar:
            result, predictions = self._answer(
                selected, task, config.batch_size, world,
                lambda done, correct: bar(done, f"accuracy so far {100 * correct / done:.1f} %"),
            )  # fmt: skip
        result.left_out = left_out
        log(describe_samples(result) if isinstance(result, SampledResult) else describe(result))
        return world.on_main_process(
            lambda: write_evaluation(
                self.folder, name, config, result, predictions, file=file, step=self.step,
                reasoning=self.lm.reasoning,
                max_new_tokens=config.max_new_tokens or self.lm.reasoning.max_new_tokens, **more,
            )
        )  # fmt: skip

    def seconds_at_batch_1(self, selected: Selection, task: Task, count: int) -> float | None:
        """Seconds a question for the first `count` questions, answered one by one by the main process; None for 0.

        One question is answered before, so that what happens once is not counted.
        """
        if not count:
            return None

        def measure() -> float:
            for part in (selected.first(1), selected.first(count)):
                seconds = self._answer(part, task, 1, World())[0].seconds_per_item
            return seconds

        return self.world.on_main_process(measure)

    def _answer(
        self, selected: Selection, task: Task, batch_size: int, world: World,
        on_batch: Callable[[int, int], None] = lambda done, correct: None,
    ) -> tuple[EvalResult, list[Prediction] | list[SampledAnswers]]:  # fmt: skip
        config = self.config
        options: dict[str, Any] = {
            "question_ids": selected.question_ids, "num_thoughts": config.num_thoughts, "stop": self.stop,
            "soft_thinking": config.soft, "mode": config.mode, "max_new_tokens": config.max_new_tokens,
            "batch_size": batch_size, "on_batch": on_batch, "world": world,
        }  # fmt: skip
        with autocast(self.lm.device, config.engine.precision):
            if sampling := config.sampling:
                return evaluate_samples(
                    self.lm, task, selected.examples, sampling, rows=selected.rows, scorer=self.scorer, **options
                )
            result, predictions, _ = evaluate(self.lm, task, selected.examples, **options)
        return result, predictions
