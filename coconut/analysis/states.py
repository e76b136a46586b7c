"""The hidden states of a slot, in every layer: what several studies of the thoughts read.

Shapes: N questions, B of them in a batch, T columns, K positions of the slot, P = K + 1 places (the token before the
slot, then its positions), L layers, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coconut.analysis.prefix_values import layout_with_slot
from coconut.data.batching import collate
from coconut.generation.generate import longest_first
from coconut.models import families
from coconut.models.latent_lm import LatentLM
from coconut.models.passes import Reads
from coconut.runs.study import NotApplicable
from coconut.utils.torch_utils import eval_mode


def need_places(lm: LatentLM) -> int:
    """The number of positions of the slot. Raises NotApplicable if it is empty, or for states of several widths."""
    if lm.reasoning.slot.is_empty or not lm.reasoning.num_thoughts:
        raise NotApplicable(f"{lm.reasoning.method} has nothing in its slot, so there are no places to measure.")
    if lm.thought_size != families.text_config(lm.base).hidden_size:
        raise NotApplicable("The hidden states of this model are not of one width in all layers.")
    return lm.reasoning.num_thoughts


@torch.no_grad()
def slot_states(lm: LatentLM, questions: list[list[int]], batch_size: int, *, pauses: bool = False) -> Tensor:
    """(N, P, L + 1, D) the hidden states before the slot and at each of its positions, in float32 on the CPU.

    Layer 0 is the input of the first layer, layer L the output of the last one after the final norm. `pauses`: the
    slot is filled with the embedding of `<pause>` in place of thoughts. The thoughts are computed as in generation, and
    one more pass over the whole rows gives the states of all places.
    """
    K = lm.reasoning.num_thoughts
    found: dict[int, Tensor] = {}
    with eval_mode(lm):
        for indices in longest_first(questions, batch_size):
            rows = [layout_with_slot(lm, questions[i], (), K) for i in indices]
            batch = collate(rows, lm.special).to(lm.device)
            is_latent_BT = batch.input_ids == lm.latent_id
            embed = lm.base.get_input_embeddings()
            embeds_BTD = embed(torch.where(is_latent_BT, lm.special.pause, batch.input_ids))
            if lm.reasoning.slot.thinks and not pauses:
                thoughts_BKD = lm(
                    batch.input_ids, batch.attention_mask, labels=batch.labels, return_target_logits=True,
                    reads=Reads(thoughts_BK=batch.thoughts_RK),
                ).thoughts  # fmt: skip
                embeds_BTD[is_latent_BT] = thoughts_BKD.flatten(0, 1).to(embeds_BTD)
            is_token_BT = batch.attention_mask.bool()
            ends_B1 = is_token_BT.long().cumsum(1).argmax(1, keepdim=True) + 1 - int(lm.reasoning.markers)
            columns_BP = ends_B1 + torch.arange(-K - 1, 0, device=lm.device)
            rows_B1 = torch.arange(len(rows), device=lm.device)[:, None]
            layers = lm.layer_states(embeds_BTD, is_token_BT)
            states_BPLD = torch.stack([layer_BTD[rows_B1, columns_BP] for layer_BTD in layers], dim=2).float().cpu()
            found |= zip(indices, states_BPLD, strict=True)
    return torch.stack([found[i] for i in range(len(questions))])
