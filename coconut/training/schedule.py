"""The schedule of a run: stage, epoch and batch of each update, as pure functions of its number."""

from __future__ import annotations

from dataclasses import dataclass

from coconut.config import Reset
from coconut.methods import Plan, Stage, Unit


@dataclass(frozen=True)
class StepPosition:
    """The update after `step` others. `batch` counts within the epoch, `epoch` over the whole run."""

    step: int
    stage: Stage
    stage_step: int
    epoch: int
    batch: int
    ends_epoch: bool
    ends_stage: bool
    in_last_stage: bool


@dataclass(frozen=True)
class Schedule:
    """All updates of a run."""

    plan: Plan
    updates_per_epoch: int

    def updates(self, stage: Stage) -> int:
        return stage.length * (self.updates_per_epoch if self.plan.unit is Unit.epochs else 1)

    @property
    def total(self) -> int:
        return sum(map(self.updates, self.plan.stages))

    def at(self, step: int) -> StepPosition:
        begin, epochs = 0, 0
        for stage in self.plan.stages:
            length = self.updates(stage)
            if step < begin + length:
                break
            begin += length
            epochs += -(-length // self.updates_per_epoch)
        else:
            raise IndexError(f"The run has {begin} updates, numbered from 0; there is no update {step}.")
        epoch, batch = divmod(step - begin, self.updates_per_epoch)
        ends_stage = step + 1 == begin + length
        return StepPosition(
            step=step,
            stage=stage,
            stage_step=step - begin,
            epoch=epochs + epoch,
            batch=batch,
            ends_epoch=ends_stage or batch + 1 == self.updates_per_epoch,
            ends_stage=ends_stage,
            in_last_stage=stage is self.plan.stages[-1],
        )


def updates_since_reset(position: StepPosition, reset: Reset) -> int:
    """Updates since the optimizer was last reset."""
    return {Reset.stage: position.stage_step, Reset.epoch: position.batch, Reset.never: position.step}[reset]
