"""CODI (Shen et al., arXiv 2502.21074) in plain PyTorch; read coconut_from_scratch.py first.

    python examples/codi_from_scratch.py

A question is a table of letters, and one letter. In "cadb?a" the first place of the table says where a leads, the
second where b leads, and so on: from a one comes to c, then to d, then to b. The chain is "cdb", and its last letter is
the answer. Of each example two sequences are made, which the same weights read:

    student   cadb?a <bot> <latent> <latent> <eot> =b <eos>
    teacher   cadb?a cd=b <eos>

The teacher writes the chain, all but its last step, which is the answer already. The student thinks instead. What the
teacher has computed when it has read "=" is what the student is to have computed there: see `terms`.

Shapes: B rows, T columns, L layers and one more for the embeddings, D hidden, V vocabulary.
"""

import argparse
import random
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

HOPS = 3
THOUGHTS = 2
WEIGHTS = (1.0, 1.0, 1.0)  # of the terms: student, teacher, states
LETTERS = "abcdefgh"
VOCABULARY = [*LETTERS, "?", "=", "<pad>", "<bot>", "<eot>", "<latent>", "<eos>"]
PAD, BOT, EOT, LATENT, EOS = range(len(LETTERS) + 2, len(VOCABULARY))


def draw() -> tuple[str, str]:
    """A question and its chain. All letters of the table lie on one circle, so no two of the chain are the same."""
    size = random.randint(6, len(LETTERS))
    circle = random.sample(LETTERS[:size], size)
    leads_to = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    table = "".join(leads_to[letter] for letter in LETTERS[:size])
    return f"{table}?{circle[0]}", "".join(circle[1 : HOPS + 1])


def encode(text: str) -> list[int]:
    return [VOCABULARY.index(letter) for letter in text]


def prompt(question: str) -> list[int]:
    return [*encode(question), BOT, *[LATENT] * THOUGHTS, EOT]


def student(question: str, chain: str) -> list[int]:
    return [*prompt(question), *encode(f"={chain[-1]}"), EOS]


def teacher(question: str, chain: str) -> list[int]:
    return [*encode(question), *encode(f"{chain[:-1]}={chain[-1]}"), EOS]


def padded(rows: list[list[int]]) -> Tensor:
    """(B, T), padded on the left, so that thoughts, "=" and answer stand in the same columns in all rows."""
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + row for row in rows])


class Model(nn.Module):
    """A language model, and the projector that its thoughts pass before they are fed back."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(vocab_size=len(VOCABULARY), n_positions=24, n_embd=32, n_layer=2, n_head=2,
                            initializer_range=0.15, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                            bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, use_cache=False)  # fmt: skip
        D = config.n_embd
        self.lm = GPT2LMHeadModel(config)
        self.projector = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D), nn.LayerNorm(D))

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and states (B, T, L, D). For each thought in turn run everything; see Coconut."""
        mask_BT = (ids_BT != PAD).long()
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        embeds_BTD = self.lm.transformer.wte(ids_BT)
        for t in (ids_BT == LATENT).any(0).nonzero()[:, 0].tolist():
            before = self.lm.transformer(inputs_embeds=embeds_BTD[:, :t], attention_mask=mask_BT[:, :t],
                                         position_ids=positions_BT[:, :t])  # fmt: skip
            fed_BD = self.projector(before.last_hidden_state[:, -1])
            embeds_BTD = torch.cat([embeds_BTD[:, :t], fed_BD[:, None], embeds_BTD[:, t + 1 :]], dim=1)
        output = self.lm(inputs_embeds=embeds_BTD, attention_mask=mask_BT, position_ids=positions_BT,
                         output_hidden_states=True)  # fmt: skip
        return output.logits, torch.stack(output.hidden_states, dim=2)


def tokens_term(logits_BTV: Tensor, ids_BT: Tensor, count: int) -> Tensor:
    """Next-token prediction: the mean over the last `count` tokens of each row."""
    return F.cross_entropy(logits_BTV[:, -count - 1 : -1].flatten(0, 1), ids_BT[:, -count:].flatten())


def states_term(student_BLD: Tensor, teacher_BLD: Tensor) -> Tensor:
    """How far the student's states are from the teacher's, relative to the teacher's deviation in each layer.

    The teacher is held to nothing here: it learns from its tokens alone.
    """
    teacher_BLD = teacher_BLD.detach()
    deviation_L = teacher_BLD.transpose(0, 1).flatten(1).std(1)
    distance_BLD = F.smooth_l1_loss(student_BLD, teacher_BLD, reduction="none")
    return (distance_BLD.mean((0, 2)) / deviation_L).mean()


def terms(model: Model, examples: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of the loss: the student's tokens, the teacher's tokens, and the states of both after "="."""
    student_BT = padded([student(*example) for example in examples])
    teacher_BT = padded([teacher(*example) for example in examples])
    student_logits, student_states = model(student_BT)
    teacher_logits, teacher_states = model(teacher_BT)
    return (
        tokens_term(student_logits, student_BT, len("=b") + 1),
        tokens_term(teacher_logits, teacher_BT, len("cd=b") + 1),
        states_term(student_states[:, -3], teacher_states[:, -3]),  # "=", a letter, <eos>
    )


@torch.no_grad()
def write(model: Model, prompts: list[list[int]], count: int) -> list[str]:
    """What is likeliest, token by token, up to <eos>."""
    ids_BT = padded(prompts)
    for _ in range(count):
        ids_BT = torch.cat([ids_BT, model(ids_BT)[0][:, -1:].argmax(-1)], dim=1)
    written = ("".join(VOCABULARY[token] for token in row) for row in ids_BT[:, -count:].tolist())
    return [text.partition("<eos>")[0] for text in written]


def score(written: list[str], chains: Iterable[str]) -> float:
    """The share of texts whose letter after "=" is the answer."""
    right = [text.partition("=")[2] == chain[-1] for text, chain in zip(written, chains, strict=True)]
    return sum(right) / len(right)


def main(updates: int) -> None:
    random.seed(0)
    torch.manual_seed(0)
    unseen: dict[str, str] = {}
    while len(unseen) < 500:
        unseen.update([draw()])
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for update in range(1, updates + 1):
        drawn = [(question, chain) for question, chain in (draw() for _ in range(64)) if question not in unseen]
        found = terms(model, drawn)
        optimizer.zero_grad()
        (torch.tensor(WEIGHTS) * torch.stack(found)).sum().backward()
        optimizer.step()
        if update % max(updates // 5, 1) == 0:
            thought = write(model, [prompt(question) for question in unseen], len("=b") + 1)
            taught = write(model, [encode(question) for question in unseen], len("cd=b") + 1)
            question, chain = next(iter(unseen.items()))
            values = " ".join(f"{term.item():.3f}" for term in found)
            print(f"update {update}: terms {values}; right of {len(unseen)} unseen questions: "
                  f"student {score(thought, unseen.values()):.1%}, teacher {score(taught, unseen.values()):.1%}; "
                  f"{question} ({chain}): {thought[0]}, {taught[0]}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CODI from scratch.")
    parser.add_argument("--updates", type=int, default=1600, help="default: 1600")
    main(parser.parse_args().updates)
