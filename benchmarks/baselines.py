"""Baselines: several implementations of the same work on the same weights, with questions as long as ProsQA's.

`released` follows the paper's description and what the released code is known to do (Hao et al., arXiv 2412.06769,
section 3): n + 1 passes of the whole model with its head over a KV cache; for every thought the input embeddings are
split into vectors and stacked again; the loss is taken over logits at every position. Questions are answered one at a
time, and each new token runs the whole sequence again without a cache. It is faster than that code in one point:
`indexed` also takes each vector out by its index, for which the backward pass makes a gradient of all positions.

`plain` is ordinary fine-tuning on the same tokens, thoughts included, in one pass with logits at the targets alone:
the cost of a training step in which nothing is sequential. Its GELU is fused, as ours.

`ours` is this project. Shapes: B rows, T columns, D hidden.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coconut import LatentLM
from coconut.acceleration.gelu import patched_gelu
from coconut.data.batching import IGNORED, Batch, epoch_batches, micro_batches
from coconut.data.examples import Example
from coconut.data.sequences import EpochView
from coconut.data.tokenization import ADDED_TOKENS, TokenizedData, build_word_tokenizer
from coconut.methods import Curriculum, plan

VOCABULARY = 50257 + len(ADDED_TOKENS)
NEW_TOKENS = 32


@dataclass(frozen=True)
class Size:
    """A GPT-2, and the number of rows in the batches that it is measured with."""

    layers: int
    width: int
    heads: int
    rows: int


SIZES = {
    "2 x 128": Size(2, 128, 8, 16),
    "2 x 768": Size(2, 768, 8, 16),
    "12 x 768": Size(12, 768, 12, 8),  # GPT-2, 124M
}


def in_own_process(module: str, *arguments: str) -> Any:
    """Run a module's `main` with these arguments in a new process, and parse the last line that it prints."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_model(size: Size, dropout: float = 0.0) -> LatentLM:
    """With GPT-2's vocabulary and context. Without dropout implementations can be compared exactly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = build_word_tokenizer([Example(" ".join(f"w{i}" for i in range(100)), ("a",), "b")])
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCABULARY - len(ADDED_TOKENS), n_embd=size.width, n_layer=size.layers, n_head=size.heads,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout,
    )  # fmt: skip
    return LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, init="random").train()


# --- the work ---------------------------------------------------------------------------------------


def make_data(rows: int) -> TokenizedData:
    """Random tokens in segments that are as long as ProsQA's in GPT-2's tokens.

    Questions of 362 tokens on average, standard deviation 56, from 210 to 525; 3 to 6 steps of 8 to 12 tokens;
    answers of 9 (the 300 released validation rows).
    """
    random = np.random.default_rng(0)
    questions = np.clip(random.normal(362, 56, rows).round().astype(int), 210, 525)
    steps = random.choice([3, 4, 5, 6], rows, p=[0.41, 0.45, 0.12, 0.02])
    lengths = [[q, *random.integers(8, 13, s), 9] for q, s in zip(questions, steps, strict=True)]
    return TokenizedData.from_lists([random.integers(3, 100, sum(row)) for row in lengths], lengths)


def make_view(lm: LatentLM, data: TokenizedData, thoughts: int) -> EpochView:
    """The stage in which three steps are replaced by thoughts."""
    stages = plan("coconut", Curriculum(max_stage=3, total_length=50))
    stage = replace(stages.stages[3], together=(replace(stages.stages[3].form, slot_length=thoughts),))
    return EpochView(data, stages, stage, lm.special, seed=0, epoch=0)


def make_batch(lm: LatentLM, data: TokenizedData, thoughts: int, rows: int) -> Batch:
    """One update's rows, as in training."""
    view = make_view(lm, data, thoughts)
    return next(micro_batches(view, epoch_batches(view, rows, seed=0, epoch=0)[0], rows))


def make_batches(lm: LatentLM, thoughts: int, rows: int) -> dict[str, Batch]:
    """The same rows for each implementation: as in training, for `plain` with all padding on the right."""
    batch = make_batch(lm, make_data(512), thoughts, rows)
    return {**dict.fromkeys(IMPLEMENTATIONS, batch), "plain": padded_right(batch, lm.special.pad)}


# --- training steps ---------------------------------------------------------------------------------


