"""The curriculum: the stages of a method, their lengths, and what each removes from the written chain.

`plan` expands a method and a curriculum into the explicit list of stages that a run logs, saves and trains through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from coconut.methods.modes import Mode, parse_mode
from coconut.methods.table import (
    CHOICES,
    HEADS,
    NOTHING,
    STUDENT,
    TEACHER,
    WRITTEN,
    Cut,
    Method,
    Slot,
    Spans,
    Term,
    Update,
    get_method,
)


class Unit(StrEnum):
    epochs = "epochs"
    updates = "updates"


class Mixing(StrEnum):
    """The stages from which a mixed example is drawn."""

    current = "current"  # 0 .. the current stage (superposition paper, arXiv 2505.12514)
    all = "all"  # 0 .. the example's number of steps (released Coconut code)
    earlier = "earlier"  # those before the current stage, stage i with weight i + 1 (arXiv 2602.22441)


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
    num_thoughts: int | None = None  # of methods that remove the whole chain at once; by default c * max_stage, or the
    # longest slot of the training data where thoughts are merged from the chain, for which it is the most in generation
    teacher_steps_cut: int = 1  # last steps of the chain that a teacher does not write (codi)
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
                            ("total_length", 1), ("start_stage", 0), ("num_thoughts", 0), ("teacher_steps_cut", 0),
                            ("icot_tokens", 1), ("icot_limit", 0), ("icot_stage_length", 1)]:  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"curriculum.{name} is {value}; it must be at least {least}.")
        if not 0.0 <= self.mixing_probability <= 1.0:
            raise ValueError(f"curriculum.mixing_probability is {self.mixing_probability}; it must be between 0 and 1.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curriculum:
        """Build one from a run's saved configuration."""
        return cls(**{**values, "length_unit": Unit(values["length_unit"]), "mixing": Mixing(values["mixing"])})


@dataclass(frozen=True)
class Form:
    """One sequence that is made of an example.

    `steps_cut` and `tokens_cut`: how many steps and tokens are removed from the front of the written chain, None for
    all. `steps_cut` is 0 in a form that cuts by tokens.
    """

    slot: Slot
    markers: bool
    slot_length: int  # positions of the slot; of merged thoughts the most in generation, 0 for what the data have
    steps_cut: int | None
    tokens_cut: int | None = 0
    last_steps_cut: int = 0  # steps that are removed from the end of the chain
    thoughts_per_step: int = 0  # positions of the slot that stand for one step; 0: they stand for none
    smoothed: bool = False  # iCoT: a random offset is added to tokens_cut, drawn per example and epoch
    draws_group: bool = False  # the group of merged thoughts is drawn per example and epoch
    mode: str = ""  # of a hybrid model: the mode whose control token stands before the slot
    name: str = STUDENT

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Form:
        return cls(**{**values, "slot": Slot.from_dict(values["slot"])})

    def describe(self) -> str:
        """The form in words, such as "2 thoughts, without the first 2 steps"."""
        if self.steps_cut is None or self.tokens_cut is None:
            left = "answer only"
        elif self.tokens_cut:
            left = f"without the first {self.tokens_cut} tokens of the chain"
        elif self.steps_cut:
            left = "without the first step" if self.steps_cut == 1 else f"without the first {self.steps_cut} steps"
        elif self.last_steps_cut:
            left = f"whole chain but its last {f'{self.last_steps_cut} steps' if self.last_steps_cut > 1 else 'step'}"
        else:
            left = "whole chain"
        if self.slot.merges:
            tokens = f"1 to {self.slot.max_group}" if self.draws_group else str(self.slot.group)
            return f"a thought for every {tokens} tokens of the chain, {left}"
        noun = self.slot.noun + "s" * (self.slot_length != 1)
        return f"{self.slot_length} {noun}, {left}" if self.slot_length else left


