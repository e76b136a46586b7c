"""Configuration of coconut evaluate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

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
from coconut.generation.config import SoftThinking, StopRule
from coconut.utils.overrides import PathName, Place

MAX_SAMPLES = 256  # with more, the exact maj@k would take longer than the answers


@dataclass(frozen=True)
class Sampling:
    """How several answers to a question are drawn. Without temperature, noise and dropout all are the greedy one.

    temperature, top_p: of sampled words. thought_noise: the standard deviation of the Gaussian noise on each number of
        a thought that is fed. thought_dropout: the probability with which each of these numbers is dropped before.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    thought_noise: float = 0.0
    thought_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("", self, samples=1, temperature=0, thought_noise=0, thought_dropout=0, seed=0)
        if self.samples > MAX_SAMPLES:
            raise ValueError(f"samples is {self.samples}; it must be at most {MAX_SAMPLES}.")
        for name in ("temperature", "thought_noise"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"{name} is {value}; it must be a finite number, 0 or more.")
        if not 0 <= self.thought_dropout < 1:
            raise ValueError(f"thought_dropout is {self.thought_dropout}; it must be a probability below 1.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p={self.top_p} is for sampled words: set temperature, for example to 1.")
        if self.seed and not self.is_random:
            raise ValueError(
                f"seed={self.seed} is for sampled answers: set temperature, thought_noise or thought_dropout."
            )

    @property
    def is_random(self) -> bool:
        return self.temperature > 0 or self.changes_thoughts

    @property
    def changes_thoughts(self) -> bool:
        """Whether every answer has thoughts of its own."""
        return self.thought_noise > 0 or self.thought_dropout > 0


@dataclass
class SuiteSet:
    """An evaluation set of a suite.

    `builder`: what makes it, `coconut data BUILDER`; by default its own name. `build`: keys of the builder. `hub`:
    further ones, if it comes from the Hugging Face hub. `judge`: how its answers are judged. `rows`: how many rows it
    must have. `max_new_tokens`: the limit of an answer; by default the model's own.
    """

    judge: TaskName
    builder: str | None = None
    build: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least("suite.sets.NAME.", self, rows=1, max_new_tokens=1)


@dataclass
class SuiteConfig:
    """Sets that are evaluated together: `suite=NAME` reads conf/suite/NAME.yaml. Without `sets` there is no suite.

    `folder`: folders with the sets' files; by default the hub. `timed`: how many questions of each set are also
    answered one by one, for the time at batch 1; 0: none.
    """

    name: str = ""
    sets: dict[str, SuiteSet] = field(default_factory=dict)
    folder: list[PathName] = field(default_factory=list)
    timed: int = 20

    def __post_init__(self) -> None:
        at_least("suite.", self, timed=0)
        if self.folder and not self.sets:
            raise ValueError(f"suite.folder={','.join(self.folder)} is given without a suite. Add suite=NAME.")
        if clash := [name for name in self.sets if name in SPLITS]:
            raise ValueError(f"suite.sets.{clash[0]} has the name of a split, whose results it would replace.")


@dataclass
class EvaluateConfig:
    run: Place = ""  # a run, or a saved model: a folder, or OWNER/NAME on the hub
    checkpoint: str = "best"  # best, last, or the number of an update
    split: str = "test"
    data: DataFiles = field(default_factory=DataFiles)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    judge: TaskName | None = None  # how answers are judged; by default as in training, or as the suite's set says
    output: PathName = ""  # a folder; by default RUN/evaluation, or evaluation/NAME for a saved model
    num_thoughts: int | None = None  # by default as trained
    rate: int | None = None  # tokens of the chain that a thought stands for, of a model that was trained with several
    stop: StopRule = StopRule.constant
    soft_thinking: SoftThinking = field(default_factory=SoftThinking)
    mode: str | None = None  # force a mode of a hybrid model
    max_new_tokens: int | None = None
    samples: int = 1  # answers to each question
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    thought_noise: float = 0.0  # the standard deviation of Gaussian noise on each thought
    thought_dropout: float = 0.0  # the probability with which each number of a thought is dropped
    seed: int = 0  # of sampled words, noise and dropout
    reward: PathName = ""  # a run of coconut reward, which chooses among the samples
    batch_size: int = 64
    limit: int | None = None  # evaluate the first `limit` questions
    too_long: TooLong = TooLong.error  # a question that leaves no room for an answer in the model's context
    unreadable: Unreadable = Unreadable.error  # a gold answer that would be judged wrong
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, num_thoughts=0, max_new_tokens=1, batch_size=1, limit=1)
        _ = self.sampling
        if self.reward and self.soft:
            raise ValueError(
                f"reward={self.reward} and soft_thinking are both given: a reward model reads a chain of words, and "
                "Soft Thinking writes none. Leave one out."
            )
        if self.reward and self.samples == 1:
            raise ValueError(f"reward={self.reward} chooses among several answers: set samples, for example to 8.")
        if self.reward and self.suite.sets:
            raise ValueError(
                f"reward={self.reward} and suite={self.suite.name} are both given: answers are chosen for one file. "
                "Name it with data.test=FILE, or leave one of them out."
            )
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; it is one of {', '.join(SPLITS)}.")
        for other in SPLITS:
            if other != self.split and getattr(self.data, other):
                raise ValueError(f"data.{other} is given but split={self.split} is evaluated. Add split={other}.")
        if self.suite.sets:
            given = {"split": self.split != "test" and self.split, "data.test": self.data.test}
            if both := [f"{key}={value}" for key, value in given.items() if value]:
                raise ValueError(
                    f"{both[0]} and suite={self.suite.name} are both given: a suite has its own files. Leave one out."
                )

    @property
    def soft(self) -> SoftThinking | None:
        """The settings of Soft Thinking; None if it is off."""
        return self.soft_thinking if self.soft_thinking.max_thoughts else None

    @property
    def sampling(self) -> Sampling | None:
        """How answers are sampled; None if each question gets one greedy answer. Raises ValueError for wrong values."""
        sampling = Sampling(**{one.name: getattr(self, one.name) for one in fields(Sampling)})
        return None if sampling == Sampling() else sampling
