"""Keys and values of the thoughts held to those of the written chain, cut to as many tokens as thoughts (KaVa).

For every example, the mean over layers, heads, pairs and width of the distance between student and teacher, of keys and
of values, halved. Pair m is thought m and the m-th token of the chain that stays, in order; with a shorter chain the
last thoughts have no pair. Keys are taken as the cache holds them, that is after rotary positions. The teacher gets no
gradient. KaVa, arXiv 2510.02312, built from descriptions by others.

`Compression.rkv` keeps, in each layer and head, the tokens of the highest score

    importance * I + (1 - importance) * (1 - R)

I: the attention that the tokens after the chain pay to a token, averaged over them and over the queries that share the
head, as a share of all tokens of the chain. R: the softmax over the chain of a key's mean cosine to the other keys
(R-KV, arXiv 2505.24133). The attention comes from a pass of its own over the teacher's rows, without dropout.

Shapes: E examples, L layers, H heads with keys of their own, C tokens of the longest chain, M pairs, d head size,
Q queries, T columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coconut.data.batching import Batch
from coconut.methods import Compression, Form, Term
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import at_least_float32
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective

DISTANCES = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}


class Objective(TermObjective):
    """Options `compression`, `importance` of R-KV, and `distance`, one of DISTANCES.

    Raises ValueError for options that are out of range, or for a model with sliding windows or with layers that keep
    anything but keys and values.
    """

    def __init__(self, term: Term, forms: Sequence[Form], lm: LatentLM):
        super().__init__(term, forms, lm)
        self.compression, self.importance = term.compression, float(term.options["importance"])
        if not 0 <= self.importance <= 1:
            raise ValueError(f"term_options.{term.name}.importance is {self.importance}; it must be between 0 and 1.")
        if term.options["distance"] not in list(DISTANCES):
            raise ValueError(
                f"term_options.{term.name}.distance is {term.options['distance']!r}; it is one of "
                f"{', '.join(DISTANCES)}."
            )
        self.distance = DISTANCES[term.options["distance"]]
        if not lm.keeps_all_keys:
            raise ValueError(
                f"The term {term.name} compares keys and values of whole chains, and {lm.base.config.model_type} has "
                f"layers that keep only part of them or something else. Take another model, or terms.{term.name}=0."
            )

    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        assert output.keys is not None
        assert output.values is not None
        is_student_R, is_teacher_R = (batch.form_R == form for form in (self.of_form, self.to_form))
        chain_EC, num_thoughts_E = batch.chain_RC[is_teacher_R], (batch.thoughts_RK[is_student_R] >= 0).sum(1)
        C = chain_EC.shape[1]
        teacher = [at_least_float32(part[is_teacher_R][..., :C, :].detach()) for part in (output.keys, output.values)]
        kept_ELHM, is_pair_EM = self._kept(lm, batch, teacher[0], chain_EC, num_thoughts_E)
        M = kept_ELHM.shape[-1]
        count_E = is_pair_EM.sum(1).clamp(min=1)
        total = output.keys.new_zeros((), dtype=teacher[0].dtype)
        for student, theirs in zip((output.keys, output.values), teacher, strict=True):
            ours_ELHMd = at_least_float32(student[is_student_R][..., :M, :])
            index = kept_ELHM[..., None].expand(*kept_ELHM.shape, theirs.shape[-1])
            distance_ELHMd = self.distance(ours_ELHMd, theirs.gather(3, index), reduction="none")
            by_pair_EM = distance_ELHMd.mean((1, 2, 4)) * is_pair_EM
            total = total + (by_pair_EM.sum(1) / count_E).sum() / 2
        return total

    @torch.no_grad()
    def _kept(
        self, lm: LatentLM, batch: Batch, keys_ELHCd: Tensor, chain_EC: Tensor, num_thoughts_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(E, L, H, M) which tokens of each chain stay, in order; (E, M) how many of them and of the thoughts pair."""
        is_chain_EC = chain_EC >= 0
        M = min(chain_EC.shape[1], int(num_thoughts_E.max()))
        if self.compression is Compression.rkv:
            attention_ELHC = self._attention(lm, batch, chain_EC, keys_ELHCd.shape[2]).to(keys_ELHCd)
            score_ELHC = rkv_score(keys_ELHCd, attention_ELHC, is_chain_EC, self.importance)
        else:
            score_ELHC = is_chain_EC[:, None, None].expand(keys_ELHCd.shape[:-1]).to(keys_ELHCd)
        score_ELHC = score_ELHC.masked_fill(~is_chain_EC[:, None, None], -torch.inf)
        pairs_E = torch.minimum(is_chain_EC.sum(1), num_thoughts_E)
        place_ELHC = score_ELHC.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        stays_ELHC = place_ELHC < pairs_E[:, None, None, None]
        kept_ELHM = (~stays_ELHC).long().argsort(dim=-1, stable=True)[..., :M]  # those that stay come first, in order
        return kept_ELHM, torch.arange(M, device=pairs_E.device) < pairs_E[:, None]

    def _attention(self, lm: LatentLM, batch: Batch, chain_EC: Tensor, heads: int) -> Tensor:
        """(E, L, H, C) the attention of the tokens after a chain to its tokens: their mean, over shared queries too."""
        rows_R = batch.form_R == self.to_form
        is_token_ET = batch.attention_mask[rows_R].bool()
        columns_T = torch.arange(is_token_ET.shape[1], device=is_token_ET.device)
        is_query_ET = is_token_ET & (columns_T > chain_EC.amax(1, keepdim=True))
        weights_LEHC = []
        for weights_EQTT in lm.attention_weights(batch.input_ids[rows_R], is_token_ET):
            mean_EQT = (weights_EQTT * is_query_ET[:, None, :, None]).sum(2) / is_query_ET.sum(1)[:, None, None].clamp(
                1
            )
            by_head_EHT = mean_EQT.unflatten(1, (heads, -1)).mean(2)
            index_EHC = chain_EC.clamp(min=0)[:, None].expand(-1, heads, -1)
            weights_LEHC.append(by_head_EHT.gather(2, index_EHC))
        return torch.stack(weights_LEHC, dim=1)


def rkv_score(keys_ELHCd: Tensor, attention_ELHC: Tensor, is_chain_EC: Tensor, importance: float) -> Tensor:
    """(E, L, H, C) see the head of this file. Tokens beyond a chain count for nothing."""
    is_chain = is_chain_EC[:, None, None]
    attention_ELHC = attention_ELHC * is_chain
    share_ELHC = attention_ELHC / attention_ELHC.sum(-1, keepdim=True).clamp(min=torch.finfo(attention_ELHC.dtype).tiny)
    unit_ELHCd = F.normalize(keys_ELHCd, dim=-1) * is_chain[..., None]
    others = (is_chain_EC.sum(1) - 1).clamp(min=1)[:, None, None, None]
    cosine_ELHC = ((unit_ELHCd @ unit_ELHCd.sum(3)[..., None])[..., 0] - unit_ELHCd.square().sum(-1)) / others
    redundancy_ELHC = cosine_ELHC.masked_fill(~is_chain, -torch.inf).softmax(-1)
    return importance * share_ELHC + (1 - importance) * (1 - redundancy_ELHC)
