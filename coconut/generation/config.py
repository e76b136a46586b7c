"""The schema of generate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum

from coconut.config import EngineConfig, at_least, needs_run
from coconut.utils.overrides import PathName, Text


class StopRule(StrEnum):
    """How many thoughts a question gets."""

    constant = "constant"  # as many as the model's last stage had, or num_thoughts
    classifier = "classifier"  # a classifier on the thoughts ends them, at the latest after so many


POLICY_CHOOSES = (
    "num_thoughts", "rate", "stop", "soft_thinking", "mode", "temperature", "top_p", "thought_noise", "thought_dropout",
    "show_thoughts",
)  # fmt: skip


@dataclass
class SoftThinking:
    """Mixtures of words in place of a written chain (Soft Thinking, arXiv 2505.15778). `max_thoughts` 0 turns it off.

    A thought is made of the `top_k` most probable words (0: of all) of softmax(logits / temperature). The thoughts end
    when the most probable next word begins the answer's mark or ends the sequence, and after `max_thoughts` at the
    latest. `entropy`, in nats: they also end before the last of `patience` steps in a row at which the entropy of the
    next-token distribution, at temperature 1, is below it (cold stop); 0 turns that off.
    """

    max_thoughts: int = 0
    top_k: int = 10
    temperature: float = 1.0
    entropy: float = 0.0
    patience: int = 1

    def __post_init__(self) -> None:
        at_least("soft_thinking.", self, max_thoughts=0, top_k=0, entropy=0, patience=1)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"soft_thinking.temperature is {self.temperature}; it must be above 0.")
        if not self.max_thoughts and self.non_default:
            name, value = self.non_default[0].split("-")
            raise ValueError(
                f"soft_thinking.{name}={value} is given, but soft_thinking.max_thoughts is 0, which turns it off. Set "
                "it, for example to 64."
            )
        if self.patience > 1 and not self.entropy:
            raise ValueError(
                f"soft_thinking.patience={self.patience} counts steps of low entropy: set soft_thinking.entropy."
            )

    @property
    def non_default(self) -> list[str]:
        """The settings that differ from the default, as NAME-VALUE."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return [f"{name}-{value}" for name, value in values.items() if value != getattr(SoftThinking, name)]


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
    soft_thinking: SoftThinking = field(default_factory=SoftThinking)
    mode: str | None = None  # of a hybrid model: force it
    max_new_tokens: int | None = None
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    thought_noise: float = 0.0  # the standard deviation of Gaussian noise on each thought
    thought_dropout: float = 0.0  # the probability with which each number of a thought is dropped
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least(
            "", self, num_thoughts=0, max_new_tokens=1, temperature=0, thought_noise=0, thought_dropout=0, batch_size=1
        )
        if self.question and not self.question.strip():
            raise ValueError('The question is empty. Ask one with question="..." or pipe it in with question=-.')
        if self.question and self.file:
            raise ValueError("question and file are both given. Leave one of them out.")
        if self.output and not self.file:
            raise ValueError("output is for the answers to file=FILE; one answer goes to the screen.")
        if self.policy:
            usual = GenerateConfig(run=self.run)
            for name in POLICY_CHOOSES:
                if (value := getattr(self, name)) != getattr(usual, name):
                    raise ValueError(
                        f"{name}={value} and policy={self.policy} are both given. The policy says how each question is "
                        "asked: leave one of them out."
                    )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p={self.top_p} is for sampling: set temperature, for example to 1.")
