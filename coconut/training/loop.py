"""The loop that all trainers share: step, log, validate if due, save if due, stop if asked to."""

from __future__ import annotations

import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from coconut.config import RunConfig
from coconut.engine.world import World
from coconut.evaluation.evaluator import EvaluationInterrupted
from coconut.runs.description import DESCRIPTION
from coconut.runs.state import TrainingState
from coconut.runs.tracking import Tracking, open_tracking
from coconut.training.signals import StopRequest, handle_stop_signals
from coconut.utils.console import duration, log, progress_bar
from coconut.utils.files import read_json


class AnyTrainer(Protocol):
    """What the loop needs of a trainer."""

    folder: Path
    world: World
    training_state: TrainingState
    unit: str  # what a step is called in messages
    step: int  # steps done
    pending: bool  # a validation after this step is due and not done

    @property
    def config(self) -> RunConfig: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def next_command(self) -> str: ...

    def log_summary(self) -> None:
        """Log what is trained, and on what."""
        ...

    def dry_run(self) -> None:
        """Run the largest micro-batch without an update."""
        ...

    def describe(self, session: dict[str, Any]) -> None:
        """Write run.json, config.json and the models that the run needs again. Main process only."""
        ...

    def resume(self) -> None: ...
    def save(self) -> None: ...

    def train_step(self) -> dict[str, Any]:
        """Do the next step, and return its row of metrics.jsonl."""
        ...

    def progress(self, row: dict[str, Any]) -> str: ...
    def validation_due(self) -> bool: ...

    def validate(self, track: Tracking, stop: StopRequest) -> str:
        """Validate, log, update the best checkpoint, and return the result as text.

        Raises EvaluationInterrupted in all processes, with nothing logged, if one of them has received a stop signal.
        """
        ...

    def finish(self, track: Tracking) -> str:
        """Describe the best checkpoint, after the last step."""
        ...


def run_loop(trainer: AnyTrainer) -> int:
    """Train from the current step to the last one, or until a stop signal. Returns the exit status."""
    num_steps, unit, config = trainer.num_steps, trainer.unit, trainer.config
    first_step, start_time, stop_signal = trainer.step, time.monotonic(), 0
    with (
        handle_stop_signals(trainer.world) as stop,
        _open_tracking(trainer) as track,
        progress_bar("training", num_steps, trainer.step) as bar,
    ):
        if trainer.pending:
            if result := _validate(trainer, track, stop):
                log(f"  {unit} {trainer.step:>6,} of {num_steps:,}  {result}")
            trainer.save()
            stop_signal = stop.anywhere()
        while trainer.step < num_steps and not stop_signal:
            row = trainer.train_step()
            trainer.step += 1
            track.log("train", trainer.step, **row)
            bar(trainer.step, trainer.progress(row))
            validation_due = trainer.pending = trainer.validation_due()
            if validation_due and not stop.anywhere() and (result := _validate(trainer, track, stop)):
                seconds = time.monotonic() - start_time
                left = seconds / (trainer.step - first_step) * (num_steps - trainer.step)
                log(
                    f"  {unit} {trainer.step:>6,} of {num_steps:,}  {trainer.progress(row)}  {result}  "
                    f"{duration(seconds)} so far, about {duration(left)} left"
                )
            stop_signal = stop.anywhere()
            multiples = config.save_every, config.keep_every
            if validation_due or stop_signal or any(every and trainer.step % every == 0 for every in multiples):
                trainer.save()
        if stop_signal:
            name = signal.Signals(stop_signal).name
            log(f"Stopped by {name}; saved at {unit} {trainer.step}. The same command resumes from here.")
            return 128 + stop_signal
        best = trainer.finish(track)
    log(f"Done: {num_steps:,} {unit}s in {trainer.folder}")
    if best:
        log(f"Best checkpoint: {best} on validation data")
    log(f"Next: {trainer.next_command}")
    return 0


def _validate(trainer: AnyTrainer, track: Tracking, stop: StopRequest) -> str:
    """The result of a validation. If a stop signal interrupts it, it stays pending and the result is empty."""
    try:
        result = trainer.validate(track, stop)
    except EvaluationInterrupted:
        return ""
    trainer.pending = False
    return result


def _open_tracking(trainer: AnyTrainer) -> Tracking:
    config, is_main = trainer.config, trainer.world.is_main
    about = {"config": asdict(config), **(read_json(trainer.folder / DESCRIPTION) if is_main else {})}
    step = trainer.step if trainer.training_state.resume_from else -1  # a new run drops all rows of an earlier attempt
    return open_tracking(config.tracking, trainer.folder, step, about, writes=is_main)
