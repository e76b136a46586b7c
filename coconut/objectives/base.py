"""What all terms of the loss have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from coconut.data.batching import Batch
from coconut.methods import Form, Term
from coconut.models.latent_lm import LatentLM
from coconut.models.passes import LatentOutput


class TermObjective(nn.Module):
    """Computes one term. Its parameters, if it has any, are trained with the model and left out of an export.

    `forms`: those that stand in a batch, in their order. Raises ValueError if the term does not fit the model.
    """

    def __init__(self, term: Term, forms: Sequence[Form], lm: LatentLM):
        super().__init__()
        names = [form.name for form in forms]
        self.term = term
        self.of_form = names.index(term.of)
        self.to_form = names.index(term.to) if term.to else -1

    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        """The term summed over a micro-batch, (), without its weight.

        `output`: what `lm` gave for the batch. `lm` serves for its head (`lm.logits`); a term does not keep it, since
        its own modules are saved. `statistics`: the totals of `measure` over the update; None if this micro-batch is
        all of it.
        """
        raise NotImplementedError

    def measure(self, output: LatentOutput, batch: Batch) -> Tensor:
        """Quantities of a micro-batch that add up over an update, of a term that has them. Runs without gradient."""
        raise NotImplementedError