def released(lm: LatentLM, batch: Batch, indexed: bool = False) -> Tensor:
    from transformers import DynamicCache

    base: Any = lm.base
    ids_BT, mask_BT = batch.input_ids, batch.attention_mask
    positions_BT = mask_BT.cumsum(1).sub(1).clamp(min=0)
    latents = [(row == lm.latent_id).nonzero()[:, 0].tolist() for row in ids_BT]
    most = max(map(len, latents))
    embeds_BTD = base.get_input_embeddings()(ids_BT)
    cache = DynamicCache(config=base.config)
    start, stop = 0, min((row[0] for row in latents if row), default=ids_BT.shape[1])
    logits, end = [], ids_BT.shape[1]
    for k in range(most + 1):
        out = base(
            inputs_embeds=embeds_BTD[:, start:stop], attention_mask=mask_BT[:, :stop],
            position_ids=positions_BT[:, start:stop], use_cache=True, output_hidden_states=True,
            **{lm.cache_argument: cache},
        )  # fmt: skip
        logits.append(out.logits)
        if k < most:
            states_BSD = out.hidden_states[-1]
            if indexed:
                vectors = [[embeds_BTD[b, t] for t in range(end)] for b in range(len(embeds_BTD))]
            else:
                vectors = [list(row.unbind()) for row in embeds_BTD.unbind()]
            for b, row in enumerate(latents):
                if k < len(row):
                    vectors[b][row[k]] = states_BSD[b, row[k] - 1 - start]
            embeds_BTD = torch.stack([torch.stack(row) for row in vectors])
        start, stop = stop, stop + 1 if k + 1 < most else end
    logits_BTV = torch.cat(logits, dim=1)
    return F.cross_entropy(
        logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]).float(), batch.labels[:, 1:].reshape(-1),
        ignore_index=IGNORED,
    )  # fmt: skip


def plain(lm: LatentLM, batch: Batch) -> Tensor:
    """`batch` is padded on the right, so that causal attention alone excludes the padding."""
    embeds_BTD = lm.base.get_input_embeddings()(batch.input_ids)
    with patched_gelu(lm.base):
        states_BTD = lm.base.base_model(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
    targets_BT = batch.labels[:, 1:]
    is_target_BT = targets_BT != IGNORED
    head: Any = lm.base.get_output_embeddings()
    logits_NV = head(states_BTD[:, :-1][is_target_BT])
    return F.cross_entropy(logits_NV.float(), targets_BT[is_target_BT])


def ours(lm: LatentLM, batch: Batch) -> Tensor:
    loss = lm(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
    assert loss is not None
    return loss


def padded_right(batch: Batch, pad: int) -> Batch:
    """The same rows with all padding on the right."""
    order = batch.attention_mask.sort(dim=1, descending=True, stable=True).indices
    ids, mask, labels = (part.gather(1, order) for part in (batch.input_ids, batch.attention_mask, batch.labels))
    width = int(mask.sum(1).max())
    ids, mask, labels = ids[:, :width], mask[:, :width], labels[:, :width]
    return replace(batch, input_ids=ids.masked_fill(mask == 0, pad), attention_mask=mask, labels=labels)


IMPLEMENTATIONS: dict[str, Callable[[LatentLM, Batch], Tensor]] = {
    "released": released, "plain": plain, "ours": ours, "indexed": partial(released, indexed=True),
}  # fmt: skip


# --- generation -------------------------------------------------------------------------------------


@torch.no_grad()
def released_answer(lm: LatentLM, ids_T: Tensor, thoughts: int) -> list[int]:
    """NEW_TOKENS tokens, greedily, without the end of the sequence."""
    from transformers import DynamicCache

    base: Any = lm.base
    table = base.get_input_embeddings()
    special = lm.special
    embeds_TD = table(torch.cat([ids_T, torch.tensor([special.bot])]))
    cache = DynamicCache(config=base.config)
    caching: dict[str, Any] = {lm.cache_argument: cache, "use_cache": True, "output_hidden_states": True}
    out = base(inputs_embeds=embeds_TD[None], **caching)
    for _ in range(thoughts):
        thought_1D = out.hidden_states[-1][0, -1:]
        embeds_TD = torch.cat([embeds_TD, thought_1D])
        out = base(inputs_embeds=thought_1D[None], **caching)
    embeds_TD = torch.cat([embeds_TD, table(torch.tensor([special.eot]))])
    new: list[int] = []
    for _ in range(NEW_TOKENS):
        logits_V = base(inputs_embeds=embeds_TD[None], use_cache=False).logits[0, -1]
        logits_V[[special.eos, *special.added]] = -torch.inf
        new.append(int(logits_V.argmax()))
        embeds_TD = torch.cat([embeds_TD, table(torch.tensor(new[-1:]))])
    return new


def answer(lm: LatentLM, ids_BT: Tensor, mask_BT: Tensor, thoughts: int) -> list[list[int]]:
    """The same by this project, for a batch of questions."""
    return lm.generate(
        ids_BT, mask_BT, num_thoughts=thoughts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
    ).tokens.tolist()
