"""The probability of each node's name as the next step, after a number of thoughts.

Shapes: B questions of a batch, T columns, D hidden, V vocabulary, L forced tokens, R rows of (question, name).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut.analysis.context import Context
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import think
from coconut.methods import PromptFormat
from coconut.models.latent_lm import LatentLM
from coconut.utils.torch_utils import eval_mode

_CACHE_BYTES = 2**28  # the largest KV cache that is made for names of several tokens


@dataclass(frozen=True)
class Spelling:
    """The token ids of a node's name at the start of a step, and the ids of the step before the name."""

    before: tuple[int, ...]
    name: tuple[int, ...]


def spell(lm: LatentLM, nodes: Sequence[str], symbolic: bool) -> dict[str, Spelling]:
    """Encode the names of nodes as they occur at the start of a step.

    A whole step is encoded and the name is cut out of it, since tokens may depend on their context.
    """
    template = lm.reasoning.format.step
    texts = [PromptFormat.fill(template, node if symbolic else f"Every {node} is a {node}.") for node in nodes]
    begin = len(template.split("{}")[0])
    start, end = (begin, begin) if symbolic else (begin + len("Every"), begin + len("Every "))  # a space may be a token
    encoded: Any = lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    spellings = {}
    for node, ids, spans in zip(nodes, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = [i for i, (left, right) in enumerate(spans) if left < end + len(node) and right > start]
        spellings[node] = Spelling(tuple(ids[: inside[0]]), tuple(ids[inside[0] : inside[-1] + 1]))
    return spellings


@torch.no_grad()
def name_probabilities(
    lm: LatentLM, prompts: Sequence[list[int]], candidates: Sequence[Sequence[Spelling]], counts: Collection[int],
    batch_size: int,
) -> dict[tuple[int, int], list[float]]:  # fmt: skip
    """The probability of each candidate name, for each (index of a question, number of thoughts).

    `prompts`: token ids of the questions. `candidates`: the names for each question. `counts`: numbers of thoughts.
    After the thoughts, `<eot>` and the tokens before the name are forced. The probability is the product over the
    name's tokens, in float32.
    """
    probabilities: dict[tuple[int, int], list[float]] = {}
    with eval_mode(lm):
        for batch in longest_first(prompts, batch_size):
            for count, context in _after_each(lm, [prompts[i] for i in batch], counts):
                values = _probabilities(lm, context, [candidates[i] for i in batch])
                probabilities |= {(i, count): each for i, each in zip(batch, values, strict=True)}
    return probabilities


def _after_each(lm: LatentLM, prompts: Sequence[list[int]], counts: Collection[int]) -> Iterator[tuple[int, Context]]:
    """Yield each number of thoughts, in rising order, with the context after the prompts and that many thoughts."""
    ids_BT, mask_BT = pad_rows([[*prompt, lm.special.bot] for prompt in prompts], lm.special.pad)
    ids_BT, mask_BT = ids_BT.to(lm.device), mask_BT.to(lm.device)
    if lm.feedback.slot.in_parallel:
        for count in sorted(counts):
            is_token_BT = torch.cat([mask_BT.bool(), mask_BT.new_ones(len(mask_BT), count).bool()], dim=1)
            yield count, Context(think(lm, ids_BT, mask_BT, count).cache, is_token_BT, is_token_BT.sum(1))
        return
    context, last_BE = Context.after(lm, ids_BT, mask_BT)
    for count in range(max(counts, default=-1) + 1):
        if count:
            last_BE = context.extend(lm, lm.thought(last_BE).to(lm.base.dtype)[:, None])[:, -1]
        if count in counts:
            yield count, context.fork()


def _probabilities(lm: LatentLM, context: Context, candidates: Sequence[Sequence[Spelling]]) -> list[list[float]]:
    """The probability of each candidate name in each row, after `<eot>` and the tokens before the name."""
    probabilities = [[0.0] * len(of_row) for of_row in candidates]
    for before in {spelling.before for of_row in candidates for spelling in of_row}:
        forced = context.fork()
        forced_L = torch.tensor([lm.special.eot, *before], device=lm.device)
        embeds_BLD = lm.base.get_input_embeddings()(forced_L).expand(len(candidates), -1, -1)
        first_BV = lm.logits(lm.last_states(forced.extend(lm, embeds_BLD)[:, -1])).float().log_softmax(-1).cpu()
        multi_token: list[tuple[int, int]] = []
        for b, of_row in enumerate(candidates):
            for n, spelling in enumerate(of_row):
                if spelling.before == before:
                    probabilities[b][n] = float(first_BV[b, spelling.name[0]].exp())
                    if len(spelling.name) > 1:
                        multi_token.append((b, n))
        bytes_each = sum(layer.keys[:1].nbytes + layer.values[:1].nbytes for layer in forced.cache.layers)
        max_rows = max(1, _CACHE_BYTES // bytes_each)
        for part in (multi_token[first : first + max_rows] for first in range(0, len(multi_token), max_rows)):
            names = [candidates[b][n].name for b, n in part]
            rest_log_probs = _rest_log_probs(lm, forced.select([b for b, _ in part]), names)
            for (b, n), rest_log_prob in zip(part, rest_log_probs, strict=True):
                probabilities[b][n] *= math.exp(rest_log_prob)
    return probabilities


def _rest_log_probs(lm: LatentLM, context: Context, names: Sequence[tuple[int, ...]]) -> list[float]:
    """(R,) the log-probability of each name without its first token; row r of the context precedes names[r]."""
    width = max(map(len, names)) - 1
    padded = [[*name, *[lm.special.pad] * (width + 1 - len(name))] for name in names]
    ids_RL = torch.tensor(padded, device=lm.device)
    is_name_RL = torch.tensor([[j < len(name) - 1 for j in range(width)] for name in names], device=lm.device)
    states_RLD = lm.last_states(context.extend(lm, lm.base.get_input_embeddings()(ids_RL[:, :-1])))
    log_probs_RLV = lm.logits(states_RLD).float().log_softmax(-1)
    log_probs_RL = log_probs_RLV.gather(-1, ids_RL[:, 1:, None])[..., 0]
    return torch.where(is_name_RL, log_probs_RL, 0.0).sum(1).tolist()
