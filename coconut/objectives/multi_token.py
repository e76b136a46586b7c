"""All words of each group of the chain, predicted by a head before the thought of the group (C-MTP).

The sum of the negative log-likelihoods of the words, each read by the model's own head from the head's state for its
place. `<eot>` follows the last word: after the last thought, and in the last group if that has room, where it says how
many words are merged. Divided by the number of these words (Per.span_token). arXiv 2607.16972; released code,
cmtp/src/model.py.

Shapes: R rows, G groups of a row with its end, M groups of all rows, S words of a group, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from coconut.data.batching import IGNORED, Batch
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import at_least_float32
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        assert output.before_thoughts is not None
        is_group_RG = (batch.spans_RGS != IGNORED).any(-1) & (batch.form_R == self.of_form)[:, None]
        words_MS, states_MD = batch.spans_RGS[is_group_RG], output.before_thoughts[-1][is_group_RG]
        heads_MSD = lm.feedback.projector(lm.feedback.in_own_dtype(states_MD))[:, : words_MS.shape[1]]
        logits_MSV = at_least_float32(lm.logits(heads_MSD.to(states_MD)))
        return F.cross_entropy(logits_MSV.flatten(0, 1), words_MS.flatten(), ignore_index=IGNORED, reduction="sum")
