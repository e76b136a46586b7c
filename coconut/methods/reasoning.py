"""Settings for inference that are saved with a model: method, number of thoughts, prompt format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from coconut.methods.curriculum import Plan, Stage
from coconut.methods.modes import parse_mode
from coconut.methods.table import THOUGHTS, Slot
from coconut.utils.overrides import Template


@dataclass
class PromptFormat:
    """Templates for the text of a question, of each step and of the answer. Each segment is encoded by itself.

    On the command line \\n in a template is a newline, \\t a tab and \\\\ a backslash; quotes around a template are
    removed. `chat`: the question is the user's message in the tokenizer's chat template, and what follows it is the
    assistant's.
    """

    question: Template = "{}\n"
    step: Template = "{}\n"
    answer: Template = "### {}"
    chat: bool = False

    def __post_init__(self) -> None:
        for name, template in (("question", self.question), ("step", self.step), ("answer", self.answer)):
            if template.count("{}") != 1:
                raise ValueError(f"The prompt format of {name!r} is {template!r}; it must contain {{}} exactly once.")
        if not self.step_end:
            raise ValueError(
                f"The prompt format of 'step' is {self.step!r}; it must have text after {{}} to end a step."
            )

    @staticmethod
    def fill(template: str, text: str) -> str:
        """Put the text in place of `{}`. Other braces, in the template or the text, are kept."""
        before, after = template.split("{}")
        return before + text + after

    def written(self, steps: Sequence[str], answer: str) -> str:
        """The text that a model is trained to write: the steps and the answer."""
        return "".join([*(self.fill(self.step, step) for step in steps), self.fill(self.answer, answer)])

    @property
    def answer_mark(self) -> str:
        return self.answer.split("{}")[0].strip()

    @property
    def answer_end(self) -> str:
        return self.answer.split("{}")[1].strip()

    @property
    def step_begin(self) -> str:
        return self.step.split("{}")[0].strip()

    @property
    def step_end(self) -> str:
        return self.step.split("{}")[1]


@dataclass(frozen=True)
class GatedWords:
    """How the words that are written before the answer mark are fed: what was expected is mixed into them (HRPO).

    `temperature`: of the distribution over next words whose expected embedding it is, however the words are chosen.
    """

    temperature: float = 1.0


REASONING_FILE = "coconut.json"  # beside a model's weights


@dataclass(frozen=True)
class Reasoning:
    """How to run inference on a trained model. Saved with its weights.

    `num_thoughts` is the number that inference uses; it never depends on an example's gold chain. Of thoughts that the
    model ends itself it is the most, or with `fixed_count` their number, whatever the model says.
    """

    method: str = "coconut"
    stage: int = 0
    slot: Slot = THOUGHTS
    markers: bool = True
    num_thoughts: int = 0
    thoughts_per_step: int = 1  # positions of the slot that stand for one step; 0: they stand for none
    steps_cut: int | None = 0  # steps of the chain that the model does not write; None: all
    tokens_cut: int | None = 0  # tokens of the chain that it does not write (iCoT); None: all
    max_new_tokens: int = 128
    format: PromptFormat = field(default_factory=PromptFormat)
    modes: tuple[str, ...] = ()  # of a hybrid model: the modes it chooses from with its first token
    gated: GatedWords | None = None  # None: words are fed as they are
    fixed_count: bool = False  # of thoughts that the model would end itself

    @classmethod
    def at(cls, plan: Plan, stage: Stage, max_new_tokens: int = 128) -> Reasoning:
        """The settings for a model trained in this stage of a plan."""
        form = stage.form
        return cls(
            method=plan.method,
            stage=stage.index,
            slot=form.slot,
            markers=form.markers,
            num_thoughts=form.slot_length,
            thoughts_per_step=form.thoughts_per_step,
            steps_cut=form.steps_cut,
            tokens_cut=form.tokens_cut,
            max_new_tokens=max_new_tokens,
            modes=tuple(turn.mode for turn in stage.in_turn),
        )

    def in_mode(self, name: str) -> Reasoning:
        """The settings that apply after the control token of this mode; with an empty name, these settings."""
        if not name:
            return self
        mode = parse_mode(name)
        return replace(
            self, slot=mode.slot, markers=mode.slot.thinks, num_thoughts=mode.num_thoughts,
            steps_cut=mode.steps_cut, modes=(),
        )  # fmt: skip

    def at_rate(self, group: int) -> Reasoning:
        """The settings for thoughts that stand for `group` tokens of the chain each.

        The most thoughts are changed in proportion. Raises ValueError if the model was not trained with such thoughts.
        """
        if not 1 <= group <= self.slot.max_group:
            trained = f"{self.method} has none. Leave it out"
            if self.slot.merges:
                trained = f"{self.method} was trained at rate {self.slot.group} alone. Leave it out"
            if self.slot.max_group:
                trained = f"{self.method} was trained with rates 1 to {self.slot.max_group}. Take one of them"
            raise ValueError(f"rate={group} is for models that were trained at several rates, and {trained}.")
        most = -(-self.num_thoughts * self.slot.group // group)
        return replace(self, slot=replace(self.slot, group=group), num_thoughts=most)

    def forms(self, mode: str | None = None) -> list[Reasoning]:
        """The settings of each mode, or of the named one; for a model without modes, only these settings."""
        return [self.in_mode(name) for name in self.modes if mode in (None, name)] or [self]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Reasoning:
        values = dict(values)
        form = PromptFormat(**values["format"])
        modes = tuple(values.get("modes", ()))
        gated = GatedWords(**values["gated"]) if values.get("gated") else None
        slot = Slot.from_dict(values["slot"])
        return cls(**{**values, "slot": slot, "format": form, "modes": modes, "gated": gated})
