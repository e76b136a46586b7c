"""Accuracy under Gaussian noise on the thoughts or the pauses, against the same noise on words of the question.

Shapes: N questions, K thoughts, D hidden, B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.analysis.probes import Subject, accuracy_of
from coconut.methods import Source
from coconut.models.latent_lm import LatentLM
from coconut.runs.study import NotApplicable, Study

SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)  # in multiples of the dispersion
SEED = 0


@torch.no_grad()
def noise_curves(subject: Subject) -> Study:
    """Accuracy with noise of growing size (Cui et al., arXiv 2602.22441).

    A row for each `where` and `sigma`. `thoughts`: noise is added to each thought before it is fed, so that later
    thoughts are computed from noisy ones; a sigma of 1 is the thoughts' own dispersion, the standard deviation of a
    coordinate over questions around the mean thought of its place. `pauses`: noise on the embeddings of the pauses.
    `words`: noise on the embeddings of as many words of each question as the slot has positions, drawn for each
    question. For both of these sigma is in units of the dispersion of the embeddings of the questions' words. sigma 0
    is the model as trained.
    facts: `dispersion`, of `thoughts` (None for pauses) and of `words`.

    Raises NotApplicable if the slot is empty.
    """
    lm, source = subject.lm, subject.lm.reasoning.slot.source
    if source is Source.none or not subject.num_trained_thoughts:
        raise NotApplicable(f"{lm.reasoning.method} has nothing in its slot to which noise could be added.")
    dispersion: dict[str, float | None] = {"thoughts": None, "words": _dispersion(subject.word_embeddings)}
    rows = []

    def add(where: str, sigma: float, evaluated: Any) -> None:
        rows.append({"where": where, "sigma": sigma, **accuracy_of(evaluated.result)})

    own = f"{source.value}s"
    if source is Source.thought:
        dispersion["thoughts"] = _dispersion(subject.baseline.thoughts)
    for where in (own, "words"):
        add(where, 0.0, subject.baseline)
        for sigma in SIGMAS:
            if where == "thoughts":
                add(where, sigma, subject.ask(thought_noise=sigma * (dispersion["thoughts"] or 0.0), seed=SEED))
                continue
            choose = _pauses(lm) if where == "pauses" else _some_words(lm, subject.num_trained_thoughts)
            with noisy_embeddings(lm, sigma * (dispersion["words"] or 0.0), choose):
                add(where, sigma, subject.ask())
    return Study("noise", rows, {"dispersion": dispersion, "positions": subject.num_trained_thoughts})


def _dispersion(rows: Tensor) -> float:
    """The standard deviation of a coordinate over the first dimension."""
    return float((rows - rows.mean(0)).square().mean().sqrt())


Choice = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # of a row's token ids (T,): a mask (T,)


def _pauses(lm: LatentLM) -> Choice:
    return lambda ids_T, random: ids_T == lm.special.pause


def _some_words(lm: LatentLM, count: int) -> Choice:
    def choose(ids_T: np.ndarray, random: np.random.Generator) -> np.ndarray:
        words = np.flatnonzero(~np.isin(ids_T, [*lm.special.added, lm.special.pad]))
        chosen = np.zeros_like(ids_T, dtype=bool)
        chosen[random.choice(words, min(count, len(words)), replace=False)] = True
        return chosen

    return choose


@contextmanager
def noisy_embeddings(lm: LatentLM, std: float, choose: Choice) -> Iterator[None]:
    """Add Gaussian noise to the input embeddings of chosen tokens of each prompt.

    A prompt is what is embedded with several columns at once, but for the words that a thought is made of. The noise of
    a row depends on its tokens alone, not on its batch.
    """
    makes_thought, thought = False, lm.thought

    def thought_without_noise(source_states: Tensor) -> Tensor:
        nonlocal makes_thought
        makes_thought = True
        try:
            return thought(source_states)
        finally:
            makes_thought = False

    def add_noise(module: Any, args: tuple[Tensor, ...], embeds_BTD: Tensor) -> Tensor:
        ids_BT = args[0].cpu().numpy()
        if makes_thought or ids_BT.ndim < 2 or ids_BT.shape[1] < 2:
            return embeds_BTD
        noise_BTD = np.zeros(embeds_BTD.shape, np.float32)
        for row, ids_T in enumerate(ids_BT):
            is_token_T = ids_T != lm.special.pad
            random = np.random.default_rng([SEED, *ids_T[is_token_T].tolist()])
            chosen_T = is_token_T & choose(ids_T, random)
            noise_BTD[row, chosen_T] = random.standard_normal((int(chosen_T.sum()), noise_BTD.shape[2]), np.float32)
        return embeds_BTD + std * torch.from_numpy(noise_BTD).to(embeds_BTD)

    handle = lm.base.get_input_embeddings().register_forward_hook(add_noise)
    lm.thought = thought_without_noise
    try:
        yield
    finally:
        del lm.thought
        handle.remove()
