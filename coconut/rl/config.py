"""The configuration schema of coconut rl."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from coconut.config import AdamWConfig, EngineKind, RunConfig, at_least, refuse_cuda_graphs
from coconut.rl.objectives import Objective, get_objective
from coconut.utils.overrides import Place


@dataclass
class ObjectiveConfig:
    """An entry of coconut.rl.objectives.OBJECTIVES by `name`, and overrides of its fields; null overrides nothing.

    kl_coef: KL coefficient; the reference model is the one that the run started from. With 0 no reference is loaded.
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
        self.build()

    def build(self) -> Objective:
        names = ("control_token_weight", "control_token_scale", "clip_low", "clip_high", "normalize_advantages")
        return get_objective(self.name, **{name: getattr(self, name) for name in names})


@dataclass
class RewardConfig:
    """1 minus the mode's cost for a right answer, `incorrect_reward` for a wrong one. An unnamed mode costs nothing.

    `max_mode_tokens`: the most new tokens of a mode; a longer completion earns `incorrect_reward`.
    """

    mode_costs: dict[str, float] = field(default_factory=dict)
    incorrect_reward: float = -1.0
    max_mode_tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode, cost in self.mode_costs.items():
            if not math.isfinite(cost):
                raise ValueError(f"reward.mode_costs.{mode} is {cost}; it must be a finite number.")
        for mode, limit in self.max_mode_tokens.items():
            if limit < 1:
                raise ValueError(f"reward.max_mode_tokens.{mode} is {limit}; it must be at least 1.")


@dataclass
class ProcessRewardConfig:
    """Token rewards beta log pi_phi/pi_ref from a reward model that is trained beside the policy (arXiv 2502.01456).

    weight: of these rewards in the advantages, beside those of whole completions; 0: no process reward.
    init: a run of coconut.reward or a checkpoint of one, with its reference; by default reward model and reference are
        the policy's starting point.
    online: whether the reward model is updated with the correctness labels of each step.
    accuracy_range: learn only from questions whose share of right completions lies strictly between these two. Applies
        with weight 0, too.
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
            raise ValueError(f"process_reward.beta is {self.beta}; it must be above 0, since it scales the reward.")
        if not self.weight and (self.init or not self.online):
            key = f"init={self.init}" if self.init else "online=false"
            raise ValueError(
                f"process_reward.{key} has no effect, since process_reward.weight is 0. Set process_reward.weight, "
                "for example to 1."
            )
        if not self.online and not self.init:
            raise ValueError(
                "process_reward.online=false without process_reward.init gives a reward model that equals its "
                "reference, so all its rewards are 0. Name a trained one: process_reward.init=RUN, a run of "
                "coconut reward."
            )
        if self.accuracy_range is not None and not (
            len(self.accuracy_range) == 2 and 0 <= self.accuracy_range[0] < self.accuracy_range[1] <= 1
        ):
            raise ValueError(
                f"process_reward.accuracy_range is {self.accuracy_range}; it must be two shares of right completions, "
                "the lower one first, such as [0.2,0.8]."
            )


@dataclass
class GatesConfig:
    """Gates that mix what the policy expected into the words of its chain (HRPO, arXiv 2505.18454; models/gates.py).

    lr, lambda_lr: learning rates of their layers and of their decay Lambda; they warm up with the policy's.
    min, max: where the gates start: what they keep of a word, if nothing else closes them.
    """

    enabled: bool = False
    lr: float = 1e-4
    lambda_lr: float = 1e-3
    min: float = 0.99
    max: float = 0.999

    def __post_init__(self) -> None:
        for name in ("lr", "lambda_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"gates.{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 < self.min < self.max < 1:
            raise ValueError(f"gates.min={self.min} and gates.max={self.max} must be in (0, 1), the lower one first.")

    def lr_factors(self, lr: float) -> dict[str, float]:
        """What the policy's learning rate `lr` is multiplied by, for the parameters of the gates."""
        return {"gates.Lambda": self.lambda_lr / lr, "gates.": self.lr / lr}


@dataclass
class RLConfig(RunConfig):
    """Train a policy. `init`, a run or a checkpoint, is both its starting point and its reference model."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    process_reward: ProcessRewardConfig = field(default_factory=ProcessRewardConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=1e-6))
    num_steps: int = 100  # each samples completions and learns from them
    prompts_per_step: int = 128  # over all processes
    group_size: int = 8  # completions of each question
    temperature: float = 1.0
    thought_noise: float = 0.0  # standard deviation of thoughts, drawn and trained like words; 0: they are not drawn
    num_minibatches: int = 1  # updates in one pass over a step's batch
    num_iterations: int = 1  # passes over a step's batch
    drop_zero_variance_groups: bool = False  # leave groups with equal rewards out of the loss and its denominators
    rollout_batch_size: int = 64  # questions sampled at once by one process
    validate_every: int = 10  # steps; always before the first and after the last

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.required_task()
        at_least("", self, num_steps=1, prompts_per_step=1, num_minibatches=1, num_iterations=1, rollout_batch_size=1,
                 micro_batch_size=1, validate_every=1)  # fmt: skip
        refuse_cuda_graphs(self.engine, "a policy")
        if not self.init:
            raise ValueError(
                "Name the model to start from, a run or a checkpoint: init=RUN. A hybrid model, which chooses its "
                "mode, is made by coconut train method=hybrid_warmup."
            )
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}. Advantages compare the completions of a question: take 2 or more."
            )
        if self.process_reward.weight and self.objective.build().normalize_advantages:
            raise ValueError(
                f"objective.name={self.objective.name} divides advantages by their group's standard deviation, which "
                "is not defined for process rewards. Set objective.normalize_advantages=false."
            )
        if self.gates.enabled and self.process_reward.weight:
            raise ValueError(
                "gates.enabled=true with process_reward.weight: the reward model reads words as they are, and not what "
                "the gates feed. Leave one of them out."
            )
        if self.gates.enabled and self.engine.kind is EngineKind.deepspeed:
            raise ValueError(
                "gates.enabled=true has learning rates of its own, and checkpoints of engine=deepspeed keep one for "
                "all parameters. Set engine=local."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; answers are sampled, so it must be above 0.")
        if not 0 <= self.thought_noise < math.inf:
            raise ValueError(f"thought_noise is {self.thought_noise}; it must be a standard deviation, 0 or more.")
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} is more than prompts_per_step={self.prompts_per_step}. Lower "
                "it."
            )

    @property
    def kind(self) -> str:
        return self.objective.name

    @property
    def on_policy(self) -> bool:
        """Whether every update uses completions sampled from the current weights."""
        return self.num_minibatches == self.num_iterations == 1
