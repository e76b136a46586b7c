"""The schemas of coconut reward and coconut reward compare."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import AdamWConfig, EngineConfig, RunConfig, TooLong, at_least, refuse_cuda_graphs
from coconut.utils.overrides import PathName


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

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", self, epochs=1, batch_size=2, micro_batch_size=2, validate_every=0)
        from coconut.rewards.losses import get_loss  # imports torch, which --help does without

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
