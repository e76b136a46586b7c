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
from coconut.data import encode_questions
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
    default; `options` are those of transformers' GenerationConfig (do_sample, temperature, top_p, ...).
    The added tokens are never produced.

    Raises ValueError if a question fills the whole context.
    """
    from transformers import GenerationConfig

    reasoning, special = lm.reasoning, lm.special
    count = reasoning.num_thoughts if num_thoughts is None else num_thoughts
    if reasoning.slot is Slot.nothing:
        count = 0
    slot = torch.from_numpy(slot_ids(reasoning, special, count)).long().to(lm.device)
    question_ids, is_question = _pad_left(input_ids.to(lm.device), attention_mask, special.pad)
    B, width = question_ids.shape
    prompt_BT = torch.cat([question_ids, slot.expand(B, -1)], dim=1)
    is_token_BT = torch.cat([is_question, torch.ones(B, len(slot), dtype=torch.bool, device=lm.device)], dim=1)

    longest = prompt_BT.shape[1]
    limit = min(max_new_tokens or reasoning.max_new_tokens, lm.context - longest)
    if limit < 1:
        raise ValueError(
            f"A question of {width} tokens with {count} thoughts leaves no room for an answer in the model's context "
            f"of {lm.context} tokens. Ask something shorter."
        )
    was_training = lm.training
    lm.eval()
    try:
        latent = reasoning.slot is Slot.thought and count > 0
        cache = _think(lm, prompt_BT, is_token_BT, width + reasoning.markers, count) if latent else None
        sequences = lm.base.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt_BT,
            attention_mask=is_token_BT.long(),
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=limit,
                eos_token_id=special.eos,
                pad_token_id=special.pad,
                suppress_tokens=special.added,
                **{"do_sample": False, **options},
            ),
        )
    finally:
        lm.train(was_training)
    tokens_BN = sequences[:, longest:]
    ended_BN = (tokens_BN == special.eos).cumsum(1) > 0
    lengths_B = (~ended_BN).sum(1)
    texts = [
        str(lm.tokenizer.decode(row[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for row, length in zip(tokens_BN.tolist(), lengths_B.tolist(), strict=True)
    ]
    return Generated(tokens_BN, lengths_B, ~ended_BN.any(1), count if latent else 0, texts)


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
    from coconut.engine.local import autocast, choose_device
    from coconut.model import LatentLM
    from coconut.tracking import only_our_words, read_config

    only_our_words()
    read_config(config.run)
    question = sys.stdin.read().strip() if config.question == "-" else config.question
    if not question:
        raise ValueError("Standard input held no question.")
    torch.manual_seed(config.seed)
    lm = LatentLM.from_pretrained(Checkpoints(config.run).find(config.checkpoint))
    lm.to(choose_device(config.engine.device))
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