@dataclass(frozen=True)
class Stage:
    """One stage of a plan: its length, and the sequences that are made of each of its examples.

    `together`: sequences that stand in one batch. The first is what inference is like; a teacher may follow. `in_turn`:
    of a hybrid model, the sequences that each example cycles through, one per epoch.
    """

    index: int
    length: int
    together: tuple[Form, ...]
    in_turn: tuple[Form, ...] = ()

    @property
    def form(self) -> Form:
        """What inference is like."""
        return self.together[0]

    @property
    def forms_at_inference(self) -> tuple[Form, ...]:
        """The same for a hybrid model, which has one for each mode."""
        return self.in_turn or self.together[:1]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Stage:
        """Build one from the plan that a run saved."""
        forms = {key: tuple(map(Form.from_dict, values[key])) for key in ("together", "in_turn")}
        return cls(values["index"], values["length"], **forms)

    def checkpoint_score(self, accuracy: float, loss: float) -> tuple[float, float]:
        """The score by which the best checkpoint is chosen; higher is better.

        By accuracy, then loss. A hybrid model is chosen by loss, then accuracy: it has learned to begin with each
        mode equally often, so its accuracy depends on which mode it happens to choose.
        """
        return (-loss, accuracy) if self.in_turn else (accuracy, -loss)

    def describe(self) -> str:
        """The stage in words, such as "2 thoughts, without the first 2 steps"."""
        if self.in_turn:
            return f"each example as {', '.join(parse_mode(form.mode).token for form in self.in_turn)}"
        others = (f"; {form.name}: {form.describe()}" for form in self.together[1:])
        return self.form.describe() + "".join(others)


@dataclass(frozen=True)
class Plan:
    """The stages of a run, in order, and the terms of its loss.

    `mixing_forms`: the sequences from which mixing draws: those of stages 0 .. max_stage, and last the one without any
    step.
    """

    method: str
    unit: Unit
    stages: tuple[Stage, ...]
    terms: tuple[Term, ...] = (WRITTEN,)
    mixing_forms: tuple[Form, ...] = ()
    pad_thoughts: bool = True
    mixing: Mixing = Mixing.current
    mixing_probability: float = 0.0

    @property
    def trained_with_fewer_thoughts(self) -> bool:
        """Whether some examples of the last stage are trained with fewer thoughts than the stage has."""
        counts_steps = any(form.thoughts_per_step for form in self.stages[-1].forms_at_inference)
        return self.mixing_probability > 0 or (counts_steps and not self.pad_thoughts)

    def as_dict(self) -> dict[str, Any]:
        stages = [asdict(stage) for stage in self.stages]
        return {"method": self.method, "unit": self.unit.value, "stages": stages,
                "terms": {term.name: term.weight for term in self.terms}}  # fmt: skip


