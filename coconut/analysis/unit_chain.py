"""The units between question and answer, and a runner that feeds them with changes.

A *unit* is a thought, a pause or a written step.

Shapes: N questions, B of a batch, T columns of the prompts, S columns after them, U units, D width, H heads, V
vocabulary, M predicted tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.analysis.context import Context
from coconut.analysis.probes import Subject
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_answers, encode_texts
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import think
from coconut.methods import PromptFormat
from coconut.models.latent_lm import LatentLM

KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer


@dataclass(frozen=True)
class UnitChain:
    """What stands between the prompts and the end of the right answers: token ids (N, S), padded on the right.

    `of`: "thoughts", "pauses" or "steps". `unit_NS`: the unit of each column, 1 to `count`; `count` + 1 for the answer
    after its mark; 0 for anything else. `in_turn`: whether a thought is computed from the one before it. `too_long`:
    how many questions were left out, without room for their answers.
    """

    of: str
    prompts: list[list[int]]
    ids_NS: np.ndarray
    unit_NS: np.ndarray
    count: int
    in_turn: bool
    too_long: int


def unit_chains(subject: Subject, max_questions: int, max_steps: int) -> Iterator[UnitChain]:
    """The model's slot, and the written chain of the data if the model was trained to write it from its start."""
    reasoning, count = subject.lm.reasoning, subject.num_trained_thoughts
    if not reasoning.slot.is_empty and count:
        of, in_turn = f"{reasoning.slot.source.value}s", reasoning.slot.thinks and not reasoning.slot.in_parallel
        chain = _chain(subject, of, count, reasoning.steps_cut, max_questions, 0, in_turn)
        if chain.prompts:
            yield chain
    writes_all = reasoning.steps_cut == 0 and reasoning.tokens_cut == 0
    if writes_all or (subject.mixed and reasoning.thoughts_per_step):
        chain = _chain(subject, "steps", 0, 0, max_questions, max_steps, in_turn=False)
        if chain.prompts and chain.count:
            yield chain


def _chain(
    subject: Subject, of: str, slot_length: int, steps_cut: int | None, max_questions: int, max_steps: int,
    in_turn: bool,
) -> UnitChain:  # fmt: skip
    lm, form, examples = subject.lm, subject.lm.reasoning.format, subject.examples[:max_questions]
    slot = slot_with_markers(lm.reasoning, lm.special, slot_length).tolist()
    bot, slot = slot[: int(lm.reasoning.markers)], slot[int(lm.reasoning.markers) :]
    answers, marks = encode_answers(lm.tokenizer, [example.answer for example in examples], form)
    written = [() if steps_cut is None else example.steps[steps_cut:] for example in examples]
    count = slot_length or min(max(map(len, written), default=0), max_steps)
    ids, units = [], []
    for steps, answer, mark in zip(written, answers, marks, strict=True):
        row, unit = list(slot), [k if k <= slot_length else 0 for k in range(1, len(slot) + 1)]
        texts = encode_texts(lm.tokenizer, [PromptFormat.fill(form.step, step) for step in steps])
        for number, step in enumerate(texts, 1):
            row += step
            unit += [number if number <= count and not slot_length else 0] * len(step)
        ids.append(row + answer)
        units.append(unit + [0] * mark + [count + 1] * (len(answer) - mark))
    prompts = [[*question, *bot] for question in subject.question_ids[: len(examples)]]
    fits = [len(prompt) + len(row) <= lm.max_sequence_length for prompt, row in zip(prompts, ids, strict=True)]
    prompts, ids, units = (
        [item for item, keep in zip(part, fits, strict=True) if keep] for part in (prompts, ids, units)
    )
    width = max(map(len, ids), default=0)
    ids_NS, unit_NS = (
        np.array([row + [fill] * (width - len(row)) for row in rows])
        for rows, fill in ((ids, lm.special.pad), (units, 0))
    )
    return UnitChain(of, prompts, ids_NS, unit_NS, count, in_turn, fits.count(False))


class Block:
    """The inputs of some units: `own_NWD` as trained, of which the columns `is_NW` exist."""

    def __init__(self, runner: UnitRunner, units: Collection[int]):
        self.is_NS = torch.from_numpy(np.isin(runner.chain.unit_NS, list(units)))
        self.width_N = self.is_NS.sum(1)
        self.valid_N = (self.width_N > 0).numpy()
        self.is_NW = torch.arange(int(self.width_N.max())) < self.width_N[:, None]
        self.own_NWD = runner.embeds_NSD.new_zeros(*self.is_NW.shape, runner.embeds_NSD.shape[2])
        self.own_NWD[self.is_NW] = runner.embeds_NSD[self.is_NS]

    def mean(self) -> Tensor:
        """The mean of each column over the questions that have it, for all questions."""
        mean_WD = self.own_NWD.sum(0) / self.is_NW.sum(0).clamp(min=1)[:, None]
        return mean_WD.expand_as(self.own_NWD)


