"""What is trained, as data.

A method says three things: what fills the slot between question and chain, how the written chain is
cut, and whether the markers `<bot>` and `<eot>` stand around the slot. `plan` expands a method and a
curriculum into the explicit list of stages that a run logs, saves and walks through. Nothing here
knows tokens or tensors.

The first eight entries of `METHODS` are the rows of Table 1 in Hao et al., "Training Large Language Models
to Reason in a Continuous Latent Space", arXiv 2412.06769; the last is the warm-up of a model that chooses its mode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from coconut.utils.overrides import Template


class Slot(StrEnum):
    """What stands between the question and the written chain."""

    nothing = "nothing"
    pause = "pause"  # a learned <pause> token
    thought = "thought"  # the last hidden state, fed back


class Cut(StrEnum):
    """What is removed from the front of the written chain, and when."""

    never = "never"
    steps = "steps"  # stage k removes the first k steps
    last = "last"  # as in the last stage of `steps`, from the start
    tokens = "tokens"  # a few tokens more in every stage (iCoT)
    all = "all"
    modes = "modes"  # as the mode has it, in which an example is answered


class Unit(StrEnum):
    epochs = "epochs"
    updates = "updates"


class Mixing(StrEnum):
    """From which stages a mixed example is drawn."""

    current = "current"  # 0 .. the current stage (superposition paper, arXiv 2505.12514)
    all = "all"  # 0 .. the example's number of steps (released Coconut code)


@dataclass(frozen=True)
class Method:
    slot: Slot
    cut: Cut
    markers: bool
    summary: str

    def __post_init__(self) -> None:
        assert self.markers or self.slot is not Slot.thought, "speech begins at <eot>, after the last thought"


METHODS: dict[str, Method] = {
    "coconut": Method(Slot.thought, Cut.steps, True, "stage k: the first k steps become k*c thoughts"),
    "cot": Method(Slot.nothing, Cut.never, False, "the whole chain in words"),
    "no_cot": Method(Slot.nothing, Cut.all, False, "the answer at once"),
    "icot": Method(Slot.nothing, Cut.tokens, False, "the chain is removed token by token"),
    "pause": Method(Slot.pause, Cut.all, True, "pause tokens, then the answer; no curriculum"),
    "without_curriculum": Method(Slot.thought, Cut.last, True, "Coconut's last stage from the start"),
    "without_thought": Method(Slot.nothing, Cut.steps, False, "Coconut's curriculum, nothing in the slot"),
    "pause_as_thought": Method(Slot.pause, Cut.steps, True, "Coconut's curriculum, pauses in the slot"),
    "hybrid_warmup": Method(Slot.nothing, Cut.modes, False, "each example in each mode, after its control token"),
}


@dataclass(frozen=True)
class Mode:
    """A way in which a hybrid model answers: what it does after this control token (Thinkless, arXiv 2505.13379).

    `<short>` is the answer at once, `<think>` the whole chain in words, `<latent_K>` K thoughts and the answer.
    """

    name: str
    slot: Slot
    num_thoughts: int
    steps_cut: int | None

    @property
    def token(self) -> str:
        return f"<{self.name}>"


def mode_named(name: str) -> Mode:
    """Raises ValueError if no mode has this name."""
    if name == "short":
        return Mode(name, Slot.nothing, 0, None)
    if name == "think":
        return Mode(name, Slot.nothing, 0, 0)
    if found := re.fullmatch(r"latent_([1-9]\d*)", name):
        return Mode(name, Slot.thought, int(found[1]), None)
    raise ValueError(f"There is no mode {name!r}. The modes are short, think, and latent_K for K thoughts.")


@dataclass
class Curriculum:
    """How fast the written chain is replaced. Lengths are counted in `unit`.

    The defaults are the paper's for ProsQA and ProntoQA: 5 epochs in each stage, 50 in all, one
    thought a step (arXiv 2412.06769, section 4.2).
    """

    thoughts_per_step: int = 1  # c
    max_stage: int = 6
    extra_stage: bool = False  # after the last stage, one in which all remaining steps go (GSM8K)
    unit: Unit = Unit.epochs
    first: int = 5  # length of stage 0
    each: int = 5  # length of every later stage; the last one takes what is left of the total
    total: int = 50
    start_stage: int = 0  # skip the stages before this one (with init=RUN)
    pad_thoughts: bool = True  # an example with fewer steps than the stage gets the stage's thoughts all the same
    mixing: Mixing = Mixing.current
    mixing_probability: float = 0.0  # share of the examples that are trained at a random stage, if the slot shows it
    icot_tokens: int = 8  # tokens that each stage of icot removes more than the one before
    icot_limit: int = 39  # when more than this many are due, the whole chain goes
    icot_each: int = 1  # length of a stage of icot
    modes: list[str] = field(default_factory=lambda: ["short", "think"])  # of hybrid_warmup

    def __post_init__(self) -> None:
        if len(self.modes) < 2 or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"curriculum.modes is {self.modes}; it must name two modes or more, each once.")
        for name in self.modes:
            mode_named(name)
        for name, least in [("thoughts_per_step", 0), ("max_stage", 0), ("first", 0), ("each", 1),
                            ("total", 1), ("start_stage", 0), ("icot_tokens", 1), ("icot_limit", 0),
                            ("icot_each", 1)]:  # fmt: skip
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"curriculum.{name} is {value}; it must be at least {least}.")
        if not 0.0 <= self.mixing_probability <= 1.0:
            raise ValueError(
                f"curriculum.mixing_probability is {self.mixing_probability}; it is a share between 0 and 1."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curriculum:
        """As a run's configuration keeps it."""
        return cls(**{**values, "unit": Unit(values["unit"]), "mixing": Mixing(values["mixing"])})


