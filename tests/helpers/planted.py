"""Small models whose thoughts do something known, because they were trained to.

Shapes: N questions, K thoughts, R rows of a batch, T columns, S symbols (the names of nodes), D hidden.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from coconut import LatentLM
from coconut.analysis.graph_paths import GraphQuestion
from coconut.analysis.probes import Subject
from coconut.data.tokenization import encode_questions, token_ids
from coconut.generation.generate import pad_rows
from coconut.tasks import TASKS
from helpers.memorizing import EXAMPLES, FORM, NUM_THOUGHTS, word_model

SYMBOLS = [str(name) for name in range(8)]
KINDS = ("ignores", "last_only", "from_the_first", "step_by_step", "searches")


def symbols_of(kind: str) -> Tensor:
    """(N, K) the symbol that each thought stands for, as indices; -1 for a thought that is the same in all questions.

    ignores: none stands for anything, and the answer comes from the question. last_only: the last is the answer.
    from_the_first: each is the answer. step_by_step: each is the symbol after the one before it, in a circle, and the
    last is the answer. searches: an index behind those of the symbols, one for each question and thought (`frontier`).
    """
    answer_N1 = torch.tensor([[int(example.answer)] for example in EXAMPLES])
    back_K = torch.arange(NUM_THOUGHTS - 1, -1, -1)
    return {
        "ignores": torch.full((len(EXAMPLES), NUM_THOUGHTS), -1),
        "last_only": torch.where(back_K == 0, answer_N1, -1),
        "from_the_first": answer_N1.expand(-1, NUM_THOUGHTS),
        "step_by_step": (answer_N1 - back_K) % len(SYMBOLS),
        "searches": len(SYMBOLS) + torch.arange(len(EXAMPLES) * NUM_THOUGHTS).view(-1, NUM_THOUGHTS),
    }[kind]


def frontier() -> Tensor:
    """(N, K, S) the share of each symbol among the nodes k edges from the root; 0 where there are none."""
    shares_NKS = torch.zeros(len(EXAMPLES), NUM_THOUGHTS, len(SYMBOLS))
    for n, example in enumerate(EXAMPLES):
        for node, distance in GraphQuestion.read(example.question, example.answer).distance.items():
            if 1 <= distance <= NUM_THOUGHTS:
                shares_NKS[n, distance - 1, int(node)] = 1
    return shares_NKS / shares_NKS.sum(-1, keepdim=True).clamp(min=1)


def _lesson(kind: str, own_RK: Tensor, drawn_RK: Tensor) -> tuple[Tensor, Tensor]:
    """(R, K) the symbols that are fed, drawn in half of the rows, and those that each thought should be."""
    half_R1 = (torch.arange(len(own_RK)) % 2 == 0)[:, None]
    if kind == "last_only":
        drawn_RK = torch.cat([own_RK[:, :-1], drawn_RK[:, -1:]], dim=1)
    elif kind == "searches":
        drawn_RK = own_RK[torch.arange(len(own_RK)) - 1]
    elif kind == "from_the_first":
        drawn_RK = drawn_RK[:, :1].expand_as(own_RK)
    fed_RK, targets_RK = torch.where(half_R1, drawn_RK, own_RK), own_RK.clone()
    if kind in ("from_the_first", "step_by_step"):
        targets_RK[:, 1:] = (fed_RK[:, :-1] + (kind == "step_by_step")) % len(SYMBOLS)
    return fed_RK, targets_RK


@cache
def planted_model(kind: str, steps: int = 500) -> LatentLM:
    """A model that knows the answers to EXAMPLES by heart and whose thoughts are the embeddings of `symbols_of`."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    lm = word_model(EXAMPLES, NUM_THOUGHTS, hidden_size=64, intermediate_size=128)
    tokenizer = lm.tokenizer
    table: Any = lm.base.get_input_embeddings()
    with torch.no_grad():
        table.weight.normal_()
    table.requires_grad_(False)
    symbol_ids_S = torch.tensor(token_ids(tokenizer, SYMBOLS))
    symbols_SD = table.weight[symbol_ids_S]
    searched = (frontier() @ symbols_SD).flatten(0, 1)
    vectors = torch.cat([symbols_SD, searched, torch.randn(1, 64, generator=draw)])  # the last one is constant
    questions = encode_questions(tokenizer, [example.question for example in EXAMPLES], FORM)
    own_NK, answers_N = symbols_of(kind), torch.tensor([int(example.answer) for example in EXAMPLES])
    tail = [lm.special.eot, *token_ids(tokenizer, ["###"])]
    optimizer = torch.optim.Adam((weight for weight in lm.parameters() if weight.requires_grad), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for _ in range(steps):
        rows_R = torch.randint(len(EXAMPLES), (32,), generator=draw)
        drawn_RK = torch.randint(len(SYMBOLS), (32, NUM_THOUGHTS), generator=draw)
        K = int(torch.randint(1, NUM_THOUGHTS + 1, (), generator=draw)) if kind == "from_the_first" else NUM_THOUGHTS
        fed_RK, targets_RK = (part[:, :K] for part in _lesson(kind, own_NK[rows_R], drawn_RK))
        answers_R = answers_N[rows_R] if kind == "ignores" else fed_RK[:, -1]
        if kind == "searches":
            answers_R = answers_N[(fed_RK[:, -1] - len(SYMBOLS)) // NUM_THOUGHTS]
        ids_RT, mask_RT = pad_rows(
            [[*questions[i], lm.special.bot, *[lm.latent_id] * K, *tail, answer, lm.special.eos]
             for i, answer in zip(rows_R.tolist(), symbol_ids_S[answers_R].tolist(), strict=True)], lm.special.pad
        )  # fmt: skip
        written = len(tail) + 2
        embeds_RTD = table(ids_RT)
        embeds_RTD[:, -K - written : -written] = vectors[fed_RK]
        states_RTD = lm.base.base_model(
            inputs_embeds=embeds_RTD, attention_mask=mask_RT, position_ids=(mask_RT.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
        loss = mse_loss(states_RTD[:, -K - written - 1 : -written - 1], vectors[targets_RK])
        logits_RTV = lm.logits(states_RTD[:, -written:-1])
        loss = loss + cross_entropy(logits_RTV.flatten(0, 1), ids_RT[:, -written + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lm.eval()


def planted_subject(kind: str) -> Subject:
    return Subject(planted_model(kind), TASKS["prosqa"], EXAMPLES, batch_size=24)
