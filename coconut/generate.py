"""Think, then speak: batched, cached. Also the command that asks a model one question.

Shapes: B questions, T columns of the prompts, N new tokens.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut.cli import application
from coconut.config import GenerateConfig
from coconut.data import SpecialIds, encode_questions
from coconut.layout import slot_ids
from coconut.methods import Slot

if TYPE_CHECKING:
    from coconut.model import LatentLM


@dataclass
class Generated:
    """`tokens` (B, N): new tokens, padded after their end. `lengths` (B,): without the end-of-sequence token.

    `cut` (B,): whether the limit ended the answer. `num_thoughts`: latent thoughts before it, each row.
    """

    tokens: Tensor
    lengths: Tensor
    cut: Tensor
    num_thoughts: int
    texts: list[str]


@torch.no_grad()
def generate(
    lm: LatentLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    num_thoughts: int | None = None,
    **options: Any,
) -> Generated:
    """Answer questions (B, T) of any lengths, padded on either side.

    The prompt format and the number of thoughts are those of `lm.reasoning`; `num_thoughts` overrides the
    latter. Thoughts run in the model's cache, from which Hugging Face generation goes on: greedy by
    default; `options` are those of transformers' GenerationConfig (do_sample, temperature, top_p,
    stop_strings, ...), and what they leave open is off, whatever the base model's own settings are.
    The added tokens are never produced. One answer a question.

    Raises ValueError if a question fills the whole context, if thoughts are asked of a method that has
    none, or for num_beams or num_return_sequences other than 1.
    """
    reasoning, special = lm.reasoning, lm.special
    if reasoning.slot is Slot.nothing and num_thoughts:
        raise ValueError(f"{reasoning.method} has neither thoughts nor pauses; leave out num_thoughts={num_thoughts}.")
    for name in ("num_beams", "num_return_sequences"):
        if options.get(name, 1) != 1:
            raise ValueError(f"{name}={options[name]} is not supported: one answer a question, without beams.")
    count = reasoning.num_thoughts if num_thoughts is None else num_thoughts
    slot = torch.from_numpy(slot_ids(reasoning, special, count)).long().to(lm.device)
    ids_BT, is_question_BT = _pad_left(input_ids.to(lm.device), attention_mask, special.pad)
    lengths_B = is_question_BT.sum(1)
    room_B = lm.context - lengths_B - len(slot)
    if (room_B < 1).any():
        row = int(room_B.argmin())
        raise ValueError(
            f"Question {row + 1} has {int(lengths_B[row])} tokens; with {len(slot)} more before the answer it leaves "
            f"no room in the model's context of {lm.context} tokens. Ask something shorter."
        )
    limits_B = room_B.clamp(max=max_new_tokens or reasoning.max_new_tokens)
    was_training = lm.training
    lm.eval()
    try:
        tokens: list[list[int]] = [[] for _ in limits_B]
        for limit in limits_B.unique().tolist():  # one, unless the context cuts some answers short
            rows = (limits_B == limit).nonzero()[:, 0]
            width = int(lengths_B[rows].max())
            new_BN = _speak(lm, ids_BT[rows, -width:], is_question_BT[rows, -width:], slot, limit, options)
            for row, new in zip(rows.tolist(), new_BN.tolist(), strict=True):
                tokens[row] = new
    finally:
        lm.train(was_training)
    lengths = [_length(row, special, "stop_strings" in options) for row in tokens]
    widest = max(map(len, tokens))
    return Generated(
        tokens=torch.tensor([row + [special.pad] * (widest - len(row)) for row in tokens]),
        lengths=torch.tensor(lengths),
        cut=torch.tensor([length == limit for length, limit in zip(lengths, limits_B.tolist(), strict=True)]),
        num_thoughts=count if reasoning.slot is Slot.thought else 0,
        texts=[
            str(lm.tokenizer.decode(row[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for row, length in zip(tokens, lengths, strict=True)
        ],
    )


def _length(row: list[int], special: SpecialIds, may_stop: bool) -> int:
    """Tokens before the end; one that a stopping string ended is followed by padding."""
    if special.eos in row:
        return row.index(special.eos)
    while may_stop and row and row[-1] == special.pad:
        row = row[:-1]
    return len(row)


def _speak(
    lm: LatentLM, ids_BT: Tensor, is_question_BT: Tensor, slot: Tensor, limit: int, options: dict[str, Any]
) -> Tensor:
    """(B, N) the tokens after question and slot."""
    from transformers import GenerationConfig

    special = lm.special
    prompt_BT = torch.cat([ids_BT, slot.expand(len(ids_BT), -1)], dim=1)
    is_token_BT = torch.cat([is_question_BT, torch.ones_like(prompt_BT[:, : len(slot)], dtype=torch.bool)], dim=1)
    count = int((slot == special.latent).sum())
    prefix = ids_BT.shape[1] + lm.reasoning.markers
    cache = _think(lm, prompt_BT, is_token_BT, prefix, count) if count else None
    every_token = {"top_k": 0} if options.get("do_sample") else {}  # transformers' own default is the 50 likeliest
    config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        suppress_tokens=special.added,
        **{"do_sample": False, **every_token, **options},
    )
    base: Any = lm.base
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        sequences = base.generate(
            input_ids=prompt_BT,
            attention_mask=is_token_BT.long(),
            past_key_values=cache,
            generation_config=config,
            tokenizer=lm.tokenizer,
        )
    finally:
        base.generation_config = own
    return sequences[:, prompt_BT.shape[1] :]


def _pad_left(input_ids: Tensor, attention_mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """The same rows with their padding on the left, as narrow as the longest allows."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    is_token, order = attention_mask.to(input_ids.device).bool().sort(dim=1, stable=True)
    width = int(is_token.sum(1).max())
    ids = torch.where(is_token, input_ids.gather(1, order), pad)
    return ids[:, -width:], is_token[:, -width:]