@dataclass(frozen=True)
class Stage:
    """One stage of a plan: what an example looks like in it and how long it lasts.

    `steps_cut` and `tokens_cut` count from the front of the written chain; None means all of it.
    `steps_cut` is 0 in a stage that cuts by tokens.
    """

    index: int
    length: int
    slot: Slot
    markers: bool
    num_thoughts: int  # tokens in the slot
    steps_cut: int | None
    tokens_cut: int | None = 0
    smoothed: bool = False  # iCoT: a random offset is added to tokens_cut, for each example and epoch
    mode: str = ""  # its control token stands before the slot
    modes: tuple[Stage, ...] = ()  # the forms in which each example is seen, one after the other

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """As a run keeps it."""
        forms = tuple(cls.from_dict(form) for form in values.get("modes", ()))
        return cls(**{**values, "slot": Slot(values["slot"]), "modes": forms})

    def rank(self, accuracy: float, loss: float) -> tuple[float, float]:
        """By which the best checkpoint is chosen, the highest being best.

        Loss alone where each example is seen in several forms: the accuracy is then that of whichever mode the model
        happens to begin with, at even odds.
        """
        return (-loss, accuracy) if self.modes else (accuracy, -loss)

    def describe(self) -> str:
        if self.modes:
            return f"each example as {', '.join(mode_named(form.mode).token for form in self.modes)}"
        if self.steps_cut is None or self.tokens_cut is None:
            left = "answer only"
        elif self.tokens_cut:
            left = f"without the first {self.tokens_cut} tokens of the chain"
        elif self.steps_cut:
            left = "without the first step" if self.steps_cut == 1 else f"without the first {self.steps_cut} steps"
        else:
            left = "whole chain"
        slot = f"{self.num_thoughts} {self.slot.value}{'s' * (self.num_thoughts != 1)}, " if self.num_thoughts else ""
        return slot + left


@dataclass(frozen=True)
class Plan:
    """The stages of a run, in order.

    `depths[k]` is an example at curriculum depth k, from which mixing draws: 0 .. max_stage, and last
    the one whose steps are all gone.
    """

    method: str
    unit: Unit
    stages: tuple[Stage, ...]
    depths: tuple[Stage, ...] = ()
    thoughts_per_step: int = 1
    pad_thoughts: bool = True
    mixing: Mixing = Mixing.current
    mixing_probability: float = 0.0

    @property
    def knows_fewer(self) -> bool:
        """Whether the last stage is also trained with fewer thoughts than its own."""
        return self.mixing_probability > 0 or not self.pad_thoughts

    def as_dict(self) -> dict[str, Any]:
        return {"method": self.method, "unit": self.unit.value, "stages": [asdict(s) for s in self.stages]}


def method_named(name: str) -> Method:
    """The entry of METHODS. Raises ValueError that lists the names."""
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}. The methods are: {', '.join(METHODS)}.")
    return METHODS[name]


def plan(name: str, curriculum: Curriculum) -> Plan:
    """Expand a method and a curriculum to the explicit stages of a run.

    Raises ValueError if the method does not exist or its stages do not fit into the total length.
    """
    method = method_named(name)
    unit, total = curriculum.unit.value, curriculum.total
    depths = _depths(method, curriculum)
    last = curriculum.max_stage + curriculum.extra_stage
    if method.cut is Cut.steps:
        lengths = [curriculum.first] + [curriculum.each] * last
        stages = [replace(stage, length=length) for stage, length in zip(depths, lengths, strict=False)]
    elif method.cut is Cut.tokens:
        stages = _icot_stages(curriculum)
    elif method.cut is Cut.modes:
        stages = [replace(depths[0], length=total, modes=tuple(_form(mode_named(name)) for name in curriculum.modes))]
    else:
        only = {Cut.never: depths[0], Cut.last: depths[last], Cut.all: depths[-1]}
        stages = [replace(only[method.cut], index=0, length=total)]

    if curriculum.start_stage >= len(stages):
        raise ValueError(
            f"curriculum.start_stage is {curriculum.start_stage}, but {name} has stages 0 to {len(stages) - 1}."
        )
    stages = stages[curriculum.start_stage :]
    before = sum(stage.length for stage in stages[:-1])
    if before >= total:
        raise ValueError(
            f"The stages of {name} before the last one take {before} {unit}, and curriculum.total is {total}: "
            f"nothing is left for stage {stages[-1].index}. Raise curriculum.total above {before}, or lower "
            "curriculum.first, curriculum.each or curriculum.max_stage."
        )
    stages[-1] = replace(stages[-1], length=total - before)
    mixes = method.cut is Cut.steps and method.slot is not Slot.nothing  # what else would tell the stages apart
    return Plan(
        method=name,
        unit=curriculum.unit,
        stages=tuple(stage for stage in stages if stage.length > 0),
        depths=tuple(depths) if mixes else (),
        thoughts_per_step=curriculum.thoughts_per_step,
        pad_thoughts=curriculum.pad_thoughts,
        mixing=curriculum.mixing,
        mixing_probability=curriculum.mixing_probability if mixes else 0.0,
    )


