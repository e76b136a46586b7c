"""The configuration schema of coconut adaptive."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from coconut.config import SPLITS, DataFiles, EngineConfig, TaskName, Unreadable, at_least
from coconut.methods import PromptFormat
from coconut.utils.overrides import PathName, Place, Text


class JudgeKind(StrEnum):
    """How answers are scored, in [0, 1]."""

    exact = "exact"  # by the task: 1 for a right answer, 0 for a wrong one
    model = "model"  # by a pretrained reward model that compares the answer with the gold answer
    implicit = "implicit"  # by a run of coconut.reward, without the gold answer


@dataclass
class JudgeConfig:
    """`model`: the name or folder of the pretrained reward model, or the run of coconut.reward."""

    kind: JudgeKind = JudgeKind.exact
    model: Place = ""

    def __post_init__(self) -> None:
        if self.model and self.kind is JudgeKind.exact:
            raise ValueError(
                f"judge.model={self.model} has no effect with judge.kind=exact. Set judge.kind=model or implicit."
            )
        if not self.model and self.kind is not JudgeKind.exact:
            raise ValueError(f"judge.kind={self.kind} needs a model: judge.model=NAME_OR_FOLDER.")


@dataclass
class PolicyConfig:
    """Training of the configuration policies. `temperature`: tau_0 of exploration, multiplied by `decay` each update.

    `baseline`: subtract a running mean of rewards.
    """

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
                f"policy.decay is {self.decay}; it must be above 0 and at most 1, and after "
                f"policy.updates={self.updates} the temperature must be at least a millionth of its start."
            )

    def exploration(self, update: int) -> float:
        """The temperature of an update, counted from 0."""
        return self.temperature * self.decay**update


@dataclass
class FunctionConfig:
    """How a function is called: `workers` questions at a time, each up to `tries` times.

    The wait after a question's first failure is about `wait` seconds, and doubles with each further one.
    """

    workers: int = 4
    tries: int = 5
    wait: float = 1.0

    def __post_init__(self) -> None:
        at_least("calls.", self, workers=1, tries=1, wait=0)


@dataclass
class AdaptiveConfig:
    """The backend is one of `run`, `base` and `function`. With `table`, a file of outcomes, none is needed."""

    name: str = "custom"
    run: PathName = ""  # a run of coconut.train or coconut.rl, or a folder with a model
    base: Place = ""  # any causal language model of Hugging Face
    function: str = ""  # MODULE:NAME of a function from (question, settings) to a text
    table: PathName = ""  # a table of outcomes
    checkpoint: str = "best"
    split: str = "test"
    data: DataFiles = field(default_factory=DataFiles)
    task: TaskName | None = None  # by default the run's
    format: PromptFormat = field(default_factory=lambda: PromptFormat(question="{}"))  # for reading answers of others
    prompt: Text = "{question}"  # the prompt for `base`, with fields for settings of the space
    max_new_tokens: int | None = None
    space: dict[str, Any] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)  # the configuration to beat; by default the first values
    embedding: Place = "mean"  # mean or last of the model's own hidden states, or a sentence encoder's name
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    cost: float = 0.0  # of a forward pass, subtracted from the score
    limit: int | None = None  # use only the first `limit` questions
    unreadable: Unreadable = Unreadable.error  # for gold answers that would be judged wrong
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
        sources = [key for key in ("run", "base", "function", "table") if getattr(self, key)]
        if len(sources) != 1:
            named = " and ".join(f"{key}={getattr(self, key)}" for key in sources) or "none of them"
            raise ValueError(
                f"Name exactly one of run=DIR, base=NAME, function=MODULE:NAME and table=FILE; given: {named}."
            )
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; it is one of {', '.join(SPLITS)}.")
        if self.table:
            return  # the table has its own space
        if not self.run:
            for key, value in (("task", self.task), (f"data.{self.split}", getattr(self.data, self.split)),
                               ("output", self.output)):  # fmt: skip
                if not value:
                    raise ValueError(
                        f"{sources[0]}={getattr(self, sources[0])} needs {key}=... too, which a run would give."
                    )
            if self.judge.kind is JudgeKind.implicit:
                raise ValueError("judge.kind=implicit needs run=DIR: it scores answers of the model it was made from.")
        if self.function and self.embedding in ("mean", "last"):
            raise ValueError(
                f"embedding={self.embedding} is of a model's own hidden states, which a function does not give. Name a "
                "sentence encoder: embedding=NAME_OR_FOLDER."
            )
        Space.of(self.space).find(self.default)

    @property
    def folder(self) -> Path:
        default = Path(self.table).parent if self.table else Path(self.run) / "adaptive"
        return Path(self.output) if self.output else default