@dataclass(frozen=True)
class Change:
    """What is fed in place of what was fed as trained; by default the same.

    `new_NWD` replaces the inputs of `block`. Thoughts after the first `recomputed` are computed anew. `cache`: keys and
    values (N, H, .) of each layer in place of those of unit `cached`, a thought or a pause.
    """

    block: Block | None = None
    new_NWD: Tensor | None = None
    recomputed: int | None = None
    cached: int = 0
    cache: KeysAndValues | None = None

    def inputs(self, embeds_NSD: Tensor, indices: list[int]) -> Tensor:
        """(B, S, D) what is fed to these questions."""
        embeds_BSD = embeds_NSD[indices]
        if self.block is not None and self.new_NWD is not None:
            embeds_BSD[self.block.is_NS[indices]] = self.new_NWD[indices][self.block.is_NW[indices]]
        return embeds_BSD


@dataclass(frozen=True)
class Effects:
    """How the predictions change: `kl_NU` at each unit and the answer (the last column), NaN where there is none.

    `log_prob_N`: the log-probability of the right answer after its mark. `right_N`: whether its tokens are all the
    likeliest ones.
    """

    kl_NU: np.ndarray
    log_prob_N: np.ndarray
    right_N: np.ndarray


class UnitRunner:
    """Runs a chain as trained, and then with changes.

    `embeds_NSD`: the inputs as trained, with the model's own thoughts. `cache`: the keys and values (N, H, U, .) of the
    units in each layer; empty if the model does not keep those of all positions.
    """

    def __init__(self, lm: LatentLM, chain: UnitChain, batch_size: int):
        self.lm, self.chain = lm, chain
        self.batches = list(longest_first(chain.prompts, batch_size))
        table: Any = lm.base.get_input_embeddings()
        self.dtype = torch.promote_types(torch.float32, lm.base.dtype)
        self.embeds_NSD = torch.zeros(*chain.ids_NS.shape, table.embedding_dim, dtype=self.dtype)
        self.cache: KeysAndValues = []
        for indices in self.batches:
            batch = _Batch(lm, chain, indices)
            embeds_BSD = batch.own_embeds()
            _, context = batch.run(embeds_BSD, 0 if chain.in_turn else None)
            self.embeds_NSD[indices] = embeds_BSD.to(self.embeds_NSD)
            if chain.of != "steps" and lm.keeps_all_keys:
                self._keep(indices, context)

    def _keep(self, indices: list[int], context: Context) -> None:
        first = -self.chain.ids_NS.shape[1]
        for number, layer in enumerate(context.cache.layers):
            new = [part[:, :, first : part.shape[2] + first + self.chain.count].to(self.embeds_NSD) for part in
                   (layer.keys, layer.values)]  # fmt: skip
            if number == len(self.cache):
                keys, values = (part.new_zeros(len(self.chain.prompts), *part.shape[1:]) for part in new)
                self.cache.append((keys, values))
            for kept, part in zip(self.cache[number], new, strict=True):
                kept[indices] = part

    def effects(self, changes: Sequence[Change]) -> list[Effects]:
        """The effects of each change, in order; with no change at all the divergence is 0."""
        N, U = len(self.chain.prompts), self.chain.count + 1
        found = [Effects(np.full((N, U), np.nan), np.zeros(N), np.zeros(N, bool)) for _ in changes]
        for indices in self.batches:
            batch = _Batch(self.lm, self.chain, indices)
            before_MV = batch.log_probs(batch.run(self.embeds_NSD[indices])[0])
            for change, effects in zip(changes, found, strict=True):
                after_MV = batch.log_probs(batch.run_changed(change, self.embeds_NSD))
                effects.kl_NU[indices] = batch.divergence(before_MV, after_MV)
                effects.log_prob_N[indices], effects.right_N[indices] = batch.on_answer(after_MV)
        return found


