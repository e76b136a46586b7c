"""Say what a training will cost before it starts: real updates on throw-away weights, which nothing keeps."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from coconut.config import TRAINING_SPLITS, TrainConfig, make_paths_absolute
from coconut.data.batching import Batch, epoch_batches, micro_batches
from coconut.data.datasets import data_files
from coconut.data.sequences import EpochView
from coconut.engine.base import peak_memory
from coconut.engine.world import World
from coconut.evaluation.evaluator import evaluate
from coconut.methods import Stage
from coconut.training.launch import on_processes
from coconut.training.schedule import Schedule
from coconut.training.trainer import Trainer
from coconut.utils.console import duration, log
from coconut.utils.torch_utils import eval_mode

MEASURED_STAGES = 6  # of a plan with more, the costs of the others are interpolated
QUANTILES = (0.25, 0.75)  # of an epoch's whole batches by their longest rows: the two that stand for all


@dataclass(frozen=True)
class StageCost:
    """Seconds of an update in a stage, of two middling batches and of the longest rows, and the peak memory in GiB."""

    stage: Stage
    seconds: float
    longest: float
    memory: float


@dataclass(frozen=True)
class RunCost:
    """What a run costs. `updates`: of each stage. `validation`: seconds of one, if no answer ends before its limit.

    `memory`: the peak of updates and validations in GiB.
    """

    stages: tuple[Stage, ...]
    updates: tuple[int, ...]
    measured: tuple[StageCost, ...]
    validations: int
    validation: float
    memory: float

    @property
    def seconds_per_update(self) -> list[float]:
        """Of each stage. Between measured stages it is interpolated."""
        places = [self.stages.index(cost.stage) for cost in self.measured]
        return np.interp(range(len(self.stages)), places, [cost.seconds for cost in self.measured]).tolist()

    @property
    def training(self) -> float:
        """Seconds of all updates."""
        return sum(seconds * count for seconds, count in zip(self.seconds_per_update, self.updates, strict=True))

    def describe(self) -> str:
        """In a few lines, the outcome last."""
        lines = []
        for cost in self.measured:
            count = self.updates[self.stages.index(cost.stage)]
            lines.append(
                f"  stage {cost.stage.index}: {count:,} updates of {cost.seconds:.2g} s, with the longest rows "
                f"{cost.longest:.2g} s; {cost.stage.describe()}"
            )
        if len(self.measured) < len(self.stages):
            lines.append(f"  and {len(self.stages) - len(self.measured)} stages between these")
        total, whole = sum(self.updates), self.training + self.validations * self.validation
        lines += [
            f"  {self.validations:,} validations of about {duration(self.validation)}, less when answers are short",
            f"An update takes {self.training / total:.2g} s here, the {total:,} updates about "
            f"{duration(self.training)}, with validations about {duration(whole)}. Peak memory {self.memory:.1f} GiB.",
        ]
        return "\n".join(lines)


def run(config: TrainConfig, world: World | None = None) -> int:
    """Measure what a run costs, and print it. Nothing is written but data and tokens in the cache.

    A run in the folder of the configuration is left alone: what is measured is the whole run. Returns the exit status.
    """
    return on_processes(config, lambda world: _measure(config, world), "coconut.train", world)


def _measure(config: TrainConfig, world: World) -> int:
    make_paths_absolute(config)
    files = world.on_main_process(lambda: data_files(asdict(config.data), TRAINING_SPLITS))
    with tempfile.TemporaryDirectory() as empty:
        trainer = Trainer(config, Path(empty) / "none", files, world)
        trainer.log_summary()
        trainer.dry_run()
        log("Dry run: updates of the longest rows and of middling ones, on weights that are thrown away")
        log(run_cost(trainer).describe())
    return 0


def run_cost(trainer: Trainer) -> RunCost:
    """Do three updates in each stage, and answer a batch of validation questions in the first and the last one.

    The learning rate is 0, so that the weights stay. Every process of a run calls this.
    """
    schedule, stages = trainer.schedule, trainer.plan.stages
    places = np.unique(np.linspace(0, len(stages) - 1, MEASURED_STAGES).round().astype(int)).tolist()
    measured = tuple(_stage_cost(trainer, stages[i]) for i in places)
    validation = max(_validation_seconds(trainer, stages[i]) for i in {0, len(stages) - 1})
    count = num_validations(schedule, trainer.config.validate_every)
    memory = max(peak_memory(trainer.engine.device), *(cost.memory for cost in measured))
    return RunCost(tuple(stages), tuple(map(schedule.updates, stages)), measured, count, validation, memory)


def num_validations(schedule: Schedule, every: int) -> int:
    """Of a whole run: after each stage, and every so many updates or, with 0, after each epoch."""
    positions = map(schedule.at, range(schedule.total))
    return sum(at.ends_stage or ((at.step + 1) % every == 0 if every else at.ends_epoch) for at in positions)


def _stage_cost(trainer: Trainer, stage: Stage) -> StageCost:
    config = trainer.config
    view = EpochView(trainer.train, trainer.plan, stage, trainer.lm.special, config.seed, epoch=0)
    batches = epoch_batches(view, config.batch_size, config.seed, epoch=0)
    full = [batch for batch in batches if len(batch) == max(map(len, batches))]
    by_length = sorted(full, key=lambda batch: int(view.longest[batch].max()))
    longest = np.argsort(-view.longest, kind="stable")[: config.batch_size]
    trainer.lm.reasoning = trainer.reasoning_in(stage)
    trainer.engine.reset_optimizer()
    first = _update_seconds(trainer, view, longest)
    middling = [by_length[int(q * (len(by_length) - 1))] for q in QUANTILES]
    seconds = [_update_seconds(trainer, view, batch) for batch in middling]
    return StageCost(stage, sum(seconds) / len(seconds), first, peak_memory(trainer.engine.device))


def _update_seconds(trainer: Trainer, view: EpochView, batch: np.ndarray) -> float:
    world, begin = trainer.world, time.perf_counter()
    world.set_activity("in a dry run")
    parts: list[Batch] = list(micro_batches(view, batch, trainer.micro_batch_size, world.rank, world.size))
    trainer.engine.update(parts, lr=0.0)
    return time.perf_counter() - begin


def _validation_seconds(trainer: Trainer, stage: Stage) -> float:
    """Of a whole validation, from one batch of its answers, which a model that has learned nothing does not end."""
    config, rows = trainer.config, trainer.valid_examples
    size = min(config.eval_batch_size * trainer.world.size, len(rows))
    with trainer.engine.full_module() as module, trainer.engine.autocast(), eval_mode(module.lm):
        module.lm.reasoning = trainer.reasoning_in(stage)
        begin = time.perf_counter()
        evaluate(module.lm, trainer.task, rows[:size], batch_size=config.eval_batch_size, world=trainer.world)
        return (time.perf_counter() - begin) * len(rows) / size
