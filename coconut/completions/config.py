"""The schema of coconut rollout."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import SPLITS, DataFiles, EngineConfig, LaunchConfig, TooLong, Unreadable, at_least, needs_run
from coconut.utils.overrides import PathName


@dataclass
class RolloutConfig:
    """Answers sampled from a run's model to the questions of one of its splits, judged and written to a file."""

    run: PathName = ""
    checkpoint: str = "best"
    split: str = "train"
    data: DataFiles = field(default_factory=DataFiles)
    output: PathName = ""  # by default RUN/rollouts/SPLIT.jsonl
    samples: int = 8
    temperature: float = 1.0
    mode: str | None = None  # of a hybrid model: force it
    max_new_tokens: int | None = None
    limit: int | None = None  # the first so many questions
    too_long: TooLong = TooLong.error  # a question that leaves no room for an answer in the model's context
    unreadable: Unreadable = Unreadable.error  # a gold answer that would be judged wrong
    batch_size: int = 64
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, samples=1, max_new_tokens=1, limit=1, batch_size=1, seed=0)
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; answers are sampled, so it must be above 0.")
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; it is one of {', '.join(SPLITS)}.")
