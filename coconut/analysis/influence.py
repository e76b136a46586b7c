"""The influence of each thought on later ones and on the answer, by intervention; the same for the written steps.

A unit (a thought, a pause or a written step) is changed, everything before it stays, and the change of what the model
predicts at later units and at the answer is measured.

Shapes: N questions, S columns after the prompts, U units, W columns of the widest unit, D width, H heads, C columns of
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.analysis.probes import Subject
from coconut.analysis.statistics import Bounds, column_means, difference_interval, partners, share, with_bounds
from coconut.analysis.unit_chain import Block, Change, Effects, KeysAndValues, UnitRunner, unit_chains
from coconut.runs.study import NotApplicable, Study
from coconut.utils.torch_utils import eval_mode

MAX_QUESTIONS = 200  # the first of the test questions
MAX_UNITS = 8  # of more thoughts these many are changed, evenly spaced; steps after these are not changed
SEED = 0
NO_CACHE = "Not every layer of this model keeps the keys and values of all positions."


@torch.no_grad()
def influence(subject: Subject) -> Study:
    """The effect of changing each unit on later units and on the answer (step-influence graph, arXiv 2602.08783).

    `of`: "thoughts", "pauses" or "steps", the written chain of the data, if the model was trained to write it from the
    start. A row for each `unit` that is changed, each `change`, and each `on`: a later unit, or None for the answer.
    `change`: what the unit's input is replaced by.
    - zeros; mean: the mean of all units; step_mean: the mean over questions at this place; other: another question's
      unit, of as many tokens; noise: a random vector of the same norm.
    - cache: the input stays, and the keys and values of the unit in all layers are those of another question with
      equally many tokens. Not for steps.
    - only: every other unit is replaced by its step_mean. none (`unit` 0): all of them are.
    `control`: the same change turned by a random rotation. It has the same norm and spans a subspace of the same
    dimension, in directions without meaning. `later`: "recomputed" if the thoughts after the unit are computed from
    what was changed; "kept" if they stay. Steps, pauses and thoughts that are updated all at once can only be kept.
    `kl`: the Kullback-Leibler divergence in nats of the predictions as trained from those after the change, summed over
    the tokens of `on`. A thought is predicted by the hidden state before it, read with the output layer; the answer by
    its tokens after the mark, with the right ones before them. Of the answer also `log_prob`, the change of the
    log-probability of the right one; `right`, the share of questions whose right tokens are all the likeliest; and
    `difference`, `right` minus that of the same questions as trained, for "only" minus that of "none", by pairs.
    `kl`, `log_prob` and `difference` are means over `questions`, with 95 % bootstrap intervals; `right` has Wilson's.
    facts, by `of`: `units`, their number; `right` and `log_prob` as trained. `left_out`: what was left out, and why.

    Raises NotApplicable for a model that has neither thoughts nor pauses and writes no steps, whose questions have no
    room for their answers, that chooses by itself how to answer, or that has gates for its words.
    """
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"units": {}, "right": {}, "log_prob": {}, "left_out": {}}
    if subject.lm.reasoning.modes:
        raise NotApplicable(f"{subject.lm.reasoning.method} chooses by its first token how it answers.")
    if subject.lm.gates:
        raise NotApplicable(
            "This model mixes what it expected into each word that it writes, and of the words of a given chain it "
            "expected nothing."
        )
    with eval_mode(subject.lm):
        for chain in unit_chains(subject, MAX_QUESTIONS, MAX_UNITS):
            runner = UnitRunner(subject.lm, chain, subject.batch_size)
            (trained,) = runner.effects([Change()])
            facts["units"][chain.of] = chain.count
            facts["right"][chain.of] = float(trained.right_N.mean())
            facts["log_prob"][chain.of] = float(trained.log_prob_N.mean())
            if chain.of != "steps" and not runner.cache:
                facts["left_out"][f"cache of {chain.of}"] = NO_CACHE
            if chain.too_long:
                facts["left_out"][f"questions with {chain.of}"] = f"{chain.too_long} have no room for their answers."
            variants = list(_variants(runner))
            effects = runner.effects([variant.change for variant in variants])
            rows += _rows(chain.of, chain.count, variants, effects, trained)
    if not rows:
        raise NotApplicable(
            f"{subject.lm.reasoning.method} has nothing in its slot and writes no steps, so nothing that could be "
            "changed stands between question and answer; or no question leaves room for its answer."
        )
    return Study("influence", rows, facts)


@dataclass(frozen=True)
class _Variant:
    """A change with its name. `valid_N`: the questions in which it can be made."""

    name: str
    unit: int
    change: Change
    valid_N: np.ndarray
    control: bool = False

    @property
    def key(self) -> dict[str, Any]:
        later = "kept" if self.change.recomputed is None else "recomputed"
        return {"unit": self.unit, "change": self.name, "control": self.control, "later": later}


def _variants(runner: UnitRunner) -> Iterator[_Variant]:
    """Every change of every unit, with later thoughts recomputed and kept, and its control."""
    chain = runner.chain
    changed = sorted({round(unit) for unit in np.linspace(1, chain.count, min(chain.count, MAX_UNITS))})
    for unit in changed:
        kept = [*_input_changes(runner, unit), *_cache_changes(runner, unit)]
        yield from kept
        if chain.in_turn:
            yield from (replace(each, change=replace(each.change, recomputed=unit)) for each in kept)
    everything = Block(runner, range(1, chain.count + 1))
    unit_NW = torch.zeros(everything.is_NW.shape, dtype=torch.long)
    unit_NW[everything.is_NW] = torch.from_numpy(chain.unit_NS)[everything.is_NS]
    means_NWD = everything.own_NWD.clone()
    for unit in range(1, chain.count + 1):
        block = Block(runner, [unit])
        means_NWD[unit_NW == unit] = block.mean()[block.is_NW]
    yield _Variant("none", 0, Change(everything, means_NWD), everything.valid_N)
    for unit in changed:
        new_NWD = torch.where((unit_NW == unit)[..., None], everything.own_NWD, means_NWD)
        yield _Variant("only", unit, Change(everything, new_NWD), (unit_NW == unit).any(1).numpy())


def _input_changes(runner: UnitRunner, unit: int) -> Iterator[_Variant]:
    block, embeds_NSD = Block(runner, [unit]), runner.embeds_NSD
    own_NWD, valid_N = block.own_NWD, block.valid_N
    is_unit_NS = torch.from_numpy((runner.chain.unit_NS > 0) & (runner.chain.unit_NS <= runner.chain.count))
    noise_NWD = torch.randn(own_NWD.shape, generator=torch.Generator().manual_seed(SEED + unit)).to(own_NWD)
    noise_NWD = noise_NWD * own_NWD.norm(dim=-1, keepdim=True) / noise_NWD.norm(dim=-1, keepdim=True)
    partner_N = partners(block.width_N.tolist())
    replacements = {
        "zeros": (torch.zeros_like(own_NWD), valid_N), "noise": (noise_NWD, valid_N),
        "mean": (embeds_NSD[is_unit_NS].mean(0).expand_as(own_NWD), valid_N),
        "step_mean": (block.mean(), valid_N), "other": (own_NWD[partner_N], valid_N & (partner_N >= 0)),
    }  # fmt: skip
    for name, (new_NWD, there_N) in replacements.items():
        turned_NWD = own_NWD + _rotated(new_NWD - own_NWD)
        yield _Variant(name, unit, Change(block, new_NWD), there_N)
        yield _Variant(name, unit, Change(block, turned_NWD), there_N, control=True)


def _cache_changes(runner: UnitRunner, unit: int) -> Iterator[_Variant]:
    if not runner.cache:
        return
    partner_N = partners([len(prompt) for prompt in runner.chain.prompts])
    new: KeysAndValues = []
    turned: KeysAndValues = []
    for layer in runner.cache:
        own = [part[:, :, unit - 1] for part in layer]
        other = [part[partner_N] for part in own]
        new.append((other[0], other[1]))
        rotated = [a + _rotated((b - a).flatten(1)).view_as(a) for a, b in zip(own, other, strict=True)]
        turned.append((rotated[0], rotated[1]))
    for keys_and_values, control in ((new, False), (turned, True)):
        change = Change(cached=unit, cache=keys_and_values)
        yield _Variant("cache", unit, change, partner_N >= 0, control)


def _rotated(rows: Tensor) -> Tensor:
    """Rows (..., D) turned by one random rotation of the space (Haar), the same for all rows of this width."""
    return rows @ _rotation(rows.shape[-1]).to(rows)


@cache
def _rotation(width: int) -> Tensor:
    normal = torch.randn(width, width, generator=torch.Generator().manual_seed(SEED))
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def _rows(
    of: str, count: int, variants: Sequence[_Variant], effects: Sequence[Effects], trained: Effects
) -> list[dict[str, Any]]:
    keys, columns, on_answers = [], [], []
    (none,) = (found for variant, found in zip(variants, effects, strict=True) if variant.name == "none")
    for variant, found in zip(variants, effects, strict=True):
        before = none if variant.name == "only" else trained
        for on in range(variant.unit + 1, count + 2):
            kl_N = np.where(variant.valid_N, found.kl_NU[:, on - 1], np.nan)
            is_there_N = ~np.isnan(kl_N)
            if not is_there_N.any():
                continue
            on_answer = on == count + 1
            questions = int(is_there_N.sum())
            keys.append({"of": of, **variant.key, "on": None if on_answer else on, "questions": questions})
            columns += [kl_N, np.where(is_there_N, found.log_prob_N - trained.log_prob_N, np.nan)]
            on_answers.append(_shares(before.right_N[is_there_N], found.right_N[is_there_N]) if on_answer else None)
    numbers_C3 = column_means(np.stack(columns, axis=1))
    rows = []
    for key, kl_3, log_prob_3, shares in zip(keys, numbers_C3[::2], numbers_C3[1::2], on_answers, strict=True):
        row = key | with_bounds("kl", kl_3) | with_bounds("log_prob", log_prob_3 if key["on"] is None else None)
        for name in ("right", "difference"):
            row |= with_bounds(name, shares and shares[name])
        rows.append(row)
    return rows


def _shares(before_M: np.ndarray, after_M: np.ndarray) -> dict[str, Bounds]:
    difference = float(after_M.mean() - before_M.mean()), *difference_interval(after_M[None], before_M[None])
    return {"right": share(after_M.tolist()), "difference": difference}
