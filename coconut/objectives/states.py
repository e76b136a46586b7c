"""Hidden states of one form held to those of another, at the answer's prompt token, in all layers (CODI).

For every example, the mean over layers and over width of SmoothL1(student, teacher) / deviation. The deviation is that
of the teacher's states in the layer, over the examples and the width of the whole update. With dropout an update of
several micro-batches measures it with another draw. The teacher gets no gradient.
Shen et al., arXiv 2502.21074, equation 3; released code, src/model.py.

Shapes: B examples, L layers that are compared, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coconut.data.batching import Batch
from coconut.methods import Form, Term
from coconut.models import families
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import at_least_float32
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    """Option `first_layer`: the first one that is compared; 0 (the default) is the embeddings, which CODI includes.

    Raises ValueError for a model whose states are not of one width in all layers (OPT 350M).
    """

    def __init__(self, term: Term, forms: Sequence[Form], lm: LatentLM):
        super().__init__(term, forms, lm)
        if lm.thought_size != (width := families.text_config(lm.base).hidden_size):
            raise ValueError(
                f"The term {term.name} compares hidden states in all layers. This model's are {width} wide in its "
                f"layers and {lm.thought_size} at its end. Take another model, or terms.{term.name}=0."
            )
        self.first_layer = term.options["first_layer"]

    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        student_BLD = self._states(output, batch, self.of_form)
        teacher_BLD = self._states(output, batch, self.to_form).detach()
        if statistics is None:
            statistics = self.measure(output, batch)
        count, total, squares = statistics.cpu().view(3, -1)
        deviation_L = ((squares - total.square() / count) / (count - 1)).sqrt().to(teacher_BLD)
        distance_BLD = F.smooth_l1_loss(student_BLD, teacher_BLD, reduction="none")
        return ((distance_BLD.mean(2) / deviation_L).mean(1) * self._is_example(batch)).sum()

    @torch.no_grad()
    def measure(self, output: LatentOutput, batch: Batch) -> Tensor:
        """(3 L,) count, sum and sum of squares of the teacher's states in each layer, in float64 on the CPU."""
        states_BLD = self._states(output, batch, self.to_form).cpu().double()
        count_L = (self._is_example(batch).sum().cpu() * states_BLD.shape[2]).expand(states_BLD.shape[1])
        return torch.cat([count_L, states_BLD.sum((0, 2)), states_BLD.square().sum((0, 2))])

    def _is_example(self, batch: Batch) -> Tensor:
        """(B,) all but the rows of a process that has no row left."""
        return batch.answer_prompt_R[batch.form_R == self.of_form] >= 0

    def _states(self, output: LatentOutput, batch: Batch, form: int) -> Tensor:
        assert output.states is not None
        return at_least_float32(output.states[batch.form_R == form, self.first_layer :])
