"""Sampled answers as a batch, and the loss of the policy on it.

Shapes: N answers, B rows of a batch, T columns, V vocabulary, M sampled tokens of all rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from coconut.data.batching import collate
from coconut.data.sequences import Layout, slot_ids
from coconut.data.tokenization import SpecialIds
from coconut.generation.generate import Generated, forward_passes
from coconut.methods import Slot
from coconut.rl.objectives import Objective, Totals, clipped, k3

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class Cost:
    """What an answer took. `passes`: forward passes one after the other, for prefix, thoughts and tokens."""

    passes: int
    num_thoughts: int
    new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One answer: which of its tokens were sampled (`layout`: its targets), and how likely they were.

    Forced are the question, a control token that was not the model's choice, markers, thoughts and pauses.
    `log_probs` (its sampled tokens,), in float32: at the temperature, among the tokens that may stand there.
    """

    layout: Layout
    log_probs: Tensor
    text: str
    mode: str
    new_tokens: int
    num_thoughts: int
    cut: bool

    @property
    def is_control(self) -> Tensor:
        """(its sampled tokens,)"""
        return torch.arange(len(self.log_probs)) < int(self.layout.control >= 0)

    @property
    def passes(self) -> int:
        """Of a forward pass over the whole answer."""
        return self.num_thoughts + 1

    @property
    def took(self) -> Cost:
        """What it took to say it."""
        passes = forward_passes(self.new_tokens, self.cut, self.num_thoughts, self.mode)
        return Cost(passes, self.num_thoughts, self.new_tokens)

    @property
    def said(self) -> list[int]:
        """The tokens after the prompt."""
        return self.layout.ids[self.layout.num_prompt :].tolist()

    def saying(self, said: Sequence[int]) -> Sample:
        """The same question, mode and thoughts with another answer, of which nobody knows how likely it is."""
        ids = np.array([*self.layout.ids[: self.layout.num_prompt], *said], np.int32)
        return replace(
            self, layout=replace(self.layout, ids=ids, control=-1), log_probs=torch.zeros(len(said)), text=""
        )

    def muted(self) -> Sample:
        """The same row with nothing in it that counts, for a process that has no other while others compute."""
        layout = replace(self.layout, num_prompt=len(self.layout.ids), control=-1)
        return replace(self, layout=layout, log_probs=self.log_probs[:0])


def needs(samples: Sequence[Sample]) -> tuple[int, int]:
    """Of a forward pass over these answers: how many passes it takes, and how many tokens the longest has."""
    return max(sample.passes for sample in samples), max(len(sample.layout.ids) for sample in samples)


def shares(needed: Sequence[tuple[int, int]], size: int, rank: int = 0, ranks: int = 1) -> list[tuple[list[int], int]]:
    """The places of the answers, or pairs of them, that one process of `ranks` takes at a time, at most `size` of them,
    and the passes.

    `needed`: of each, see `needs`. Those of like lengths go together, and all processes take equally many passes. A
    process for which none is left takes place -1.
    """
    order = sorted(range(len(needed)), key=lambda i: needed[i])
    parts = [order[first : first + size * ranks] for first in range(0, len(order), size * ranks)]
    return [(part[rank::ranks] or [-1], max(needed[i][0] for i in part)) for part in parts]


def samples_of(lm: LatentLM, question: Sequence[int], out: Generated, rows: Sequence[int]) -> list[Sample]:
    """The answers in these rows, to one question (its token ids), of `lm.generate(log_probs=True)`."""
    assert out.log_probs is not None
    return [_sample(lm, question, out, row, out.log_probs[row]) for row in rows]


def _sample(lm: LatentLM, question: Sequence[int], out: Generated, row: int, log_probs: Tensor) -> Sample:
    mode, count = out.modes[row], int(out.num_thoughts[row])
    chosen = out.mode_log_probs[row] if mode else None
    how_likely = [log_probs] if chosen is None else [torch.tensor([chosen]), log_probs]
    return Sample(
        layout=_layout(lm, question, mode, count, out.said(row), sampled=chosen is not None),
        log_probs=torch.cat(how_likely),
        text=out.texts[row],
        mode=mode,
        new_tokens=int(out.lengths[row]),
        num_thoughts=count,
        cut=bool(out.cut[row]),
    )


