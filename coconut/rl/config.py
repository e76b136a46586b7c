"""The schema of python -m coconut.rl."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import AdamWConfig, RunConfig, at_least, refuse_cuda_graphs
from coconut.rl.objectives import Objective, get_objective
from coconut.utils.overrides import Place


@dataclass
class ObjectiveConfig:
    """`name` of coconut.rl.objectives.OBJECTIVES; what is null is as that one has it.

    `control`: the weight of a hybrid model's control token, in a term of its own. `slowed`: what the control token's
    weight is multiplied by. `low`, `high`: how far the ratio of probabilities may fall and rise. `scaled`: divide
    advantages by their group's standard deviation. `beta`: weight of the divergence from the model that the run
    started from; 0 keeps none.
    """

    name: str = "degrpo"
    control_token_weight: float | None = None
    control_token_scale: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    normalize_advantages: bool | None = None
    kl_coef: float = 0.001

    def __post_init__(self) -> None:
        at_least("objective.", self, control_token_weight=0, control_token_scale=0, clip_low=0, clip_high=0, kl_coef=0)
        self.built()

    def built(self) -> Objective:
        changes = {
            name: getattr(self, name)
            for name in ("control_token_weight", "control_token_scale", "clip_low", "clip_high", "normalize_advantages")
        }
        return get_objective(self.name, **changes)


@dataclass
class RewardConfig:
    """1 for a right answer less the cost of its mode, `wrong` for any other. A mode that is not named costs nothing.

    `limits`: the most new tokens of a mode; a longer answer earns `wrong`.
    """

    mode_costs: dict[str, float] = field(default_factory=dict)
    incorrect_reward: float = -1.0
    max_mode_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode, cost in self.mode_costs.items():
            if cost != cost or abs(cost) == float("inf"):
                raise ValueError(f"reward.mode_costs.{mode} is {cost}; it must be a number.")
        for mode, limit in self.max_mode_tokens.items():
            if limit < 1:
                raise ValueError(f"reward.max_mode_tokens.{mode} is {limit}; it must be at least 1.")


@dataclass
class ProcessRewardConfig:
    """A reward for each token, beta log pi_phi/pi_ref, of a model that learns beside the policy (arXiv 2502.01456).

    `weight`: of these rewards in the advantages, beside those of whole answers; 0: none. `init`: a run of
    coconut.reward or a checkpoint of one, with its reference; by default reward model and reference are what the policy
    starts from. `online`: it learns from each batch which answers are right; if false, it stays as it is. `between`:
    learn only from questions whose share of right answers lies strictly within these two, with weight 0 too.
    """

    weight: float = 0.0
    init: Place | None = None
    beta: float = 0.05
    online: bool = True
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=1e-6))
    accuracy_range: list[float] | None = None

    def __post_init__(self) -> None:
        at_least("process_reward.", self, weight=0)
        if not self.beta > 0:
            raise ValueError(
                f"process_reward.beta is {self.beta}; it must be above 0, since it is what a reward is measured in."
            )
        if not self.weight and (self.init or not self.online):
            key = f"init={self.init}" if self.init else "online=false"
            raise ValueError(
                f"process_reward.{key} has no effect, since process_reward.weight is 0. Set process_reward.weight, "
                "for example to 1."
            )
        if not self.online and not self.init:
            raise ValueError(
                "process_reward.online=false leaves a reward model that equals its reference, which rewards "
                "nothing. Name a "
                "trained one: process_reward.init=RUN, a run of python -m coconut.reward."
            )
        if self.accuracy_range is not None and not (
            len(self.accuracy_range) == 2 and 0 <= self.accuracy_range[0] < self.accuracy_range[1] <= 1
        ):
            raise ValueError(
                f"process_reward.accuracy_range is {self.accuracy_range}; it is two shares of right answers, the "
                "lower one first, such as "
                "[0.2,0.8]."
            )


@dataclass
class RLConfig(RunConfig):
    """`init`, a run or a checkpoint, is the policy before its first update, and its reference."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    process_reward: ProcessRewardConfig = field(default_factory=ProcessRewardConfig)
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=1e-6))
    num_steps: int = 100  # of rollouts, each learned from and thrown away
    prompts_per_step: int = 128  # a batch, over all processes
    group_size: int = 8  # answers to each question
    temperature: float = 1.0
    num_minibatches: int = 1  # updates that the questions of a batch are divided into
    num_iterations: int = 1  # times that a batch is gone through
    drop_zero_variance_groups: bool = False  # groups whose answers were rewarded alike leave the denominators too
    rollout_batch_size: int = 64  # questions that are answered at once, by one process
    validate_every: int = 10  # batches; always before the first and after the last
    save_every: int = 0  # batches between further checkpoints; 0: only with each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.judged()
        at_least("", self, num_steps=1, prompts_per_step=1, num_minibatches=1, num_iterations=1, rollout_batch_size=1,
                 micro_batch_size=1, validate_every=1, save_every=0)  # fmt: skip
        refuse_cuda_graphs(self.engine, "a policy")
        if not self.init:
            raise ValueError(
                "Name the model to start from, a run or a checkpoint: init=RUN. One that chooses how to answer is made "
                "by python -m coconut.train method=hybrid_warmup."
            )
        if self.group_size < 2:
            raise ValueError(
                f"samples is {self.group_size}. An answer is compared with the others to its question: take 2 or more."
            )
        if self.process_reward.weight and self.objective.built().normalize_advantages:
            raise ValueError(
                f"objective.name={self.objective.name} divides advantages by their group's deviation, which those of "
                "dense rewards are not. Set objective.normalize_advantages=false."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; answers are sampled, so it must be above 0.")
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} is more than there are questions in a batch, "
                f"{self.prompts_per_step}."
            )

    @property
    def kind(self) -> str:
        return self.objective.name

    @property
    def on_policy(self) -> bool:
        """Whether every update is of answers that its own weights gave."""
        return self.num_minibatches == self.num_iterations == 1
