"""The probability of names: what a model would say next after so many thoughts.

Shapes: B questions of a batch, T columns, D hidden, V vocabulary, L forced tokens, R rows of (question, name).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import think
from coconut.methods import PromptFormat
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.models.latent_lm import LatentLM

_CACHE_BYTES = 2**28  # of the cache that is repeated for the names of several questions


@dataclass(frozen=True)
class Spelling:
    """A node's name at the start of a step: its token ids, and those that stand before it."""

    before: tuple[int, ...]
    name: tuple[int, ...]


def spell(lm: LatentLM, nodes: Sequence[str], symbolic: bool) -> dict[str, Spelling]:
    """How the names of nodes are encoded where a step begins with them, cut out of a whole encoded step."""
    template = lm.reasoning.format.step
    texts = [PromptFormat.fill(template, node if symbolic else f"Every {node} is a {node}.") for node in nodes]
    begin = len(template.split("{}")[0])
    start, end = (begin, begin) if symbolic else (begin + len("Every"), begin + len("Every "))  # a space may be a token
    encoded: Any = lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    found = {}
    for node, ids, spans in zip(nodes, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = [i for i, (left, right) in enumerate(spans) if left < end + len(node) and right > start]
        found[node] = Spelling(tuple(ids[: inside[0]]), tuple(ids[inside[0] : inside[-1] + 1]))
    return found


@torch.no_grad()
def name_probabilities(
    lm: LatentLM,
    prompts: Sequence[list[int]],
    candidates: Sequence[Sequence[Spelling]],
    counts: Collection[int],
    batch_size: int,
) -> dict[tuple[int, int], list[float]]:
    """By question and number of thoughts: the probability of each of the question's candidates.

    `prompts`: token ids of the questions. After the thoughts come `<eot>` and what stands before the name; the
    probability is the product over the name's tokens, in float32. The numbers of thoughts are `counts`.
    """
    found: dict[tuple[int, int], list[float]] = {}
    with eval_mode(lm):
        for chosen in longest_first(prompts, batch_size):
            for count, context in _after_each(lm, [prompts[i] for i in chosen], counts):
                values = _probabilities(lm, context, [candidates[i] for i in chosen])
                found |= {(i, count): each for i, each in zip(chosen, values, strict=True)}
    return found


@dataclass
class _Context:
    """What rows have read: their cache, which of its columns are tokens (B, T), the next position (B,)."""

    cache: Any
    is_token_BT: Tensor
    next_B: Tensor

    def select(self, rows: Sequence[int]) -> _Context:
        """A context of its own for each of these rows, which may be named several times."""
        index = torch.tensor(rows, device=self.next_B.device)
        fork = self.fork()
        fork.cache.batch_select_indices(index)
        return _Context(fork.cache, self.is_token_BT[index], self.next_B[index])

    def fork(self) -> _Context:
        """The same once more, to be read on from."""
        return _Context(copy(self.cache), self.is_token_BT, self.next_B)

    def read(self, lm: LatentLM, embeds_BLD: Tensor) -> Tensor:
        """Read on; the last hidden states (B, L, D)."""
        B, L = embeds_BLD.shape[:2]
        self.is_token_BT = torch.cat([self.is_token_BT, self.is_token_BT.new_ones(B, L)], dim=1)
        positions_BL = self.next_B[:, None] + torch.arange(L, device=self.next_B.device)
        self.next_B = self.next_B + L
        return lm.hidden_states(embeds_BLD, self.is_token_BT, positions_BL, self.cache)

    def read_ids(self, lm: LatentLM, ids_BL: Tensor) -> Tensor:
        return self.read(lm, lm.base.get_input_embeddings()(ids_BL))


def _after_each(lm: LatentLM, prompts: Sequence[list[int]], counts: Collection[int]) -> Iterator[tuple[int, _Context]]:
    """For each number of thoughts in rising order, the context after a prompt and so many thoughts."""
    ids_BT, mask_BT = pad_rows([[*prompt, lm.special.bot] for prompt in prompts], lm.special.pad)
    ids_BT, mask_BT = ids_BT.to(lm.device), mask_BT.to(lm.device)
    thinking = think(lm, ids_BT, mask_BT, 0)
    context = _Context(thinking.cache, mask_BT.bool(), mask_BT.sum(1))
    last_BD = thinking.states
    for count in range(max(counts, default=-1) + 1):
        if count:
            last_BD = context.read(lm, last_BD[:, None])[:, -1]
        if count in counts:
            yield count, context.fork()


def _probabilities(lm: LatentLM, context: _Context, candidates: Sequence[Sequence[Spelling]]) -> list[list[float]]:
    """Of each candidate's name, for each row, after `<eot>` and what stands before the name."""
    found = [[0.0] * len(of_row) for of_row in candidates]
    for before in {spelling.before for of_row in candidates for spelling in of_row}:
        spoken = context.fork()
        forced_L = torch.tensor([lm.special.eot, *before], device=lm.device)
        states_BLD = spoken.read_ids(lm, forced_L.expand(len(candidates), -1))
        first_BV = lm.logits(states_BLD[:, -1]).float().log_softmax(-1).cpu()
        longer: list[tuple[int, int]] = []
        for b, of_row in enumerate(candidates):
            for n, spelling in enumerate(of_row):
                if spelling.before == before:
                    found[b][n] = float(first_BV[b, spelling.name[0]].exp())
                    if len(spelling.name) > 1:
                        longer.append((b, n))
        for part in _affordable(spoken, longer):
            names = [candidates[b][n].name for b, n in part]
            rests = _rest_log_probs(lm, spoken.select([b for b, _ in part]), names)
            for (b, n), rest in zip(part, rests, strict=True):
                found[b][n] *= math.exp(rest)
    return found


def _affordable(context: _Context, rows: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The rows in parts whose caches are not too large together."""
    bytes_each = sum(layer.keys[:1].nbytes + layer.values[:1].nbytes for layer in context.cache.layers)
    most = max(1, _CACHE_BYTES // bytes_each)
    for first in range(0, len(rows), most):
        yield rows[first : first + most]


def _rest_log_probs(lm: LatentLM, context: _Context, names: Sequence[tuple[int, ...]]) -> list[float]:
    """(R,) the log-probability of all tokens but the first of each name, one name a row."""
    width = max(map(len, names)) - 1
    padded = [[*name, *[lm.special.pad] * (width + 1 - len(name))] for name in names]
    ids_RL = torch.tensor(padded, device=lm.device)
    is_name_RL = torch.tensor([[j < len(name) - 1 for j in range(width)] for name in names], device=lm.device)
    states_RLD = context.read_ids(lm, ids_RL[:, :-1])
    log_probs_RLV = lm.logits(states_RLD).float().log_softmax(-1)
    log_probs_RL = log_probs_RLV.gather(-1, ids_RL[:, 1:, None])[..., 0]
    return torch.where(is_name_RL, log_probs_RL, 0.0).sum(1).tolist()
