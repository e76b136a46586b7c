"""The schemas of python -m coconut.rollout and python -m coconut.reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import (
    SPLITS,
    AdamWConfig,
    DataFiles,
    EngineConfig,
    LaunchConfig,
    RunConfig,
    TooLong,
    Unreadable,
    at_least,
    needs_run,
    refuse_cuda_graphs,
)
from coconut.rewards.losses import get_loss
from coconut.utils.overrides import PathName


@dataclass
class RolloutConfig:
    """Sample completions from a run's model for the questions of one split, judge them, and write them to a file."""

    run: PathName = ""
    checkpoint: str = "best"
    split: str = "train"
    data: DataFiles = field(default_factory=DataFiles)
    output: PathName = ""  # by default RUN/rollouts/SPLIT.jsonl
    samples: int = 8  # completions of each question
    temperature: float = 1.0
    mode: str | None = None  # the mode to force on a hybrid model
    max_new_tokens: int | None = None
    limit: int | None = None  # use only the first `limit` questions
    too_long: TooLong = TooLong.error  # for questions that leave no room for an answer in the model's context
    unreadable: Unreadable = Unreadable.error  # for gold answers that would be judged wrong
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


@dataclass
class RewardModelConfig(RunConfig):
    """Train a reward model. `init`, a run or a checkpoint, is both its starting point and its reference model.

    `data.train` and `data.valid` are files of labelled completions; `data.too_long` applies to a completion with its
    prompt.
    """

    loss: str = "ce"  # of coconut.rewards.losses.LOSSES
    beta: float = 0.05
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=5e-7))
    epochs: int = 1
    batch_size: int = 64  # completions of an update, over all processes
    validate_every: int = 0  # updates; 0: at the end of each epoch
    save_every: int = 0  # updates between further checkpoints; 0: only with each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", self, epochs=1, batch_size=2, micro_batch_size=2, validate_every=0, save_every=0)
        get_loss(self.loss)
        refuse_cuda_graphs(self.engine, "a reward model")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0, since it scales the reward.")
        if not self.init:
            raise ValueError("Name the model to start from, a run or a checkpoint; it is also the reference: init=RUN.")

    @property
    def kind(self) -> str:
        return self.loss


@dataclass
class CompareConfig:
    """Compare reward models on the same completions."""

    runs: list[PathName] = field(default_factory=list)  # runs of coconut.reward with the same init
    answers: PathName = ""  # a file of labelled completions, with equally many for each question
    development: PathName = ""  # a file for choosing thresholds; by default the first run's validation file
    checkpoint: str = "best"
    rollouts: int = 0  # Monte Carlo rollouts from each step; 0: none
    num_step_questions: int = 100  # questions for finding first errors, with the first 8 completions of each
    too_long: TooLong = TooLong.error  # for a completion longer than the context; skip leaves out its whole question
    output: PathName = ""  # by default the common parent folder of the runs
    batch_size: int = 256
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("Name the reward models: runs=DIR,DIR,... or a pattern, such as runs='runs/rewards/ce*'.")
        if not self.answers:
            raise ValueError("Name the file of labelled completions: answers=FILE, such as coconut.rollout writes.")
        at_least("", self, rollouts=0, num_step_questions=1, batch_size=1, seed=0)