def plan(
    name: str,
    curriculum: Curriculum,
    weights: Mapping[str, float] | None = None,
    slot: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """Expand a method and a curriculum into the explicit stages of a run.

    In place of the method's own: `weights` of terms of the loss, by name (one of weight 0 is left out), fields of the
    `slot` by name (None: the method's own), and `options` of terms, by name.

    Raises ValueError if the method does not exist or has no such term, if its slot cannot be changed so, if it needs
    more thoughts than it gets, or if its stages do not fit into the total length.
    """
    method = get_method(name)
    method = replace(method, slot=_changed(name, method, slot or {}, curriculum.thoughts_per_step))
    unit, total = curriculum.length_unit.value, curriculum.total_length
    terms = _weighted(name, method, weights or {}, options or {})
    _check_merged(name, method, terms)
    depths = _depths(method, curriculum)
    last = curriculum.max_stage + curriculum.extra_stage
    if method.cut is Cut.steps:
        lengths = [curriculum.stage0_length] + [curriculum.stage_length] * last
        stages = [Stage(k, length, (form,)) for k, (form, length) in enumerate(zip(depths, lengths, strict=False))]
    elif method.cut is Cut.tokens:
        stages = _icot_stages(curriculum)
    elif method.cut is Cut.modes:
        stages = [Stage(0, total, (depths[0],), tuple(_mode_form(parse_mode(mode)) for mode in curriculum.modes))]
    else:
        form = {Cut.never: depths[0], Cut.last: depths[last], Cut.all: depths[-1]}[method.cut]
        if curriculum.num_thoughts is not None and method.cut is Cut.all and not method.slot.is_empty:
            form = replace(form, slot_length=curriculum.num_thoughts)
        stages = [Stage(0, total, (form,))]
    if method.fixed_length and not stages[0].form.slot_length:
        raise ValueError(f"{name} needs thoughts, but there are none. Set curriculum.num_thoughts, for example to 6.")
    if curriculum.num_thoughts is not None and not method.slot.is_empty and method.cut is not Cut.all:
        raise ValueError(
            f"curriculum.num_thoughts={curriculum.num_thoughts} is for methods that remove the whole chain at once; "
            f"{name} has curriculum.thoughts_per_step for each step that it removes. Set that instead."
        )
    if any(TEACHER in term.forms for term in terms):
        teacher = Form(NOTHING, False, 0, 0, last_steps_cut=curriculum.teacher_steps_cut, name=TEACHER)
        stages = [replace(stage, together=(*stage.together, teacher)) for stage in stages]

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
    # without a slot the depths would differ in nothing that the model sees
    mixes = method.cut is Cut.steps and not method.slot.is_empty
    return Plan(
        method=name,
        unit=curriculum.length_unit,
        stages=tuple(stage for stage in stages if stage.length > 0),
        terms=terms,
        mixing_forms=tuple(depths) if mixes else (),
        pad_thoughts=curriculum.pad_thoughts,
        mixing=curriculum.mixing,
        mixing_probability=curriculum.mixing_probability if mixes else 0.0,
    )


def _changed(name: str, method: Method, slot: Mapping[str, Any], thoughts_per_step: int) -> Slot:
    """The method's slot with these fields in place of its own, where they are not None."""
    given = {key: value for key, value in slot.items() if value is not None}
    if given.get("content", method.slot.content) is not method.slot.content:  # the method's numbers are for its own
        given = {key: getattr(Slot, key) for key in ("top_k", "temperature", "alpha", "layer")} | given
    if "update" in given and "iterations" not in given:
        if given["update"] is Update.sequential:
            given["iterations"] = 0
        elif given["update"] is not Update.teacher_forced and method.slot.thinks and not method.slot.in_parallel:
            raise ValueError(
                f"model.update={given['update'].value} updates the thoughts of {name} all at once, but it is not said "
                "how often. Set model.iterations, for example to 3."
            )
    changed = replace(method.slot, **given)
    per_step = method.iterations_per_step and changed.in_parallel
    return replace(changed, iterations_per=thoughts_per_step) if per_step else changed


def _weighted(
    name: str, method: Method, weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]]
) -> tuple[Term, ...]:
    """The method's terms with these weights and options, without those of weight 0."""
    known = {term.name: term for term in method.terms}
    if unknown := [key for key in (*weights, *options) if key not in known]:
        raise ValueError(f"{name} has no term {', '.join(map(repr, unknown))}. Its terms are {', '.join(known)}.")
    if below := {key: weight for key, weight in weights.items() if not weight >= 0}:
        raise ValueError(f"Weights of terms must be at least 0: {below}.")
    for key, given in options.items():
        if unknown := sorted(set(given) - set(known[key].options)):
            choices = ", ".join(known[key].options) or "none"
            raise ValueError(f"The term {key} of {name} has no option {', '.join(unknown)}. Its options: {choices}.")
    terms = [
        replace(term, weight=weights.get(name, term.weight), options={**term.options, **options.get(name, {})})
        for name, term in known.items()
    ]
    for term in terms:
        for option, choices in CHOICES.items():
            if (value := term.options.get(option, next(iter(choices)))) not in list(choices):
                one_of = ", ".join(choices)
                raise ValueError(f"term_options.{term.name}.{option} is {value!r}; it is one of {one_of}.")
        for option, default in known[term.name].options.items():
            _check_kind(f"term_options.{term.name}.{option}", term.options[option], default)
    for choice in ("spans", "compression"):
        if len({getattr(term, choice) for term in terms if term.weight} - {None}) > 1:
            raise ValueError(f"The terms of {name} have different {choice}, and a batch holds one kind of them.")
    if not any(term.weight for term in terms):
        raise ValueError(f"All terms of {name} have weight 0, so there is nothing to learn. Leave out terms.NAME=0.")
    return tuple(term for term in terms if term.weight)


