"""Next-token prediction of one form: the negative log-likelihood of its targets."""

from __future__ import annotations

from torch import Tensor

from coconut.data.batching import Batch
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import summed_cross_entropy
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        assert output.target_logits is not None
        assert output.targets is not None
        is_own_N = batch.form_R[output.target_rows] == self.of_form
        if is_own_N.all():
            return summed_cross_entropy(output.target_logits, output.targets)
        return summed_cross_entropy(output.target_logits[is_own_N], output.targets[is_own_N])