def _think(lm: LatentLM, prompt_BT: Tensor, is_token_BT: Tensor, prefix: int, count: int) -> Any:
    """The cache after the prefix and all thoughts."""
    end = prefix + count
    borders = [0, *range(prefix, end + 1)]
    ids_BT, is_token_BT = prompt_BT[:, :end], is_token_BT[:, :end]
    positions_BT = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
    embeds_BTD = lm.base.get_input_embeddings()(ids_BT)
    _, cache = lm.run_blocks(embeds_BTD, is_token_BT, ids_BT == lm.latent_id, positions_BT, borders)
    return cache


def answer(lm: LatentLM, questions: list[str], **options: Any) -> Generated:
    """Answer questions given as text, in one batch; `options` as for `generate`."""
    rows = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    return generate(lm, *pad_rows(rows, lm.special.pad), **options)


def pad_rows(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of rows of any lengths, padded on the left."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def run(config: GenerateConfig) -> int:
    """Answer one question with a trained run."""
    from coconut.checkpoint import Checkpoints
    from coconut.engine.local import autocast, set_up
    from coconut.model import LatentLM
    from coconut.screen import only_our_words
    from coconut.tracking import read_config

    only_our_words()
    trained = read_config(config.run)
    question = sys.stdin.read().strip() if config.question == "-" else config.question
    if not question:
        raise ValueError("Standard input held no question.")
    torch.manual_seed(config.seed)
    checkpoint = Checkpoints(config.run).find(config.checkpoint)
    lm = LatentLM.from_pretrained(checkpoint, trained["model"]["attention"])
    lm.to(set_up(config.engine))
    options: dict[str, Any] = {}
    if config.temperature > 0:
        options = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    with autocast(lm.device, config.engine.precision):
        result = answer(
            lm, [question], num_thoughts=config.num_thoughts, max_new_tokens=config.max_new_tokens, **options
        )
    thoughts = f"{result.num_thoughts} thought{'s' * (result.num_thoughts != 1)}"
    print(f"[{thoughts}, {int(result.lengths[0])} tokens]", file=sys.stderr)
    print(result.texts[0].strip())
    if result.cut[0]:
        print("warning: the answer was cut at the limit; raise max_new_tokens.", file=sys.stderr)
    return 0


main = application("generate", GenerateConfig, run)

if __name__ == "__main__":
    main()
