"""The curriculum: the stages of a method, their lengths, and what each removes from the written chain.

`plan` expands a method and a curriculum into the explicit list of stages that a run logs, saves and trains through.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from coconut.methods.modes import Mode, parse_mode
from coconut.methods.table import Cut, Method, Slot, get_method


class Unit(StrEnum):
    epochs = "epochs"
    updates = "updates"


class Mixing(StrEnum):
    """The stages from which a mixed example is drawn."""

    current = "current"  # 0 .. the current stage (superposition paper, arXiv 2505.12514)
    all = "all"  # 0 .. the example's number of steps (released Coconut code)


@dataclass
class Curriculum:
    """How fast the written chain is replaced. Lengths are counted in `length_unit`.

    The defaults are the paper's for ProsQA and ProntoQA: 5 epochs per stage, 50 in total, one thought per step
    (arXiv 2412.06769, section 4.2).
    """

    thoughts_per_step: int = 1  # c
    max_stage: int = 6
    extra_stage: bool = False  # after max_stage, one more stage that removes all remaining steps (GSM8K)
    length_unit: Unit = Unit.epochs
    stage0_length: int = 5  # length of stage 0
    stage_length: int = 5  # length of every later stage; the last one takes the rest of the total
    total_length: int = 50
    start_stage: int = 0  # skip the stages before this one (with init=RUN)
    pad_thoughts: bool = True  # an example with fewer steps than the stage removes still gets all the stage's thoughts
    mixing: Mixing = Mixing.current
    mixing_probability: float = 0.0  # share of examples trained at a random stage; only if the slot differs by stage
    icot_tokens: int = 8  # further tokens that each stage of icot removes
    icot_limit: int = 39  # a stage that would remove more tokens than this removes the whole chain
    icot_stage_length: int = 1  # length of a stage of icot
    modes: list[str] = field(default_factory=lambda: ["short", "think"])  # for hybrid_warmup

    def __post_init__(self) -> None:
        if len(self.modes) < 2 or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"curriculum.modes is {self.modes}; it must name at least two different modes.")
        for name in self.modes:
            parse_mode(name)
        for name, least in [("thoughts_per_step", 0), ("max_stage", 0), ("stage0_length", 0), ("stage_length", 1),
                            ("total_length", 1), ("start_stage", 0), ("icot_tokens", 1), ("icot_limit", 0),
                            ("icot_stage_length", 1)]:  # fmt: skip
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"curriculum.{name} is {value}; it must be at least {least}.")
        if not 0.0 <= self.mixing_probability <= 1.0:
            raise ValueError(f"curriculum.mixing_probability is {self.mixing_probability}; it must be between 0 and 1.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curriculum:
        """Build one from a run's saved configuration."""
        return cls(**{**values, "length_unit": Unit(values["length_unit"]), "mixing": Mixing(values["mixing"])})


