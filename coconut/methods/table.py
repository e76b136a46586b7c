"""The table of methods.

A method says which sequences are made of an example and what is learned from them:

    slot        what stands between the question and the written chain: its source, its update, its projector
    cut         what is removed from the front of the written chain, and when
    markers     whether `<bot>` and `<eot>` stand around the slot
    teacher     whether the same weights read a second sequence of the example: the written chain, without a slot
    terms       the terms of the loss: next-token prediction of a sequence, and what else is predicted or matched

The first eight entries of `METHODS` are the rows of Table 1 in Hao et al., "Training Large Language Models to Reason
in a Continuous Latent Space", arXiv 2412.06769. `Method.paper` is the source of each; of `hybrid_warmup` that of
Thinkless, of `soft_coconut` that of the mixtures (Soft Thinking), of a method on another one that of what it adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any


class Source(StrEnum):
    """What fills the slot. The value is the noun for one position of it."""

    none = "nothing"
    pause = "pause"  # a learned <pause> token
    thought = "thought"  # made of the states before it, and fed back


class Content(StrEnum):
    """What a thought is made of."""

    state = "state"  # the last hidden state (Coconut)
    mixture = "mixture"  # the words' input embeddings, weighted by the model's own next-token distribution
    fused = "fused"  # a weighted sum of a hidden state and the mixture (LT-Tuning)


class Update(StrEnum):
    """How the positions of a slot with thoughts get their inputs."""

    sequential = "sequential"  # one after the other: each is the state before it
    jacobi = "jacobi"  # all at once, several times: each becomes the state before it in the iteration before (PCCoT)
    loop = "loop"  # all at once, several times: each becomes its own embedding plus its own last state (LOTUS)
    teacher_forced = "teacher_forced"  # in training from the written chain; in generation a head predicts each


class Projector(StrEnum):
    """What the content of a thought passes before it is fed back. It stays at inference."""

    none = "none"
    mlp_ln = "mlp_ln"  # Linear, GELU, Linear, LayerNorm (CODI)
    gaussian = "gaussian"  # mean and deviation of the next merged embedding (CoLaR)
    multi_token = "multi_token"  # the tokens of the next group, whose embeddings are merged (C-MTP)


# the heads that predict thoughts made of the chain, and the objective that trains each
HEADS = {Projector.gaussian: "latent", Projector.multi_token: "multi_token"}


class Pooling(StrEnum):
    """How the embeddings of a group of n tokens become one thought."""

    sqrt = "sqrt"  # their sum, divided by the square root of n, which keeps the variance (CoLaR)
    mean = "mean"  # C-MTP


@dataclass(frozen=True)
class Slot:
    """What stands between the question and the written chain.

    Thoughts that are updated all at once begin as the embeddings of the latent token, in iteration 0. They are updated
    `iterations` times, or with `iterations_per` so often for each so many positions: LOTUS has a loop for each step.

    A mixture is of the `top_k` most probable words (0: of all) of softmax(logits / temperature). A fused thought is
    alpha * h + (1 - alpha) * mixture, where h is the hidden state of `layer`: 0 is the input of the first layer, -1 or
    the number of layers the last hidden state, after the final norm.

    Thoughts that are teacher-forced are the merged embeddings of `group` tokens of the chain each, so that their number
    follows from the chain; in generation a head predicts them until the model says `<eot>`. With `max_group` the group
    of each training example is drawn from 1 to `max_group`, anew in each epoch, and a token `<rate_N>` in the place of
    `<bot>` says which; `group` is then that of generation. `scale`: what the Gaussian head predicts is divided by it;
    0: by the standard deviation of the embedding table.
    """

    source: Source
    projector: Projector = Projector.none
    width: int = 0  # of the projector's hidden layer; 0: that of the model
    update: Update = Update.sequential
    iterations: int = 0  # how often all positions are updated at once; with 0 they are pauses
    iterations_per: int = 0  # 0: the slot's length does not matter
    content: Content = Content.state
    top_k: int = 0
    temperature: float = 1.0
    alpha: float = 0.5
    layer: int = -1
    group: int = 0  # tokens of the chain that one thought stands for; 0: thoughts are not made of the chain
    max_group: int = 0  # 0: `group` in training too
    pooling: Pooling = Pooling.sqrt
    scale: float = 0.0

    def __post_init__(self) -> None:
        self._check_content()
        self._check_merging()
        if self.source is not Source.thought and (self.in_parallel or self.iterations):
            raise ValueError(
                f"Thoughts are updated, and the slot of this method holds {self.source.value}. Leave out model.update "
                "and model.iterations."
            )
        if self.iterations and not self.in_parallel:
            raise ValueError(
                f"model.iterations={self.iterations} is for thoughts that are updated all at once. Those of this "
                "method are computed one after the other. Leave it out, or set model.update=jacobi or loop."
            )
        if self.iterations < 0:
            raise ValueError(f"model.iterations is {self.iterations}; it must be at least 0.")
        if self.source is not Source.thought and (self.projector is not Projector.none or self.width):
            raise ValueError(
                f"A projector maps thoughts, and the slot of this method holds {self.source.value}. Leave out "
                "model.projector and model.projector_width."
            )
        if self.width and self.projector is Projector.none:
            raise ValueError(f"model.projector_width={self.width} needs a projector. Set model.projector=mlp_ln.")

    def _check_content(self) -> None:
        if self.source is not Source.thought and self.content is not Content.state:
            raise ValueError(
                f"A {self.content.value} is the content of a thought, and the slot of this method holds "
                f"{self.source.value}. Leave out model.content."
            )
        for name, key, its in (
            ("top_k", "model.top_k", MIXED), ("temperature", "model.mixture_temperature", MIXED),
            ("alpha", "model.alpha", (Content.fused,)), ("layer", "model.layer", (Content.fused,)),
        ):  # fmt: skip
            if (value := getattr(self, name)) != getattr(Slot, name) and self.content not in its:
                raise ValueError(
                    f"{key}={value} is for model.content={' or '.join(its)}, and the thoughts of this method have "
                    f"the content {self.content.value}. Leave it out, or set model.content."
                )
        if self.top_k < 0:
            raise ValueError(f"model.top_k is {self.top_k}; it must be at least 0, which takes all words.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"model.mixture_temperature is {self.temperature}; it must be above 0.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"model.alpha is {self.alpha}; it must be between 0 (mixture) and 1 (hidden state).")
        if self.layer < -1:
            raise ValueError(f"model.layer is {self.layer}; it is the number of a layer, or -1 for the last.")

    def _check_merging(self) -> None:
        if self.merges != (self.projector in HEADS) or self.merges != (self.group > 0):
            raise ValueError(
                f"Thoughts that are merged from the chain need model.update=teacher_forced, a head (model.projector="
                f"{' or '.join(HEADS)}) and model.group of at least 1. This method has update={self.update}, "
                f"projector={self.projector} and group={self.group}. Take method=colar or c_mtp."
            )
        if self.merges and self.content is not Content.state:
            raise ValueError(
                f"Thoughts that are merged from the chain are predicted by a head; model.content={self.content.value} "
                "is for thoughts that are fed back. Leave it out."
            )
        if not self.merges and (self.max_group or self.scale or self.pooling is not Pooling.sqrt):
            raise ValueError(
                "model.max_group, model.pooling and model.thought_scale are for thoughts that are merged from the "
                "chain (method=colar or c_mtp). Leave them out."
            )
        if self.merges and self.max_group and not 1 <= self.group <= self.max_group:
            raise ValueError(f"model.group is {self.group}; it must be between 1 and model.max_group={self.max_group}.")
        if self.max_group and self.projector is Projector.multi_token:
            raise ValueError(
                f"model.max_group={self.max_group} draws groups of several sizes, and the head multi_token predicts "
                "groups of one. Set model.max_group=0."
            )
        if self.scale < 0:
            raise ValueError(f"model.thought_scale is {self.scale}; it must be above 0.")
        if self.scale and self.projector is not Projector.gaussian:
            raise ValueError(
                f"model.thought_scale={self.scale} is for the head gaussian, and this one is {self.projector}. Leave "
                "it out."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Slot:
        kinds = {"source": Source, "projector": Projector, "update": Update, "content": Content, "pooling": Pooling}
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**{name: kinds.get(name, lambda value: value)(value) for name, value in known.items()})

    @property
    def thinks(self) -> bool:
        return self.source == Source.thought

    @property
    def is_empty(self) -> bool:
        return self.source == Source.none

    @property
    def cannot_be_given(self) -> str:
        """Why one pass over given thoughts cannot tell what the model's own would be; empty if it can."""
        if self.in_parallel:
            return "its thoughts are updated all at once, so that none comes after given ones before it"
        if self.reads_layer:
            return (
                "its thoughts are made of the states of an inner layer, which a pass over given thoughts does not keep"
            )
        return ""

    @property
    def in_parallel(self) -> bool:
        """Whether all positions are updated at once."""
        return self.update in (Update.jacobi, Update.loop)

    @property
    def merges(self) -> bool:
        """Whether thoughts are merged from the chain in training, and end themselves in generation."""
        return self.update is Update.teacher_forced

    @property
    def noun(self) -> str:
        return self.source.value

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of a hidden state and of a mixture in the content of a thought."""
        state = {Content.state: 1.0, Content.mixture: 0.0, Content.fused: self.alpha}[self.content]
        return state, 1 - state

    @property
    def read_by_head(self) -> bool:
        """Whether thoughts are last hidden states, which the model's head turns into probabilities of words."""
        return not self.merges and self.weights[0] == 1 and not self.reads_layer

    @property
    def reads_layer(self) -> bool:
        """Whether a thought is made of the state of a named layer beside the last hidden state."""
        return self.content is Content.fused and self.alpha > 0 and self.layer != -1

    def describe(self) -> str:
        """The content of thoughts, the projector and the update in words."""
        words = f"{self.top_k or 'all'} words at temperature {self.temperature:g}"
        of_layer = "the last layer" if self.layer == -1 else f"layer {self.layer}"
        content = {
            Content.state: "",
            Content.mixture: f"mixtures of {words}, ",
            Content.fused: f"{self.alpha:g} of the state of {of_layer} and the rest of mixtures of {words}, ",
        }[self.content]
        return content + self._describe_update()

    def _describe_update(self) -> str:
        projector = "no projector" if self.projector is Projector.none else f"the projector {self.projector.value}"
        projector += f" of width {self.width}" if self.width else ""
        if self.merges:
            drawn = (
                f"1 to {self.max_group} tokens, in generation {self.group},"
                if self.max_group
                else f"{self.group} tokens"
            )
            return f"{projector}, merged from {drawn} by {self.pooling}"
        if not self.in_parallel:
            return projector
        each = f" for every {self.iterations_per} thoughts" if self.iterations_per > 1 else ""
        each = " for every thought" if self.iterations_per == 1 else each
        return f"{projector}, updated by {self.update.value} x {self.iterations}{each}"

    def count_iterations(self, length: Any) -> Any:
        """How often slots of this length, a number or an array, are updated all at once."""
        if not self.iterations_per:
            return self.iterations + 0 * length
        return self.iterations * -(-length // self.iterations_per)

    def passes(self, length: Any) -> Any:
        """Forward passes of sequences whose slot has this length, a number or an array, without given thoughts.

        In sequence each thought waits for the one before it. In parallel there is one pass for what precedes the
        thoughts, one for each iteration, and one for their last inputs with what follows.
        """
        if not self.in_parallel:
            return 1 + length * self.thinks
        iterations = self.count_iterations(length)
        return 1 + (length > 0) * (iterations > 0) * (iterations + 1)

    def training_passes(self, length: Any) -> Any:
        """The same in training, where merged thoughts are given."""
        return 1 + 0 * length if self.merges else self.passes(length)

    def passes_before_answer(self, length: int) -> int:
        """Forward passes of generation between the question's and the answer's: of thoughts and what follows them."""
        if not self.thinks or not (length or self.merges):
            return 0
        return 1 + (self.count_iterations(length) + 1 if self.in_parallel else length)


MIXED = (Content.mixture, Content.fused)
NOTHING, PAUSES, THOUGHTS = Slot(Source.none), Slot(Source.pause), Slot(Source.thought)


class Cut(StrEnum):
    """What is removed from the front of the written chain, and when."""

    never = "never"
    steps = "steps"  # stage k removes the first k steps
    last = "last"  # what the last stage of `steps` removes, from the first update
    tokens = "tokens"  # every stage removes a few more tokens (iCoT)
    all = "all"
    modes = "modes"  # depends on the mode of the example


class At(StrEnum):
    """The places of a sequence that a term reads, which the data have to name."""

    targets = "targets"  # the hidden states that predict its targets
    answer_prompt = "answer_prompt"  # the hidden state that predicts the first token of the answer itself
    thoughts = "thoughts"  # the thoughts as they are fed, with the spans of the chain that they stand for
    before_thoughts = "before_thoughts"  # the hidden states before them, which would predict them if they were words
    cache = "cache"  # keys and values of the thoughts, and of a chain that is written


class Spans(StrEnum):
    """How the tokens of the steps that are not written are divided among the thoughts."""

    steps = "steps"  # a step for each `thoughts_per_step` thoughts; the last ones have all further steps
    tokens = "tokens"  # the same, then a token for each thought, in order; tokens beyond the thoughts are left out
    even = "even"  # equally many tokens for each thought, up to one
    random = "random"  # at least one token for each thought, divided at places drawn for each example and epoch
    fixed = "fixed"  # the slot's `group` of tokens for each thought, fewer for the last; then `<eot>`


class Compression(StrEnum):
    """Which tokens of a written chain stay, as many as there are thoughts, in a term that reads the cache."""

    rkv = "rkv"  # the important ones that are unlike the others (R-KV), chosen for each layer and head
    uniform = "uniform"  # equally far apart
    random = "random"  # drawn for each example and epoch


class Per(StrEnum):
    """What the sum of a term is divided by, counted over the whole update."""

    token = "token"
    example = "example"
    span = "span"  # spans of the chain that thoughts stand for
    span_token = "span_token"  # their tokens
    token_or_span = "token_or_span"  # target tokens and spans together


STUDENT, TEACHER = "student", "teacher"  # names of forms; the first one is what inference is like


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    `objective`: the module of coconut.objectives that computes it. `of`: the form that learns from it; `to`: the form
    that it is held to, which gets no gradient. `weight` is overridden by terms.NAME on the command line; with 0 the
    term, and what only it needs, is left out. `options`: the objective's own settings with their defaults, overridden
    by term_options.NAME.OPTION. The option `spans`, by default `steps`, is one of `Spans`; `compression` is one of
    `Compression`.
    """

    name: str
    objective: str = "tokens"
    of: str = STUDENT
    to: str = ""
    at: At = At.targets
    per: Per = Per.token
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forms(self) -> set[str]:
        return {self.of, self.to} - {""}

    @property
    def spans(self) -> Spans | None:
        """How the chain is divided among the thoughts, of a term that reads them."""
        reads_thoughts = self.at in (At.thoughts, At.before_thoughts)
        return Spans(self.options.get("spans", Spans.steps)) if reads_thoughts else None

    @property
    def compression(self) -> Compression | None:
        """Which tokens of the chain stay, of a term that reads the cache."""
        return Compression(self.options["compression"]) if self.at is At.cache else None


WRITTEN = Term("tokens")


CHOICES: dict[str, type[StrEnum]] = {"spans": Spans, "compression": Compression}  # options of any term


@dataclass(frozen=True)
class Method:
    """One entry of the table. `summary` describes it in run plans, reports and tables.

    `fixed_length`: the slot has `curriculum.num_thoughts` positions whatever the chain, and none is counted for a step;
    otherwise it has `thoughts_per_step` for each step that is removed. `iterations_per_step`: the slot's iterations are
    those for each step that is removed. `paper`: the arXiv number of its source.
    """

    slot: Slot
    cut: Cut
    markers: bool
    summary: str
    terms: tuple[Term, ...] = (WRITTEN,)
    teacher: bool = False
    fixed_length: bool = False
    iterations_per_step: bool = False
    paper: str = "2412.06769"

    def __post_init__(self) -> None:
        thinks = self.slot.thinks
        assert self.markers or not thinks, "thoughts need <eot>: the first word is predicted from it"


_COCONUT = Method(THOUGHTS, Cut.steps, True, "stage k: the first k steps become k*c thoughts")
_CODI = Method(
    slot=Slot(Source.thought, Projector.mlp_ln),
    cut=Cut.all,
    markers=True,
    summary="thoughts for the whole chain, held to where the written chain leads",
    terms=(
        WRITTEN,
        Term("teacher", of=TEACHER),
        Term("states", "states", STUDENT, TEACHER, At.answer_prompt, Per.example, options={"first_layer": 0}),
    ),
    teacher=True,
    fixed_length=True,
    paper="2502.21074",
)
_PCCOT = replace(
    _CODI,
    slot=Slot(Source.thought, update=Update.jacobi, iterations=3),
    summary="CODI whose thoughts are updated all at once",
    terms=(*_CODI.terms[:2], replace(_CODI.terms[2], options={"first_layer": 1})),
    paper="2506.18582",
)
_MUX = Term("spans", "spans", at=At.thoughts, per=Per.span, options={"spans": "random", "rho": 0.9, "temperature": 1.0})
_KAVA = Term(
    "cache", "cache", STUDENT, TEACHER, At.cache, Per.example,
    options={"compression": "rkv", "importance": 0.1, "distance": "smooth_l1"},
)  # fmt: skip
_LOTUS = replace(
    _MUX, at=At.before_thoughts, weight=0.05,
    options={"spans": "tokens", "rho": 1.0, "temperature": 1.0, "iteration": "last"},
)  # fmt: skip
_STEPS = Term("steps", "steps", at=At.thoughts, per=Per.span, options={"layers": None})
_COLAR = Method(
    slot=Slot(
        Source.thought, Projector.gaussian, update=Update.teacher_forced, group=2, max_group=5, pooling=Pooling.sqrt
    ),
    cut=Cut.all,
    markers=True,
    summary="the chain's words merged into thoughts, each predicted as a Gaussian; the rate is said in the prompt",
    terms=(
        replace(WRITTEN, per=Per.token_or_span),
        Term("random_token", "random_token", at=At.before_thoughts, per=Per.token_or_span, options={"spans": "fixed"}),
        Term("latent", "latent", at=At.before_thoughts, per=Per.span, options={"spans": "fixed"}),
    ),
    paper="2505.16552",
)
_C_MTP = Method(
    slot=Slot(Source.thought, Projector.multi_token, update=Update.teacher_forced, group=2, pooling=Pooling.mean),
    cut=Cut.all,
    markers=True,
    summary="the chain's words merged into thoughts, each predicted as the words of the next one",
    terms=(
        WRITTEN,
        Term("multi_token", "multi_token", at=At.before_thoughts, per=Per.span_token, options={"spans": "fixed"}),
        replace(_CODI.terms[1], weight=0.5),
        _CODI.terms[2],
    ),
    teacher=True,
    paper="2607.16972",
)

METHODS: dict[str, Method] = {
    "coconut": _COCONUT,
    "cot": Method(NOTHING, Cut.never, False, "the whole chain in words"),
    "no_cot": Method(NOTHING, Cut.all, False, "the answer at once"),
    "icot": Method(NOTHING, Cut.tokens, False, "the chain is removed token by token", paper="2405.14838"),
    "pause": Method(PAUSES, Cut.all, True, "pause tokens, then the answer; no curriculum", paper="2310.02226"),
    "without_curriculum": Method(THOUGHTS, Cut.last, True, "Coconut's last stage from the start"),
    "without_thought": Method(NOTHING, Cut.steps, False, "Coconut's curriculum, nothing in the slot"),
    "pause_as_thought": Method(PAUSES, Cut.steps, True, "Coconut's curriculum, pauses in the slot"),
    "hybrid_warmup": Method(
        NOTHING, Cut.modes, False, "each example in each mode, after its control token", paper="2505.13379"
    ),
    "codi": _CODI,
    "pause_codi": replace(_CODI, slot=PAUSES, summary="CODI with pause tokens in place of thoughts"),
    "pccot": _PCCOT,
    "kava": replace(
        _PCCOT,
        slot=replace(_PCCOT.slot, projector=Projector.mlp_ln),
        summary="PCCoT whose thoughts are held to the compressed cache of the written chain",
        terms=(*_PCCOT.terms, _KAVA),
        paper="2510.02312",
    ),
    "mux": replace(
        _CODI,
        summary="CODI whose thoughts are held to mixtures of the chain's words",
        terms=(*_CODI.terms, _MUX),
        paper="2607.18264",
    ),
    "lotus": Method(
        slot=Slot(Source.thought, update=Update.loop, iterations=1),
        cut=Cut.steps,
        markers=True,
        summary="stage k: the first k steps become k*c thoughts, updated k times and held to the steps' words",
        terms=(WRITTEN, _LOTUS),
        iterations_per_step=True,
        paper="2606.31779",
    ),
    "sim_cot": replace(
        _COCONUT,
        summary="Coconut, and a decoder writes each step from its thoughts",
        terms=(WRITTEN, _STEPS),
        paper="2509.20317",
    ),
    "sim_cot_codi": replace(
        _CODI,
        summary="CODI, and a decoder writes each step from its thought",
        terms=(*_CODI.terms, _STEPS),
        paper="2509.20317",
    ),
    "soft_coconut": replace(
        _COCONUT,
        slot=Slot(Source.thought, content=Content.mixture),
        summary="Coconut whose thoughts are mixtures of words' embeddings",
        paper="2505.15778",
    ),
    "lt_tuning": replace(
        _COCONUT,
        slot=Slot(Source.thought, content=Content.fused),
        summary="Coconut whose thoughts are sums of a hidden state and a mixture of words' embeddings",
        paper="2602.10229",
    ),
    "colar": _COLAR,
    "c_mtp": _C_MTP,
}


def get_method(name: str) -> Method:
    """The entry of METHODS with this name. Raises ValueError with all names if there is none."""
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}. The methods are: {', '.join(METHODS)}.")
    return METHODS[name]
