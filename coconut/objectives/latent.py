"""Merged embeddings of the chain, predicted by a Gaussian head before they are fed (CoLaR).

For every thought, and for the embedding of `<eot>` after the last one, the mean over the width of the squared distance
between a sample of the head and the embedding divided by the head's scale. It is summed over thoughts (Per.span). The
embedding gets no gradient. The sample stands here by its expectation,

    E (mean + deviation * noise - target)^2 = (mean - target)^2 + deviation^2

which has the same gradient in expectation, and without drawn noise is the same for any split of an update. Tan et al.,
arXiv 2505.16552, section 3; released code, src/models/colar.py, which draws one sample.

Shapes: R rows, G groups of a row with its end, M groups of all rows, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from coconut.data.batching import IGNORED, Batch
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import at_least_float32
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        assert output.before_thoughts is not None
        assert output.thoughts is not None
        is_group_RG = (batch.spans_RGS != IGNORED).any(-1) & (batch.form_R == self.of_form)[:, None]
        states_MD = lm.feedback.in_own_dtype(output.before_thoughts[-1][is_group_RG])
        mean_MD, log_deviation_MD = map(at_least_float32, lm.feedback.projector(states_MD))
        target_MD = output.thoughts[is_group_RG].detach().to(mean_MD) / lm.feedback.projector.scale
        return ((mean_MD - target_MD).square() + (2 * log_deviation_MD).exp()).mean(1).sum()
