"""The schema of python -m coconut.rl."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import AdamWConfig, RunConfig, at_least
from coconut.rl.objectives import Objective, objective_named


@dataclass
class ObjectiveConfig:
    """`name` of coconut.rl.objectives.OBJECTIVES; what is null is as that one has it.

    `control`: the weight of a hybrid model's control token, in a term of its own. `slowed`: what the control token's
    weight is multiplied by. `low`, `high`: how far the ratio of probabilities may fall and rise. `scaled`: divide
    advantages by their group's standard deviation. `beta`: weight of the divergence from the model that the run
    started from; 0 keeps none.
    """

    name: str = "degrpo"
    control: float | None = None
    slowed: float | None = None
    low: float | None = None
    high: float | None = None
    scaled: bool | None = None
    beta: float = 0.001

    def __post_init__(self) -> None:
        at_least("objective.", self, control=0, slowed=0, low=0, high=0, beta=0)
        self.built()

    def built(self) -> Objective:
        changes = {name: getattr(self, name) for name in ("control", "slowed", "low", "high", "scaled")}
        return objective_named(self.name, **changes)


@dataclass
class RewardConfig:
    """1 for a right answer less the cost of its mode, `wrong` for any other. A mode that is not named costs nothing.

    `limits`: the most new tokens of a mode; a longer answer earns `wrong`.
    """

    costs: dict[str, float] = field(default_factory=dict)
    wrong: float = -1.0
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode, cost in self.costs.items():
            if cost != cost or abs(cost) == float("inf"):
                raise ValueError(f"reward.costs.{mode} is {cost}; it must be a number.")
        for mode, limit in self.limits.items():
            if limit < 1:
                raise ValueError(f"reward.limits.{mode} is {limit}; it must be at least 1.")


@dataclass
class RLConfig(RunConfig):
    """`init`, a run or a checkpoint, is the policy before its first update, and its reference."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=1e-6))
    batches: int = 100  # of rollouts, each learned from and thrown away
    questions: int = 128  # a batch, over all processes
    samples: int = 8  # answers to each question
    temperature: float = 1.0
    num_minibatches: int = 1  # updates that the questions of a batch are divided into
    num_iterations: int = 1  # times that a batch is gone through
    drop_without_variance: bool = False  # groups whose answers were rewarded alike leave the denominators too
    rollout_batch_size: int = 64  # questions that are answered at once, by one process
    micro_batch_size: int | None = None  # answers a forward pass of one process; by default its whole share
    validate_every: int = 10  # batches; always before the first and after the last
    save_every: int = 0  # batches between further checkpoints; 0: only with each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", self, batches=1, questions=1, num_minibatches=1, num_iterations=1, rollout_batch_size=1,
                 micro_batch_size=1, validate_every=1, save_every=0)  # fmt: skip
        if not self.init:
            raise ValueError(
                "Name the model to start from, a run or a checkpoint: init=RUN. One that chooses how to answer is made "
                "by python -m coconut.train method=hybrid_warmup."
            )
        if self.samples < 2:
            raise ValueError(
                f"samples is {self.samples}. An answer is compared with the others to its question: take 2 or more."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; answers are sampled, so it must be above 0.")
        if self.num_minibatches > self.questions:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} is more than there are questions in a batch, {self.questions}."
            )

    @property
    def on_policy(self) -> bool:
        """Whether every update is of answers that its own weights gave."""
        return self.num_minibatches == self.num_iterations == 1
