"""Hidden states of one form held to those of another, at the answer's prompt token, in all layers (CODI).

For every example, the mean over layers and over width of SmoothL1(student, teacher) / deviation. The deviation is that
of the teacher's states in the layer, over the examples and the width of the whole update. The teacher gets no gradient.
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
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    """Option `first_layer`: the first one that is compared; 0 (the default) is the embeddings, which CODI includes."""

    def __init__(self, term: Term, forms: Sequence[Form], lm: LatentLM):
        super().__init__(term, forms, lm)
        self.first_layer = term.options.get("first_layer", 0)
        self.num_layers = families.text_config(lm.base).num_hidden_layers + 1 - self.first_layer

    def forward(self, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        if output.states is None:  # a process without a row left
            return output.target_logits.new_zeros((), dtype=torch.float32)  # pyright: ignore[reportOptionalMemberAccess]
        student_BLD = self._states(output, batch, self.of_form)
        teacher_BLD = self._states(output, batch, self.to_form).detach()
        if statistics is None:
            statistics = self.measure(output, batch)
        count, total, squares = statistics.view(3, -1).double()
        deviation_L = ((squares - total.square() / count) / (count - 1)).sqrt().to(teacher_BLD)
        distance_BLD = F.smooth_l1_loss(student_BLD, teacher_BLD, reduction="none")
        return (distance_BLD.mean(2) / deviation_L).mean(1).sum()

    @torch.no_grad()
    def measure(self, output: LatentOutput, batch: Batch) -> Tensor:
        """(3 L,) count, sum and sum of squares of the teacher's states in each layer."""
        if output.states is None:
            return torch.zeros(3 * self.num_layers, dtype=torch.float64, device=batch.labels.device)
        states_BLD = self._states(output, batch, self.to_form).double()
        count_L = torch.full_like(states_BLD[0, :, 0], states_BLD.shape[0] * states_BLD.shape[2])
        return torch.cat([count_L, states_BLD.sum((0, 2)), states_BLD.square().sum((0, 2))])

    def _states(self, output: LatentOutput, batch: Batch, form: int) -> Tensor:
        states = output.states[batch.form_R == form, self.first_layer :]  # pyright: ignore[reportOptionalSubscript]
        return states.float() if states.dtype in (torch.bfloat16, torch.float16) else states
