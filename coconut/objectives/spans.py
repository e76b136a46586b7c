"""Each thought is held to the words of the chain that it stands for, through the model's own head.

The target is a mixture of the words of a span: word s has the weight rho ** s, normalised. The term is the divergence
KL(target || softmax(logits / temperature)), which is 0 where the two are equal; of a span of one word it is that word's
cross-entropy. Which thought stands for which span is said by `coconut.methods.Spans`.

- At.thoughts: the thoughts are read as they are fed. MUX, arXiv 2607.18264, built from descriptions by others.
- At.before_thoughts: the last hidden states before the thoughts are read, as if the thoughts were words to predict.
  LOTUS, arXiv 2606.31779; released code, scripts/lotus.py.

Shapes: R rows, K thoughts of a row, c thoughts of a span, G spans of a row, M spans with a word, S words of a span,
N iterations of thoughts that are updated all at once, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from coconut.data.batching import IGNORED, Batch
from coconut.methods import At, Form, Spans, Term
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import at_least_float32
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Iteration(StrEnum):
    """After which iteration states before thoughts are read. `own`: those of step i after the iterations of i steps."""

    last = "last"
    own = "own"


class Objective(TermObjective):
    """Options `rho`, `temperature`; and for At.before_thoughts `iteration`, one of Iteration.

    Raises ValueError for options that are out of range.
    """

    def __init__(self, term: Term, forms: Sequence[Form], lm: LatentLM):
        super().__init__(term, forms, lm)
        self.rho, self.temperature = float(term.options["rho"]), float(term.options["temperature"])
        if not 0 < self.rho <= 1:
            raise ValueError(f"term_options.{term.name}.rho is {self.rho}; it must be above 0 and at most 1.")
        if not self.temperature > 0:
            raise ValueError(f"term_options.{term.name}.temperature is {self.temperature}; it must be above 0.")
        name = term.options.get("iteration", Iteration.last)
        if name not in list(Iteration):
            raise ValueError(f"term_options.{term.name}.iteration is {name!r}; it is last or own.")
        self.iteration = Iteration(name)
        self.slot = forms[self.of_form].slot
        if self.iteration is Iteration.own and not self.slot.iterations_per:
            raise ValueError(
                f"term_options.{term.name}.iteration=own reads each step after its own iteration, but the thoughts of "
                "this method are not updated once for each step. Leave it out, or take method=lotus with "
                "curriculum.thoughts_per_step of at least 1."
            )
        if term.at is At.thoughts and not self.slot.read_by_head:
            raise ValueError(
                f"The term {term.name} reads the thoughts with the model's head, but they are {self.slot.describe()}. "
                f"Set model.content=state, or terms.{term.name}=0."
            )
        self.thoughts_per_step = forms[self.of_form].thoughts_per_step or 1
        self.thoughts_per_span = self.thoughts_per_step if term.spans is Spans.steps else 1

    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        states_RKD = self._states(output)
        c, G = self.thoughts_per_span, batch.spans_RGS.shape[1]
        has_span_RG = (batch.spans_RGS != IGNORED).any(-1) & (batch.form_R == self.of_form)[:, None]
        states_McD = states_RKD[:, : G * c].unflatten(1, (G, c))[has_span_RG]
        spans_MS = batch.spans_RGS[has_span_RG]
        logits_McV = at_least_float32(lm.logits(states_McD)) / self.temperature
        is_word_MS = spans_MS != IGNORED
        log_probs_McS = logits_McV.log_softmax(-1).gather(2, spans_MS.clamp(min=0)[:, None].expand(-1, c, -1))
        places_S = torch.arange(spans_MS.shape[1], device=spans_MS.device, dtype=log_probs_McS.dtype)
        weights_MS = self.rho**places_S * is_word_MS
        weights_MS = weights_MS / weights_MS.sum(1, keepdim=True)
        cross_entropy = -(log_probs_McS.mean(1) * weights_MS).sum()
        return cross_entropy + (weights_MS * _log_mixture(spans_MS, weights_MS)).sum()

    def _states(self, output: LatentOutput) -> Tensor:
        """(R, K, D) what the head reads for each thought."""
        if self.term.at is At.thoughts:
            assert output.thoughts is not None
            return output.thoughts
        assert output.before_thoughts is not None
        states_NRKD = output.before_thoughts
        if self.iteration is Iteration.last:
            return states_NRKD[-1]
        K = states_NRKD.shape[2]
        iteration_K = self.slot.count_iterations(torch.arange(1, K + 1)).clamp(max=len(states_NRKD) - 1)
        return states_NRKD[iteration_K, :, torch.arange(K)].transpose(0, 1)


def _log_mixture(spans_MS: Tensor, weights_MS: Tensor) -> Tensor:
    """(M, S) the logarithm of what each word of a span has in its mixture; 0 where there is no word."""
    same_MSS = spans_MS[:, :, None] == spans_MS[:, None]
    mixture_MS = (same_MSS * weights_MS[:, None]).sum(2)
    return torch.where(weights_MS > 0, mixture_MS, 1).log()