def _layout(lm: LatentLM, question: Sequence[int], mode: str, count: int, said: Sequence[int], sampled: bool) -> Layout:
    reasoning = lm.reasoning.in_mode(mode) if mode else lm.reasoning
    control = [lm.special.control[mode]] if mode else []
    in_slot = count if reasoning.slot is Slot.thought else count or reasoning.num_thoughts  # no pause is a thought
    before = [*question, *control, *slot_ids(reasoning, lm.special, in_slot).tolist()]
    return Layout(
        ids=np.array([*before, *said], np.int32),
        num_prompt=len(before),
        anchor=len(question) + len(control) + reasoning.markers,
        control=len(question) if sampled else -1,
    )


def question_of(lm: LatentLM, sample: Sample) -> list[int]:
    """The question's tokens, without control token and slot."""
    reasoning = lm.reasoning.in_mode(sample.mode) if sample.mode else lm.reasoning
    return sample.layout.ids[: sample.layout.anchor - reasoning.markers - bool(sample.mode)].tolist()


def sample_said(
    lm: LatentLM,
    question: Sequence[int],
    said: Sequence[int],
    *,
    text: str,
    mode: str = "",
    num_thoughts: int | None = None,
) -> Sample:
    """An answer that was given before, of which nobody knows how likely it was: its log-probabilities are zeros."""
    reasoning = lm.reasoning.in_mode(mode) if mode else lm.reasoning
    count = reasoning.num_thoughts if num_thoughts is None else num_thoughts
    ended = bool(said) and said[-1] == lm.special.eos
    layout = _layout(lm, question, mode, count, said, sampled=False)
    return Sample(layout, torch.zeros(len(said)), text, mode, len(said) - ended, count, cut=not ended)


def longest_answers(lm: LatentLM, question: Sequence[int], limit: int) -> list[Sample]:
    """In each mode an answer to this question that is cut off after so many tokens, all alike."""
    found = []
    for mode in lm.reasoning.modes or ("",):
        count = (lm.reasoning.in_mode(mode) if mode else lm.reasoning).num_thoughts
        said = _layout(lm, question, mode, count, [lm.special.eos] * limit, sampled=bool(mode))
        likely = torch.zeros(limit + bool(mode))
        found.append(Sample(said, likely, "", mode, limit, count, cut=True))
    return found


@dataclass
class Scored:
    """A batch of answers; `is_control` (M,) of each sampled token."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    passes: int
    is_control: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], special: SpecialIds, passes: int) -> Scored:
        made = collate([sample.layout for sample in samples], special)
        is_control_M = torch.cat([sample.is_control for sample in samples])
        return cls(made.input_ids, made.attention_mask, made.labels, passes, is_control_M)

    def to(self, device: torch.device | str) -> Self:
        values = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **values)


def at_targets(module: nn.Module, batch: Scored) -> Any:
    """The forward pass over a batch, with logits where its targets are predicted."""
    return module(
        batch.input_ids, batch.attention_mask, labels=batch.labels, return_target_logits=True, min_passes=batch.passes
    )


def of_tokens(lm: LatentLM, samples: Sequence[Sample], size: int, score: Callable[[Scored], Tensor]) -> list[Tensor]:
    """For each answer, on the CPU, what `score` says (M,) of the sampled tokens of a batch of up to `size` answers.

    Raises ValueError if one is longer than the model's context.
    """
    refuse_too_long(lm, [len(sample.layout.ids) for sample in samples])
    found: dict[int, Tensor] = {}
    for places, passes in shares([needs([sample]) for sample in samples], size):
        chosen = [samples[i] for i in places]
        batch = Scored.of(chosen, lm.special, passes).to(lm.device)
        lengths = [len(sample.log_probs) for sample in chosen]
        found |= zip(places, score(batch).cpu().split(lengths), strict=True)
    return [found[place] for place in range(len(samples))]


def refuse_too_long(lm: LatentLM, lengths: Sequence[int]) -> None:
    """Raise ValueError if an answer, with its question so many tokens long, is longer than the model's context."""
    if too_long := [i for i, length in enumerate(lengths) if length > lm.context]:
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} answers are, with their questions, longer than the model's context of "
            f"{lm.context} tokens: {named('answer', too_long, lengths)}. Leave them out."
        )


def named(what: str, places: Sequence[int], lengths: Sequence[int]) -> str:
    """The first of them by their numbers, with their lengths."""
    shown = ", ".join(f"{what} {i + 1} ({lengths[i]} tokens)" for i in places[:5])
    return shown + (f" and {len(places) - 5} more" if len(places) > 5 else "")


