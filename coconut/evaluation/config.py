"""Configuration of coconut evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import (
    SPLITS,
    DataFiles,
    EngineConfig,
    LaunchConfig,
    TaskName,
    TooLong,
    Unreadable,
    at_least,
    needs_run,
)
from coconut.generation.config import StopRule
from coconut.utils.overrides import PathName, Place


@dataclass
class EvaluateConfig:
    run: Place = ""  # a run, or a saved model: a folder, or OWNER/NAME on the hub
    checkpoint: str = "best"  # best, last, or the number of an update
    split: str = "test"
    data: DataFiles = field(default_factory=DataFiles)
    task: TaskName | None = None  # of a saved model, which does not record it; a run does
    output: PathName = ""  # a folder; by default RUN/evaluation, or evaluation/NAME for a saved model
    num_thoughts: int | None = None  # by default as trained
    stop: StopRule = StopRule.constant
    mode: str | None = None  # force a mode of a hybrid model
    max_new_tokens: int | None = None
    batch_size: int = 64
    limit: int | None = None  # evaluate the first `limit` questions
    too_long: TooLong = TooLong.error  # a question that leaves no room for an answer in the model's context
    unreadable: Unreadable = Unreadable.error  # a gold answer that would be judged wrong
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, num_thoughts=0, max_new_tokens=1, batch_size=1, limit=1)
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; it is one of {', '.join(SPLITS)}.")
        for other in SPLITS:
            if other != self.split and getattr(self.data, other):
                raise ValueError(f"data.{other} is given but split={self.split} is evaluated. Add split={other}.")
