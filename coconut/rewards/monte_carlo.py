"""Monte Carlo step labels: the share of rollouts from a step's end that come out right.

Math-Shepherd (Wang et al., arXiv 2312.08935). K completions are sampled from the end of every step; the implicit reward
needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coconut.completions.completion import Completion, question_of
from coconut.completions.rollouts import CorrectnessReward
from coconut.generation.generate import longest_first, pad_rows
from coconut.rewards.labelled_answers import LabelledAnswers
from coconut.rewards.step_spans import completion_parts, step_count

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


Key = tuple[int, tuple[int, ...]]  # of an answer up to a step's end: the index of its question, and its tokens


CONTINUED = 1  # the end of random keys, which tells them from those of whole answers


@dataclass(frozen=True)
class StepLabels:
    """Monte Carlo estimates of the steps of each completion, ordered by question.

    shares: for each step, the share of its rollouts that came out right.
    num_rollouts: rollouts made, fewer than steps times K where completions have a common prefix.
    tokens: tokens forwarded, each prefix once, and the sampled tokens.
    """

    shares: list[list[float]]
    num_rollouts: int
    tokens: int


@torch.no_grad()
def step_labels(
    lm: LatentLM, judge: CorrectnessReward, labelled: Sequence[LabelledAnswers], *,
    rollouts: int = 8, seed: int = 0, batch_size: int = 64,
) -> StepLabels:  # fmt: skip
    """Label every step of every completion by `rollouts` completions sampled from its end.

    Completions of a question with a common prefix, of the same mode and number of thoughts, share their rollouts.
    """
    eos, form = lm.special.eos, lm.reasoning.format
    prefix_of: dict[Key, Completion] = {}
    ends: list[list[Key]] = []  # of each answer, where its steps end
    for n, row in enumerate(labelled):
        for completion in row.completions:
            parts = completion_parts(lm, completion.completion_ids)
            cuts = [len(parts) - parts[::-1].index(step) for step in range(step_count(completion.text, form))]
            prefixes = [completion.with_completion_ids(completion.completion_ids[:cut]) for cut in cuts]
            ends.append([(n, tuple(prefix.layout.ids.tolist())) for prefix in prefixes])
            prefix_of |= zip(ends[-1], prefixes, strict=True)
    keys = sorted(prefix_of)
    prefixes = [prefix_of[key] for key in keys]
    tokens, shares = sum(len(ids) for _, ids in keys), {}
    continuations = continue_completions(lm, prefixes, rollouts, seed=seed, batch_size=batch_size)
    for key, prefix, continued in zip(keys, prefixes, continuations, strict=True):
        whole_ids = [[token for token in [*prefix.completion_ids, *added] if token != eos] for added in continued]
        texts = [str(lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in whole_ids]
        shares[key] = float(np.mean([judge.is_correct(labelled[key[0]].example, text) for text in texts]))
        tokens += sum(token != eos for added in continued for token in added)
    return StepLabels([[shares[key] for key in row] for row in ends], len(keys) * rollouts, tokens)


@torch.no_grad()
def continue_completions(
    lm: LatentLM, prefixes: Sequence[Completion], count: int, *, seed: int = 0, batch_size: int = 64
) -> list[list[list[int]]]:
    """Sample `count` continuations of each prefix; token ids, with the end of the sequence unless truncated.

    A prefix that has ended, or that fills the model's context, has empty continuations. Continuation n of prefix i is
    drawn with the numbers of (seed, i, n), so that it does not depend on `batch_size`, but for rounding.
    """
    continuations: dict[int, list[list[int]]] = {}
    for indices, prompts, options in _batches(lm, prefixes, batch_size):
        ids, mask = pad_rows(prompts, lm.special.pad)
        keys = [(seed, index, number, CONTINUED) for index in indices for number in range(count)]
        out = lm.generate(ids, mask, do_sample=True, num_return_sequences=count, random_keys=keys, **options)
        for row, index in enumerate(indices):
            continuations[index] = [out.completion_ids(i) for i in range(row * count, (row + 1) * count)]
    return [continuations.get(index, [[]] * count) for index in range(len(prefixes))]


def _batches(
    lm: LatentLM, prefixes: Sequence[Completion], size: int
) -> Iterator[tuple[list[int], list[list[int]], dict[str, Any]]]:
    """Batches for `generate`: the indices of the prefixes, the prompts, and further arguments.

    Without slot, markers and control token, a prefix is simply a longer prompt. Otherwise `generate` adds them after
    the question, and the rest of the prefix is passed as `prefix_ids`, in batches of equal length.
    """
    reasoning, eos = lm.reasoning, lm.special.eos
    fits = [len(s.layout.ids) < lm.max_sequence_length for s in prefixes]
    unfinished = [i for i, s in enumerate(prefixes) if fits[i] and s.completion_ids[-1:] != [eos]]
    if not (reasoning.modes or reasoning.markers or not reasoning.slot.is_empty):
        whole = [prefixes[i].layout.ids.tolist() for i in unfinished]
        for rows in longest_first(whole, size):
            yield [unfinished[row] for row in rows], [whole[row] for row in rows], {}
        return
    for width in sorted({len(prefixes[i].completion_ids) for i in unfinished}):
        same_length = [i for i in unfinished if len(prefixes[i].completion_ids) == width]
        questions = [question_of(lm, prefixes[i]) for i in same_length]
        for rows in longest_first(questions, size):
            chosen = [prefixes[same_length[row]] for row in rows]
            ids = torch.tensor([completion.completion_ids for completion in chosen], dtype=torch.long)
            options: dict[str, Any] = {"prefix_ids": ids}
            if reasoning.modes:
                options["mode"] = [completion.mode for completion in chosen]
            elif reasoning.slot.thinks:
                options["num_thoughts"] = [completion.num_thoughts for completion in chosen]
            yield [same_length[row] for row in rows], [questions[row] for row in rows], options