@dataclass
class PolicyBatch(Scored):
    """A micro-batch of answers; of each sampled token (M,) what its term needs.

    `weights`, `kl_weights`: an Objective's, times the sampled tokens of the whole batch, by which an engine divides.
    `old`: log-probabilities when they were sampled, None if those are the present ones. `reference`: those of the model
    that the policy is held to, computed on this very batch; None if it is held to none.
    """

    advantages: Tensor
    weights: Tensor
    kl_weights: Tensor
    old: Tensor | None
    reference: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return len(self.advantages)


def for_tokens(gains_N: Tensor, samples: Sequence[Sample]) -> list[Tensor]:
    """One number an answer as one for each of its sampled tokens."""
    return [gain.expand(len(sample.log_probs)) for gain, sample in zip(gains_N, samples, strict=True)]


def policy_batch(
    samples: Sequence[Sample],
    advantages: Sequence[Tensor],
    objective: Objective,
    totals: Totals,
    special: SpecialIds,
    *,
    on_policy: bool,
    passes: int = 1,
) -> PolicyBatch:
    """Answers with the advantages of their sampled tokens as a micro-batch of a batch that has `totals` in all."""
    made = Scored.of(samples, special, max(passes, *(sample.passes for sample in samples)))
    lengths_N = torch.tensor([len(sample.log_probs) for sample in samples])
    weights_M, kl_weights_M = objective.weights(lengths_N, made.is_control, totals)
    return PolicyBatch(
        **vars(made),
        advantages=torch.cat(list(advantages)).float(),
        weights=weights_M * totals.tokens,
        kl_weights=kl_weights_M * totals.tokens,
        old=None if on_policy else torch.cat([sample.log_probs for sample in samples]),
    )


def totals_of(samples: Sequence[Sample], budget: int) -> Totals:
    """Of all answers of an update."""
    tokens, controls = (sum(map(len, (s.log_probs for s in samples))), sum(int(s.is_control.sum()) for s in samples))
    return Totals(len(samples), tokens, controls, budget)


@dataclass(frozen=True)
class Policy:
    """What may be said where, and at which temperature: the distribution that answers are sampled from.

    A control token is one of `controls`; any other token is none of `refused`.
    """

    refused: tuple[int, ...] = ()
    controls: tuple[int, ...] = ()
    temperature: float = 1.0

    @classmethod
    def of(cls, special: SpecialIds, temperature: float = 1.0) -> Policy:
        """That of a model with these tokens."""
        return cls(tuple(special.added), tuple(special.control.values()), temperature)

    def log_probs(self, module: nn.Module, batch: Scored) -> Tensor:
        """(M,) of the targets of a batch, in float32."""
        out = at_targets(module, batch)
        logits_MV = out.target_logits.float() / self.temperature
        refused_2V = torch.zeros(2, logits_MV.shape[1], dtype=torch.bool, device=logits_MV.device)
        refused_2V[0, list(self.refused)] = True
        refused_2V[1] = True
        refused_2V[1, list(self.controls)] = False
        logits_MV = logits_MV.masked_fill(refused_2V[batch.is_control.long()], -torch.inf)
        return logits_MV.log_softmax(-1).gather(1, out.targets[:, None])[:, 0]

    @torch.no_grad()
    def score(self, lm: LatentLM, samples: Sequence[Sample], size: int) -> list[Tensor]:
        """How likely the sampled tokens of each answer are to a whole model, float32, on the CPU."""
        return of_tokens(lm, samples, size, lambda batch: self.log_probs(lm, batch))

    def loss(self, objective: Objective, beta: float) -> PolicyLoss:
        return PolicyLoss(self, objective, beta)


@dataclass(frozen=True)
class PolicyLoss:
    """An engine's loss function: summed over the tokens of a micro-batch, which has `objective`'s weights.

    `divergences`: of each micro-batch that has a reference, the sum of its tokens' k3.
    """

    policy: Policy
    objective: Objective
    beta: float
    divergences: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, batch: PolicyBatch) -> Tensor:
        log_probs_M = self.policy.log_probs(module, batch)
        old_M = log_probs_M.detach() if batch.old is None else batch.old
        terms_M = clipped(log_probs_M, old_M, batch.advantages, self.objective.low, self.objective.high)
        loss = (batch.weights * terms_M).sum()
        if batch.reference is None:
            return loss
        apart_M = k3(log_probs_M, batch.reference)
        self.divergences.append(apart_M.detach().sum())
        return loss + self.beta * (batch.kl_weights * apart_M).sum()

    def divergence(self) -> float:
        """The sum over all micro-batches since the last call."""
        found = sum(part.item() for part in self.divergences)
        self.divergences.clear()
        return found