def _check_merged(name: str, method: Method, terms: tuple[Term, ...]) -> None:
    """Raise ValueError for thoughts that are merged from a part of the chain, or for terms with other spans than these.

    The spans of such thoughts are `Spans.fixed`, and only theirs are.
    """
    if method.slot.merges and method.cut is not Cut.all:
        raise ValueError(
            f"model.update=teacher_forced merges the whole chain, and {name} keeps a part of it. Take method=colar or "
            "c_mtp."
        )
    if method.slot.merges and HEADS[method.slot.projector] not in {term.objective for term in terms}:
        raise ValueError(
            f"No term of {name} trains its head {method.slot.projector}: that is the objective "
            f"{HEADS[method.slot.projector]}. Give its term a weight above 0, or take the method's own head."
        )
    for term in terms:
        if term.spans and (term.spans is Spans.fixed) != method.slot.merges:
            needed = (
                "fixed: thoughts are merged from such spans"
                if method.slot.merges
                else "another one: thoughts are not merged from the chain"
            )
            raise ValueError(f"term_options.{term.name}.spans={term.spans} does not fit {name}, which needs {needed}.")


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Raise ValueError if an option is not of the kind of its default: a text, a whole number, or a finite number."""
    if isinstance(default, str):
        fits, kind = isinstance(value, str), "a name"
    elif isinstance(default, float):
        fits, kind = isinstance(value, (int, float)) and math.isfinite(value), "a number"
    else:
        fits, kind = isinstance(value, int) or (default is None and value is None), "a whole number"
    if not fits or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be {kind}.")


def _depths(method: Method, curriculum: Curriculum) -> list[Form]:
    """The sequences of the step curriculum: those of stages 0 .. max_stage, and the one without any step."""
    c, slot = curriculum.thoughts_per_step, method.slot
    cuts: list[int | None] = [*range(curriculum.max_stage + 1), None]
    return [
        Form(
            slot=slot,
            markers=method.markers,
            slot_length=0 if slot.is_empty or slot.merges else c * min(k, curriculum.max_stage),
            steps_cut=cut,
            thoughts_per_step=0 if method.fixed_length or slot.merges else c,
            draws_group=slot.max_group > 0,
        )
        for k, cut in enumerate(cuts)
    ]


def _mode_form(mode: Mode) -> Form:
    """The sequence of an example that is answered in this mode."""
    thinks = mode.slot.thinks
    return Form(mode.slot, thinks, mode.num_thoughts, mode.steps_cut, mode=mode.name)


def _icot_stages(curriculum: Curriculum) -> list[Stage]:
    """Each stage removes `icot_tokens` more than the one before; the last, beyond `icot_limit`, the whole chain."""
    cuts = range(0, curriculum.icot_limit + 1, curriculum.icot_tokens)
    forms = [Form(NOTHING, False, 0, steps_cut=0, tokens_cut=tokens, smoothed=True) for tokens in cuts]
    forms.append(Form(NOTHING, False, 0, steps_cut=None, tokens_cut=None))
    return [Stage(k, curriculum.icot_stage_length, (form,)) for k, form in enumerate(forms)]