def _depths(method: Method, curriculum: Curriculum) -> list[Stage]:
    """The depths of the step curriculum: 0 .. max_stage, and the one without any step."""
    c, slot = curriculum.thoughts_per_step, method.slot
    cuts: list[int | None] = [*range(curriculum.max_stage + 1), None]
    return [
        Stage(
            index=k,
            length=0,
            slot=slot,
            markers=method.markers,
            num_thoughts=0 if slot is Slot.nothing else c * min(k, curriculum.max_stage),
            steps_cut=cut,
        )
        for k, cut in enumerate(cuts)
    ]


def _form(mode: Mode) -> Stage:
    """How an example looks in a mode."""
    thinks = mode.slot is Slot.thought
    return Stage(0, 0, mode.slot, thinks, mode.num_thoughts, mode.steps_cut, mode=mode.name)


def _icot_stages(curriculum: Curriculum) -> list[Stage]:
    """Remove `icot_tokens` more in each stage, and everything once more than `icot_limit` are due."""
    due = list(range(0, curriculum.icot_limit + 1, curriculum.icot_tokens))
    whole = Stage(0, curriculum.icot_each, Slot.nothing, markers=False, num_thoughts=0, steps_cut=0, smoothed=True)
    stages = [replace(whole, index=k, tokens_cut=tokens) for k, tokens in enumerate(due)]
    return [*stages, replace(whole, index=len(due), steps_cut=None, tokens_cut=None, smoothed=False)]


@dataclass
class PromptFormat:
    """How a question, its steps and its answer become text. Encoded segment by segment.

    On the command line \\n in a template is a newline, \\t a tab and \\\\ a backslash; quotes around the
    whole are no part of it.
    `chat`: the question is what a user says in the tokenizer's chat template, and the assistant's turn begins after it.
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
                f"The prompt format of 'step' is {self.step!r}; something must stand after {{}} to end a step."
            )

    @staticmethod
    def fill(template: str, text: str) -> str:
        """The text in its place; braces of its own, and other ones of the template, stay as they are."""
        before, after = template.split("{}")
        return before + text + after

    def written(self, steps: Sequence[str], answer: str) -> str:
        """What a model is to write."""
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


REASONING_FILE = "coconut.json"  # beside a model's weights


@dataclass(frozen=True)
class Reasoning:
    """How a trained model is to be asked: saved with its weights, so that nobody has to guess.

    `num_thoughts` is what inference uses; it never depends on the example's gold chain.
    """

    method: str = "coconut"
    stage: int = 0
    slot: Slot = Slot.thought
    markers: bool = True
    num_thoughts: int = 0
    thoughts_per_step: int = 1
    steps_cut: int | None = 0  # how many steps of the chain this stage no longer writes; None: all
    tokens_cut: int | None = 0  # how many tokens of it, likewise (iCoT)
    max_new_tokens: int = 128
    format: PromptFormat = field(default_factory=PromptFormat)
    modes: tuple[str, ...] = ()  # of a hybrid model: what it chooses from with its first token

    @classmethod
    def at(cls, plan: Plan, stage: Stage, max_new_tokens: int = 128) -> Reasoning:
        """How a model is asked after training in this stage."""
        return cls(
            method=plan.method,
            stage=stage.index,
            slot=stage.slot,
            markers=stage.markers,
            num_thoughts=stage.num_thoughts,
            thoughts_per_step=plan.thoughts_per_step,
            steps_cut=stage.steps_cut,
            tokens_cut=stage.tokens_cut,
            max_new_tokens=max_new_tokens,
            modes=tuple(form.mode for form in stage.modes),
        )

    def in_mode(self, name: str) -> Reasoning:
        """How it is asked after the control token of that mode."""
        mode = mode_named(name)
        return replace(
            self, slot=mode.slot, markers=mode.slot is Slot.thought, num_thoughts=mode.num_thoughts,
            steps_cut=mode.steps_cut, modes=(),
        )  # fmt: skip

    def forms(self, mode: str | None = None) -> list[Reasoning]:
        """Its modes, or the one of that name, each as it is asked; a model without modes is asked in one way."""
        return [self.in_mode(name) for name in self.modes if mode in (None, name)] or [self]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Reasoning:
        values = dict(values)
        form = PromptFormat(**values["format"])
        modes = tuple(values.get("modes", ()))
        return cls(**{**values, "slot": Slot(values["slot"]), "format": form, "modes": modes})
