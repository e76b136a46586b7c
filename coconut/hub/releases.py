"""The released codes whose checkpoints can be opened, as data: how they name weights, and how their models are asked.

Read in the source of facebookresearch/coconut, zhenyi4/codi (src/model.py, train.py, test.py) and InternLM/SIM-CoT
(Coconut/coconut.py, CODI/test.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from coconut.methods import METHODS, Curriculum, PromptFormat, Reasoning, plan


@dataclass(frozen=True)
class Release:
    """The checkpoints of one released code, and how their models are asked.

    `title`: for messages. `methods`: the entries of METHODS that they may have been trained by, the usual one first.
    `known_by`: prefixes of names that such a file has. `model`: matches the prefix of the model's names. `projector`:
    the prefixes of the projector's names, and ours. `left_out`: prefixes of names that are not loaded, and what they
    are; with an empty text they repeat others. `tokens`: those of the last rows of the embeddings, in their order.
    """

    title: str
    methods: tuple[str, ...]
    known_by: tuple[str, ...]
    model: re.Pattern[str]
    tokens: tuple[str, ...]
    format: PromptFormat
    max_new_tokens: int
    projector: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


_COCONUT = Release(
    title="Coconut (arXiv 2412.06769)",
    methods=("coconut", "cot", "no_cot", "icot", "without_curriculum", "without_thought", "sim_cot"),
    known_by=(),
    model=re.compile(r"(base_causallm\.)?"),
    tokens=("<bot>", "<eot>", "<latent>"),
    format=PromptFormat(),
    max_new_tokens=128,
    left_out={"embedding.weight": ""},
)
_CODI = Release(
    title="CODI (arXiv 2502.21074)",
    methods=("codi", "sim_cot_codi"),
    known_by=("codi.",),
    model=re.compile(r"codi\.(base_model\.model\.)?"),
    tokens=("[PAD]", "<bot>", "<eot>"),
    format=PromptFormat(question="{}", answer="The answer is: {}"),
    max_new_tokens=256,
    projector={"prj.1.": "0.", "prj.3.": "2.", "prj.ln.": "3."},
)
RELEASES = (  # those that are known by more names first
    replace(
        _CODI,
        title="SIM-CoT on CODI (arXiv 2509.20317)",
        methods=("sim_cot_codi",),
        known_by=("codi.", "decoder."),
        left_out={
            "decoder.": "the step decoder",
            "pj_in.": "the map into the step decoder",
            "pj_out.": "the map out of the step decoder",
        },
    ),
    _CODI,
    replace(
        _COCONUT,
        title="SIM-CoT on Coconut (arXiv 2509.20317)",
        methods=("sim_cot",),
        known_by=("base_causallm.", "expainable_llm."),
        left_out={**_COCONUT.left_out, "expainable_llm.": "the step decoder"},
    ),
    _COCONUT,
)


def identify(names: Iterable[str]) -> Release:
    """The release whose names these are. Names that none knows are taken for those of a model alone."""
    names = list(names)
    return next(
        release for release in RELEASES
        if all(any(name.startswith(prefix) for name in names) for prefix in release.known_by)
    )  # fmt: skip


def release_of(method: str) -> Release:
    """A release whose models are asked as one of this method. Raises ValueError if no released code trains it."""
    for release in RELEASES:
        if method in release.methods:
            return release
    known = ", ".join(dict.fromkeys(name for release in reversed(RELEASES) for name in release.methods))
    raise ValueError(f"method={method}: checkpoints of released code are opened for {known}. Name one of these.")


def released_reasoning(
    method: str, stage: int | None = None, thoughts_per_step: int = 1, num_thoughts: int | None = None,
    question: str = "",
) -> Reasoning:  # fmt: skip
    """How a model of released code is asked, which its checkpoint does not say.

    `stage`, `thoughts_per_step`: of methods whose thoughts or chain follow a curriculum. `num_thoughts`: of the others.
    `question`: the template of a question, if it is not the release's.

    Raises ValueError if no released code trains the method, or if its number of thoughts is missing or given twice.
    """
    release, entry = release_of(method), METHODS[method]
    if entry.fixed_length and num_thoughts is None:
        raise ValueError(
            f"Say how many thoughts the model has, num_thoughts=K: a checkpoint of {method} does not record it. The "
            "scripts of the released code have 6."
        )
    if entry.fixed_length and stage is not None:
        raise ValueError(f"stage={stage}: {method} has no stages. Give the number of its thoughts, num_thoughts=K.")
    if not entry.fixed_length and num_thoughts is not None:
        raise ValueError(
            f"num_thoughts={num_thoughts}: {method} has thoughts by its stage. Set stage=K and thoughts_per_step=C."
        )
    if not entry.slot.is_empty and not entry.fixed_length and stage is None:
        raise ValueError(
            f"Say in which stage the checkpoint was written, stage=K: {method} has thoughts according to it."
        )
    curriculum = Curriculum(
        max_stage=stage or 0, thoughts_per_step=thoughts_per_step, num_thoughts=num_thoughts, total_length=10**6
    )
    planned = plan(method, curriculum)
    reasoning = Reasoning.at(planned, planned.stages[-1], release.max_new_tokens)
    form = replace(release.format, question=question) if question else release.format
    return replace(reasoning, format=form)
