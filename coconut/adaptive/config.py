"""The schema of python -m coconut.adaptive."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from coconut.config import SPLITS, DataFiles, EngineConfig, Task, Unreadable, at_least
from coconut.methods import PromptFormat
from coconut.utils.overrides import PathName, Place, Text


class JudgeKind(StrEnum):
    """What gives an answer its score in [0, 1]."""

    exact = "exact"  # the task's own judge: 1 for a right answer, 0 for another
    model = "model"  # a pretrained reward model of answer against reference
    implicit = "implicit"  # a run of coconut.reward, which needs no reference


@dataclass
class JudgeConfig:
    """`place`: of the pretrained model, or of the run of coconut.reward."""

    kind: JudgeKind = JudgeKind.exact
    model: Place = ""

    def __post_init__(self) -> None:
        if self.model and self.kind is JudgeKind.exact:
            raise ValueError(f"judge.model={self.model} is for judge.kind=model or judge.kind=implicit.")
        if not self.model and self.kind is not JudgeKind.exact:
            raise ValueError(f"judge.kind={self.kind} needs the model that judges: judge.model=NAME_OR_FOLDER.")


@dataclass
class PolicyConfig:
    """`temperature` tau_0 of exploration is multiplied by `decay` with each update."""

    hidden: int = 16
    lr: float = 1e-2
    weight_decay: float = 0.1
    updates: int = 3000
    batch_size: int = 30
    temperature: float = 1.0
    decay: float = 0.9998
    baseline: bool = True

    def __post_init__(self) -> None:
        at_least("policy.", self, hidden=1, updates=1, batch_size=1, weight_decay=0)
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 < self.decay <= 1 or self.decay**self.updates < 1e-6:
            raise ValueError(
                f"policy.decay is {self.decay}: it must be above 0 and at most 1, and after "
                f"policy.updates={self.updates} no less than a millionth may be left of the temperature."
            )

    def exploration(self, update: int) -> float:
        """The temperature of an update, counted from 0."""
        return self.temperature * self.decay**update


@dataclass
class FunctionConfig:
    """How a function is asked: `workers` questions at a time, each up to `tries` times.

    After a failure it waits `wait` seconds, after each further one twice as long.
    """

    workers: int = 4
    tries: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        at_least("calls.", self, workers=1, tries=1, wait=0)


@dataclass
class AdaptiveConfig:
    """One of `run`, `base` and `function` answers the questions, unless there is a `table` of what they answered."""

    name: str = "custom"
    run: PathName = ""  # of coconut.train, coconut.rl, or a folder with a model
    base: Place = ""  # any causal language model of Hugging Face
    function: str = ""  # MODULE:NAME, from (question, settings) to a text
    table: PathName = ""  # of outcomes, made before: no model is needed
    checkpoint: str = "best"
    split: str = "test"
    data: DataFiles = field(default_factory=DataFiles)
    task: Task | None = None  # by default the run's
    format: PromptFormat = field(default_factory=lambda: PromptFormat(question="{}"))  # what model or function write
    prompt: Text = "{question}"  # of a model: what it reads, with settings of the space in it
    max_new_tokens: int | None = None
    space: dict[str, Any] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)  # the configuration to beat; by default the first values
    embedding: Place = "mean"  # mean or last of the model's own states, or a sentence encoder's name
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    cost: float = 0.0  # of a forward pass, taken from the score
    limit: int | None = None  # the first so many questions
    unreadable: Unreadable = Unreadable.error  # a gold answer that would be judged wrong
    num_train_questions: int = 100  # questions to learn from; the others are for the test
    seeds: int = 20
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    output: PathName = ""  # by default RUN/adaptive
    batch_size: int = 64
    seed: int = 0
    calls: FunctionConfig = field(default_factory=FunctionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        from coconut.adaptive.space import Space

        at_least("", self, cost=0, limit=1, num_train_questions=2, seeds=2, batch_size=1, seed=0, max_new_tokens=1)
        given = [key for key in ("run", "base", "function", "table") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(f"{key}={getattr(self, key)}" for key in given) or "none of them"
            raise ValueError(
                f"Who answers: run=DIR, base=NAME or function=MODULE:NAME, or table=FILE of what they answered? "
                f"It came {found}."
            )
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; it is one of {', '.join(SPLITS)}.")
        if self.table:
            return  # and its own space
        if not self.run:
            for key, value in (("task", self.task), (f"data.{self.split}", getattr(self.data, self.split)),
                               ("output", self.output)):  # fmt: skip
                if not value:
                    raise ValueError(f"With {given[0]}={getattr(self, given[0])} name {key}=..., too: no run says it.")
            if self.judge.kind is JudgeKind.implicit:
                raise ValueError("judge.kind=implicit scores the answers of the model that it was made from: run=DIR.")
        if self.function and self.embedding in ("mean", "last"):
            raise ValueError(
                f"embedding={self.embedding} is of a model's own states, and a function shows none. Name a sentence "
                "encoder: embedding=NAME_OR_FOLDER."
            )
        Space.of(self.space).named(self.default)

    @property
    def folder(self) -> Path:
        own = Path(self.table).parent if self.table else Path(self.run) / "adaptive"
        return Path(self.output) if self.output else own
