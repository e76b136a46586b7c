"""Coconut (Hao et al., arXiv 2412.06769) in a hundred lines of plain PyTorch: the file to read first.

    python examples/coconut_from_scratch.py

A question is a table of letters, and one letter. In "cadb?a" the first place of the table says where a leads, the
second where b leads, and so on: from a one comes to c, then to d, then to b. The chain is "cdb", what three look-ups
give: two steps, and the last letter is the answer. At stage k the first k steps are not written but thought.

Shapes: B rows, T columns, D hidden, V vocabulary, N targets.
"""

import argparse
import random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

HOPS = 3
LETTERS = "abcdefgh"
VOCABULARY = [*LETTERS, "?", "<pad>", "<bot>", "<eot>", "<latent>", "<eos>"]
PAD, BOT, EOT, LATENT, EOS = range(len(LETTERS) + 1, len(VOCABULARY))


def draw() -> tuple[str, str]:
    """A question and its chain. All letters of the table lie on one circle, so no two of the chain are the same."""
    size = random.randint(6, len(LETTERS))
    circle = random.sample(LETTERS[:size], size)
    leads_to = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    table = "".join(leads_to[letter] for letter in LETTERS[:size])
    return f"{table}?{circle[0]}", "".join(circle[1 : HOPS + 1])


def encode(text: str) -> list[int]:
    return [VOCABULARY.index(letter) for letter in text]


def prompt(question: str, thoughts: int) -> list[int]:
    return [*encode(question), BOT, *[LATENT] * thoughts, EOT]


def sequence(question: str, chain: str, stage: int) -> list[int]:
    """Stage k has k thoughts in place of the first k steps. Stage 0 is the written chain."""
    return [*prompt(question, stage), *encode(chain[stage:]), EOS]


def padded(rows: list[list[int]]) -> Tensor:
    """(B, T), padded on the left, so that the thoughts of all rows stand in the same columns."""
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + row for row in rows])


def logits(model: GPT2LMHeadModel, ids_BT: Tensor) -> Tensor:
    """(B, T, V). For each thought in turn run everything, and feed the state before the thought in its place."""
    mask_BT = (ids_BT != PAD).long()
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    is_thought_BT = ids_BT == LATENT
    embeds_BTD = model.transformer.wte(ids_BT)
    for t in is_thought_BT.any(0).nonzero()[:, 0].tolist():
        output = model.transformer(inputs_embeds=embeds_BTD, attention_mask=mask_BT, position_ids=positions_BT)
        state_BD = output.last_hidden_state[:, t - 1]
        fed_BD = torch.where(is_thought_BT[:, t, None], state_BD, embeds_BTD[:, t])
        embeds_BTD = torch.cat([embeds_BTD[:, :t], fed_BD[:, None], embeds_BTD[:, t + 1 :]], dim=1)
    return model(inputs_embeds=embeds_BTD, attention_mask=mask_BT, position_ids=positions_BT).logits


def loss(model: GPT2LMHeadModel, ids_BT: Tensor) -> Tensor:
    """Mean over what stands after <eot>. Question, thoughts and markers are no targets."""
    after_BT = ((ids_BT == EOT).cumsum(1) > 0) & (ids_BT != EOT)
    logits_NV = logits(model, ids_BT)[:, :-1][after_BT[:, 1:]]
    return F.cross_entropy(logits_NV, ids_BT[:, 1:][after_BT[:, 1:]])


@torch.no_grad()
def answers(model: GPT2LMHeadModel, questions: list[str], thoughts: int) -> list[str]:
    """Think, then write what is likeliest, letter by letter."""
    ids_BT = padded([prompt(question, thoughts) for question in questions])
    start = ids_BT.shape[1]
    for _ in range(HOPS - thoughts + 1):
        ids_BT = torch.cat([ids_BT, logits(model, ids_BT)[:, -1:].argmax(-1)], dim=1)
    written = ("".join(VOCABULARY[token] for token in row) for row in ids_BT[:, start:].tolist())
    return [text.partition("<eos>")[0] for text in written]


def new_model() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=len(VOCABULARY), n_positions=24, n_embd=32, n_layer=2, n_head=2,
                        initializer_range=0.15, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, use_cache=False)  # fmt: skip
    return GPT2LMHeadModel(config)


def main(updates: int) -> None:
    random.seed(0)
    torch.manual_seed(0)
    unseen: dict[str, str] = {}
    while len(unseen) < 500:
        unseen.update([draw()])
    model = new_model()
    for stage in range(HOPS):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(updates):
            rows = [(question, chain) for question, chain in (draw() for _ in range(64)) if question not in unseen]
            optimizer.zero_grad()
            loss(model, padded([sequence(question, chain, stage) for question, chain in rows])).backward()
            optimizer.step()
        written = answers(model, list(unseen), stage)
        right = sum(text[-1:] == chain[-1] for text, chain in zip(written, unseen.values(), strict=True))
        question, chain = next(iter(unseen.items()))
        print(f"stage {stage}: {right / len(unseen):.1%} of {len(unseen)} unseen questions are answered right. "
              f"{question} ({chain}) with {stage} thoughts: {written[0]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Coconut from scratch.")
    parser.add_argument("--updates", type=int, default=400, help="of each of the three stages (default: 400)")
    main(parser.parse_args().updates)