class _Batch:
    """Questions whose prompts are in a cache."""

    def __init__(self, lm: LatentLM, chain: UnitChain, indices: list[int]):
        self.lm, self.chain, self.indices = lm, chain, indices
        prompts = pad_rows([chain.prompts[i] for i in indices], lm.special.pad)
        self.prompt_ids, self.prompt_mask = (part.to(lm.device) for part in prompts)
        self.context, self.first_BD = Context.after(lm, self.prompt_ids, self.prompt_mask)
        self.ids_BS = torch.from_numpy(chain.ids_NS[indices]).to(lm.device)
        unit_BS = torch.from_numpy(chain.unit_NS[indices]).to(lm.device)
        self.is_unit_BS = unit_BS > 0
        self.unit_M, self.row_M = unit_BS[self.is_unit_BS], self.is_unit_BS.nonzero()[:, 0]

    def own_embeds(self) -> Tensor:
        """(B, S, D) the embeddings of the ids, and thoughts that are updated all at once."""
        embeds_BSD = self.lm.base.get_input_embeddings()(self.ids_BS)
        if self.chain.of == "thoughts" and not self.chain.in_turn:
            thoughts_BKD = think(self.lm, self.prompt_ids, self.prompt_mask, self.chain.count).thoughts
            embeds_BSD[:, : self.chain.count] = thoughts_BKD.to(embeds_BSD)
        return embeds_BSD

    def run_changed(self, change: Change, embeds_NSD: Tensor) -> Tensor:
        """The states (B, S, D) before each column, with a change."""
        cache = None
        if change.cache is not None:
            cache = [(keys[self.indices], values[self.indices]) for keys, values in change.cache]
        return self.run(change.inputs(embeds_NSD, self.indices), change.recomputed, change.cached, cache)[0]

    def run(
        self, embeds_BSD: Tensor, recomputed: int | None = None, cached: int = 0, cache: KeysAndValues | None = None
    ) -> tuple[Tensor, Context]:
        """The states (B, S, D) before each column, and the context after all. Computed thoughts replace inputs."""
        S, context, before = embeds_BSD.shape[1], self.context.fork(), [self.first_BD[:, None]]
        embeds_BSD = embeds_BSD.to(self.ids_BS.device)
        anew = range(self.chain.count if recomputed is None else recomputed, self.chain.count)
        ends = {S, *anew, *(column + 1 for column in anew), *([] if cache is None else [cached])} - {0}
        start = 0
        for end in sorted(ends):
            if start in anew:
                embeds_BSD[:, start] = self.lm.feedback(before[-1][:, -1], self.lm).to(embeds_BSD)
            before.append(context.extend(self.lm, embeds_BSD[:, start:end].to(self.lm.base.dtype)))
            if cache is not None and end == cached:
                for layer, (keys_BHX, values_BHX) in zip(context.cache.layers, cache, strict=True):
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
                    layer.keys[:, :, -1], layer.values[:, :, -1] = keys_BHX.to(layer.keys), values_BHX.to(layer.values)
            start = end
        return torch.cat(before, dim=1)[:, :S], context

    def log_probs(self, before_BSD: Tensor) -> Tensor:
        """(M, V) log-probabilities of the words that may be written, where units and answers are predicted."""
        logits_MV = self.lm.logits(before_BSD[self.is_unit_BS])
        logits_MV = logits_MV.to(torch.promote_types(torch.float32, logits_MV.dtype))
        logits_MV[:, self.lm.special.added] = -1e9
        return logits_MV.log_softmax(-1)

    def divergence(self, before_MV: Tensor, after_MV: Tensor) -> np.ndarray:
        """(B, U) the Kullback-Leibler divergence, summed over the tokens of each unit; NaN where there are none."""
        kl_M = (before_MV.exp() * (before_MV - after_MV)).sum(1).clamp(min=0)
        return self._sums(kl_M, self.row_M * (self.chain.count + 1) + self.unit_M - 1, self.chain.count + 1)

    def on_answer(self, log_probs_MV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(B,) the log-probability of the right answer, and whether all of its tokens are the likeliest."""
        target_M, in_answer_M = self.ids_BS[self.is_unit_BS], self.unit_M == self.chain.count + 1
        log_prob_M = log_probs_MV.gather(1, target_M[:, None])[:, 0]
        wrong_M = (log_probs_MV.argmax(1) != target_M).float()
        log_prob_B1, wrong_B1 = (self._sums(part[in_answer_M], self.row_M[in_answer_M], 1) for part in
                                 (log_prob_M, wrong_M))  # fmt: skip
        return log_prob_B1[:, 0], wrong_B1[:, 0] == 0

    def _sums(self, values_M: Tensor, place_M: Tensor, width: int) -> np.ndarray:
        """(B, width) the sums of the values at each place of the flattened table; NaN where there are none."""
        sums, counts = torch.zeros(2, len(self.indices) * width, dtype=torch.double, device=values_M.device)
        sums.index_add_(0, place_M, values_M.double())
        counts.index_add_(0, place_M, torch.ones_like(values_M, dtype=torch.double))
        return torch.where(counts > 0, sums, torch.nan).view(-1, width).cpu().numpy()
