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


@dataclass
class RewardModelConfig(RunConfig):
    """`init`, a run or a checkpoint, is the reward model before its first update, and its reference.

    `data.train` and `data.valid` are files of labelled answers; `data.too_long` is of an answer with its question.
    """

    loss: str = "ce"  # of coconut.rewards.losses.LOSSES
    beta: float = 0.05
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=5e-7))
    epochs: int = 1
    batch_size: int = 64  # answers an update, over all processes
    validate_every: int = 0  # updates; 0: at the end of each epoch
    save_every: int = 0  # updates between further checkpoints; 0: only with each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", self, epochs=1, batch_size=2, micro_batch_size=2, validate_every=0, save_every=0)
        get_loss(self.loss)
        refuse_cuda_graphs(self.engine, "a reward model")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0, since it is what a reward is measured in.")
        if not self.init:
            raise ValueError(
                "Name the model to start from, a run or a checkpoint, which is the reference too: init=RUN."
            )

    @property
    def kind(self) -> str:
        return self.loss


@dataclass
class CompareConfig:
    """Reward models on the same sampled answers."""

    runs: list[PathName] = field(default_factory=list)  # that coconut.reward made from one model
    answers: PathName = ""  # a file of labelled answers, with equally many for each question
    development: PathName = ""  # other ones, that choose thresholds; by default the first run's validation answers
    checkpoint: str = "best"
    rollouts: int = 0  # Monte-Carlo rollouts from each step; 0: none
    num_step_questions: int = 100  # questions whose first errors are looked for, with the first 8 answers to each
    too_long: TooLong = TooLong.error  # an answer longer than the model's context; skip: with all of its question
    output: PathName = ""  # by default the folder that all runs lie in
    batch_size: int = 256
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("Name the reward models: runs=DIR,DIR,... or a pattern, such as runs='runs/rewards/ce*'.")
        if not self.answers:
            raise ValueError("Name the answers to choose among: answers=FILE, such as coconut.rollout writes.")
        at_least("", self, rollouts=0, num_step_questions=1, batch_size=1, seed=0)