@dataclass(frozen=True)
class Stage:
    """One stage of a plan: the layout of its examples, and its length.

    `steps_cut` and `tokens_cut`: how many steps and tokens are removed from the front of the written chain, None for
    all. `steps_cut` is 0 in a stage that cuts by tokens.
    """

    index: int
    length: int
    slot: Slot
    markers: bool
    num_thoughts: int  # tokens in the slot
    steps_cut: int | None
    tokens_cut: int | None = 0
    smoothed: bool = False  # iCoT: a random offset is added to tokens_cut, drawn per example and epoch
    mode: str = ""  # of a hybrid model: the mode whose control token stands before the slot
    modes: tuple[Stage, ...] = ()  # of a hybrid model: the layouts that each example cycles through, one per epoch

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """Build one from the plan that a run saved."""
        forms = tuple(cls.from_dict(form) for form in values.get("modes", ()))
        return cls(**{**values, "slot": Slot(values["slot"]), "modes": forms})

    def checkpoint_score(self, accuracy: float, loss: float) -> tuple[float, float]:
        """The score by which the best checkpoint is chosen; higher is better.

        By accuracy, then loss. A hybrid model is chosen by loss, then accuracy: it has learned to begin with each
        mode equally often, so its accuracy depends on which mode it happens to choose.
        """
        return (-loss, accuracy) if self.modes else (accuracy, -loss)

    def describe(self) -> str:
        """The stage in words, such as "2 thoughts, without the first 2 steps"."""
        if self.modes:
            return f"each example as {', '.join(parse_mode(form.mode).token for form in self.modes)}"
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

    `depths`: the layouts from which mixing draws: those of stages 0 .. max_stage, and last the one without any step.
    """

    method: str
    unit: Unit
    stages: tuple[Stage, ...]
    mixing_stages: tuple[Stage, ...] = ()
    thoughts_per_step: int = 1
    pad_thoughts: bool = True
    mixing: Mixing = Mixing.current
    mixing_probability: float = 0.0

    @property
    def trained_with_fewer_thoughts(self) -> bool:
        """Whether some examples of the last stage are trained with fewer thoughts than the stage has."""
        return self.mixing_probability > 0 or not self.pad_thoughts

    def as_dict(self) -> dict[str, Any]:
        return {"method": self.method, "unit": self.unit.value, "stages": [asdict(s) for s in self.stages]}


def plan(name: str, curriculum: Curriculum) -> Plan:
    """Expand a method and a curriculum into the explicit stages of a run.

    Raises ValueError if the method does not exist, or its stages do not fit into the total length.
    """
    method = get_method(name)
    unit, total = curriculum.length_unit.value, curriculum.total_length
    depths = _mixing_stages(method, curriculum)
    last = curriculum.max_stage + curriculum.extra_stage
    if method.cut is Cut.steps:
        lengths = [curriculum.stage0_length] + [curriculum.stage_length] * last
        stages = [replace(stage, length=length) for stage, length in zip(depths, lengths, strict=False)]
    elif method.cut is Cut.tokens:
        stages = _icot_stages(curriculum)
    elif method.cut is Cut.modes:
        stages = [
            replace(depths[0], length=total, modes=tuple(_mode_stage(parse_mode(name)) for name in curriculum.modes))
        ]
    else:
        single = {Cut.never: depths[0], Cut.last: depths[last], Cut.all: depths[-1]}
        stages = [replace(single[method.cut], index=0, length=total)]

    if curriculum.start_stage >= len(stages):
        raise ValueError(
            f"curriculum.start_stage is {curriculum.start_stage}, but {name} has stages 0 to {len(stages) - 1}."
        )
    stages = stages[curriculum.start_stage :]
    before = sum(stage.length for stage in stages[:-1])
    if before >= total:
        raise ValueError(
            f"The stages of {name} before the last one take {before} {unit}, and curriculum.total_length is {total}: "
            f"nothing is left for stage {stages[-1].index}. Raise curriculum.total_length above {before}, or lower "
            "curriculum.stage0_length, curriculum.stage_length or curriculum.max_stage."
        )
    stages[-1] = replace(stages[-1], length=total - before)
    mixes = (
        method.cut is Cut.steps and method.slot is not Slot.none
    )  # else depths would differ in nothing that the model sees
    return Plan(
        method=name,
        unit=curriculum.length_unit,
        stages=tuple(stage for stage in stages if stage.length > 0),
        mixing_stages=tuple(depths) if mixes else (),
        thoughts_per_step=curriculum.thoughts_per_step,
        pad_thoughts=curriculum.pad_thoughts,
        mixing=curriculum.mixing,
        mixing_probability=curriculum.mixing_probability if mixes else 0.0,
    )


def _mixing_stages(method: Method, curriculum: Curriculum) -> list[Stage]:
    """The layouts of the step curriculum: those of stages 0 .. max_stage, and the one without any step."""
    c, slot = curriculum.thoughts_per_step, method.slot
    cuts: list[int | None] = [*range(curriculum.max_stage + 1), None]
    return [
        Stage(
            index=k,
            length=0,
            slot=slot,
            markers=method.markers,
            num_thoughts=0 if slot is Slot.none else c * min(k, curriculum.max_stage),
            steps_cut=cut,
        )
        for k, cut in enumerate(cuts)
    ]


def _mode_stage(mode: Mode) -> Stage:
    """The layout of an example that is answered in this mode."""
    thinks = mode.slot is Slot.thought
    return Stage(0, 0, mode.slot, thinks, mode.num_thoughts, mode.steps_cut, mode=mode.name)


def _icot_stages(curriculum: Curriculum) -> list[Stage]:
    """Each stage removes `icot_tokens` more than the one before; the last, beyond `icot_limit`, the whole chain."""
    cuts = list(range(0, curriculum.icot_limit + 1, curriculum.icot_tokens))
    whole = Stage(0, curriculum.icot_stage_length, Slot.none, markers=False, num_thoughts=0, steps_cut=0, smoothed=True)
    stages = [replace(whole, index=k, tokens_cut=tokens) for k, tokens in enumerate(cuts)]
    return [*stages, replace(whole, index=len(cuts), steps_cut=None, tokens_cut=None, smoothed=False)]
