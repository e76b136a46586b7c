"""The schema of generate."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from coconut.config import EngineConfig, at_least, needs_run
from coconut.utils.overrides import PathName, Text


class StopRule(StrEnum):
    """How many thoughts a question gets."""

    constant = "constant"  # as many as the model's last stage had, or num_thoughts
    classifier = "classifier"  # a classifier on the thoughts ends them, at the latest after so many


@dataclass
class GenerateConfig:
    run: PathName = ""
    checkpoint: str = "best"
    question: Text = ""  # "-" reads standard input; with neither a question nor a file they are typed in
    file: PathName = ""  # questions, one a line, or rows of JSON
    output: PathName = ""  # where the answers to a file go, as JSON lines; by default to the screen
    policy: PathName = ""  # of coconut adaptive, which then says how each question is asked
    batch_size: int = 64
    show_thoughts: bool = False
    num_thoughts: int | None = None
    rate: int | None = None  # tokens of the chain that a thought stands for, of a model that was trained with several
    stop: StopRule = StopRule.constant
    mode: str | None = None  # of a hybrid model: force it
    max_new_tokens: int | None = None
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, num_thoughts=0, max_new_tokens=1, temperature=0, batch_size=1)
        if self.question and not self.question.strip():
            raise ValueError('The question is empty. Ask one with question="..." or pipe it in with question=-.')
        if self.question and self.file:
            raise ValueError("question and file are both given. Leave one of them out.")
        if self.output and not self.file:
            raise ValueError("output is for the answers to file=FILE; one answer goes to the screen.")
        if self.policy:
            usual = GenerateConfig(run=self.run)
            for name in ("num_thoughts", "rate", "stop", "mode", "temperature", "top_p", "show_thoughts"):
                if (value := getattr(self, name)) != getattr(usual, name):
                    raise ValueError(
                        f"{name}={value} and policy={self.policy} are both given. The policy says how each question is "
                        "asked: leave one of them out."
                    )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p={self.top_p} is for sampling: set temperature, for example to 1.")
