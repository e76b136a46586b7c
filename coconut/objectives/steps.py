"""A decoder writes each step of the chain from the thoughts that stand for it (SIM-CoT).

The decoder reads the thoughts of one step as input embeddings and predicts the tokens of the step after them. It is a
copy of the model, or of its first layers, and is trained with it; it is not used at inference. The gradient goes
through the thoughts into the model. Wei et al., arXiv 2509.20317; released code, CODI/src/model.py.

Which thoughts stand for which step is said by `coconut.methods.Spans.steps`: surplus steps belong to the last
thoughts, thoughts without a step are left out.

Shapes: R rows, K thoughts of a row, c thoughts of a step, G groups of c thoughts, M groups with a step, S tokens of
a step, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coconut.data.batching import IGNORED, Batch
from coconut.methods import Form, Per, Term
from coconut.models import families, lora
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import at_least_float32
from coconut.models.passes import LatentOutput
from coconut.objectives.base import TermObjective


class Objective(TermObjective):
    """Option `layers`: the decoder's, taken from the front of the model's; None (the default) for all.

    Per.span: the mean over a step's tokens, as on CODI; otherwise their sum, as the released code has it on Coconut.
    """

    def __init__(self, term: Term, forms: Sequence[Form], lm: LatentLM):
        super().__init__(term, forms, lm)
        self.thoughts_per_step = forms[self.of_form].thoughts_per_step or 1
        self.decoder: Any = first_layers(lm, term.options["layers"])

    def forward(self, lm: LatentLM, output: LatentOutput, batch: Batch, statistics: Tensor | None) -> Tensor:
        assert output.thoughts is not None
        table: Any = self.decoder.get_input_embeddings()
        has_step_RG = (batch.spans_RGS != IGNORED).any(-1) & (batch.form_R == self.of_form)[:, None]
        c, G = self.thoughts_per_step, has_step_RG.shape[1]
        thoughts_RGcD = output.thoughts[:, : G * c].unflatten(1, (G, c)) if G else output.thoughts[:, None, :0]
        nothing = not has_step_RG.any()  # the decoder runs all the same, since processes must do the same work
        if nothing:
            thoughts_McD = thoughts_RGcD.new_zeros(1, 1, thoughts_RGcD.shape[-1])
            steps_MS = torch.zeros_like(batch.form_R[:1, None]).expand(1, 2)  # gradients reach every weight
        else:
            thoughts_McD, steps_MS = thoughts_RGcD[has_step_RG], batch.spans_RGS[has_step_RG]
        embeds_MSD = table(steps_MS.clamp(min=0))
        inputs = torch.cat([thoughts_McD.to(embeds_MSD), embeds_MSD[:, :-1]], dim=1)
        logits_MSV = self.decoder(inputs_embeds=inputs, use_cache=False).logits[:, thoughts_McD.shape[1] - 1 :]
        logits_MVS = at_least_float32(logits_MSV).transpose(1, 2)
        losses_MS = F.cross_entropy(logits_MVS, steps_MS, ignore_index=IGNORED, reduction="none")
        if nothing:
            return 0 * losses_MS.sum()
        if self.term.per is Per.span:
            return (losses_MS.sum(1) / (steps_MS != IGNORED).sum(1)).sum()
        return losses_MS.sum()


def first_layers(lm: LatentLM, layers: int | None) -> nn.Module:
    """A trainable copy of the model's base in float32, without LoRA, with its first `layers` layers; all for None.

    Raises ValueError if the base has fewer, or if its family cannot be cut.
    """
    base = lora.merged(lm.base) if lm.adapter else lm.base
    own = families.text_config(base).num_hidden_layers
    if layers is not None and not 1 <= layers <= own:
        raise ValueError(f"The step decoder has {layers} layers, and the model {own}. Set it between 1 and {own}.")
    if layers in (None, own):
        decoder = deepcopy(base)
    else:
        config: Any = deepcopy(base.config)
        sizes = config.get_text_config(decoder=True)
        sizes.num_hidden_layers = layers
        if kinds := getattr(sizes, "layer_types", None):
            sizes.layer_types = kinds[:layers]
        with torch.random.fork_rng(devices=[]):
            decoder: Any = type(base)(config)
        decoder.to(base.device)
        missing = decoder.load_state_dict(base.state_dict(), strict=False).missing_keys
        if missing:
            raise ValueError(f"{config.model_type} cannot be cut to {layers} layers: {missing[0]} is not in the model.")
    exact = torch.promote_types(base.dtype, torch.float32)  # trained weights have at least float32
    return decoder.to(exact).requires_grad_(True).train()
