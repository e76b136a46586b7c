"""A word of each group of the chain, predicted by the model's own head before the thought of the group (CoLaR).

The sum of the negative log-likelihoods of one token of each group, drawn for each example and epoch; after the last
thought it is `<eot>`, which ends the thoughts in generation. In CoLaR these words and those of the answer have one
mean: Per.token_or_span, for this term and for `tokens`. Tan et al., arXiv 2505.16552, section 3; released code,
src/models/colar.py.

Shapes: R rows, G groups of a row with its end, M groups of all rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from coconut.data.batching import IGNORED, Batch
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import summed_cross_entropy
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        assert output.before_thoughts is not None
        is_drawn_RG = (batch.drawn_RG != IGNORED) & (batch.form_R == self.of_form)[:, None]
        states_MD = output.before_thoughts[-1][is_drawn_RG]
        return summed_cross_entropy(lm.logits(states_MD), batch.drawn_RG[is_drawn_RG])
