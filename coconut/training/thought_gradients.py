"""Gradient attenuation: how much of the gradient of the loss arrives at each thought.

A loss on words alone reaches the first thought through all later ones, and may have faded by then (Chen et al., arXiv
2606.20075: gradient attenuation, one half of the dual collapse of latent reasoning).

Shapes: N questions, B questions of a batch, K thoughts, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.data.batching import collate
from coconut.data.sequences import Layout
from coconut.evaluation.intervals import ratio_interval
from coconut.models.latent_lm import LatentLM
from coconut.utils.torch_utils import eval_mode, frozen


def gradient_norms(lm: LatentLM, rows: Sequence[Layout], batch_size: int) -> list[Tensor]:
    """(K,) for each row the norms of the gradient of its loss with respect to its thoughts as they are fed, in float64.

    The loss of a row is its mean over the written tokens, without dropout. Of thoughts that are computed one after the
    other the gradient is the whole one, also through later thoughts. Of thoughts that are updated all at once it is
    that with respect to what the last iteration made of them; through the iterations before it nothing flows.
    Every row has a thought. No gradient is left anywhere, and no random number is drawn.
    """
    found: list[Tensor] = []
    table: Any = lm.base.get_input_embeddings()
    dtype = torch.promote_types(table.weight.dtype, torch.float32)
    with eval_mode(lm), frozen(lm), torch.enable_grad():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = collate(part, lm.special).to(lm.device)
            shape = *batch.thoughts_RK.shape, lm.thought_size
            offsets_BKD = torch.zeros(shape, dtype=dtype, device=lm.device, requires_grad=True)
            output = lm(batch.input_ids, batch.attention_mask, labels=batch.labels, thought_offsets=offsets_BKD)
            (gradient_BKD,) = torch.autograd.grad(output.loss_sum, offsets_BKD)
            norms_BK = gradient_BKD.double().norm(dim=2).cpu()
            counts_B = (batch.thoughts_RK >= 0).sum(1).tolist()
            written_B = [len(row.ids) - row.num_prompt for row in part]
            found += [
                norms_K[:count] / written for norms_K, count, written in zip(norms_BK, counts_B, written_B, strict=True)
            ]
    return found


def attenuation(norms: Sequence[Tensor]) -> dict[str, Any]:
    """What a validation logs of the norms (K,) of each question.

    `gradient`: for each thought, the mean over the questions that have it. `gradient_ratio`: the mean norm at the first
    thought divided by that at a question's last, with a 95 % bootstrap interval over questions, `gradient_ratio_low`
    to `gradient_ratio_high`. None if no question has two thoughts, or a norm is zero or not finite.
    """
    K = max(map(len, norms))
    means = [torch.stack([norms_K[k] for norms_K in norms if k < len(norms_K)]).mean().item() for k in range(K)]
    several = [norms_K for norms_K in norms if len(norms_K) > 1]
    first_Q, last_Q = (np.array([float(norms_K[k]) for norms_K in several]) for k in (0, -1))
    ratio = low = high = None
    if several and (last_Q > 0).all() and math.isfinite(first_Q.sum() + last_Q.sum()):
        ratio, (low, high) = float(first_Q.mean() / last_Q.mean()), ratio_interval(first_Q, last_Q)
    names = "gradient", "gradient_ratio", "gradient_ratio_low", "gradient_ratio_high"
    return dict(zip(names, (means, ratio, low, high), strict=True))
