"""Rollouts: groups of completions sampled from a policy, with their rewards.

Shapes: S completions of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from coconut.completions.completion import Completion, Cost, completions_of
from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.keyed_random import Key
from coconut.generation.room import room_for_question
from coconut.methods import PromptFormat
from coconut.tasks import Task
from coconut.tasks.chain import read_answer
from coconut.utils.console import list_lengths, log

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


class Reward(Protocol):
    """The reward of one completion, a finite number. `mode`: the mode of a hybrid model, else an empty string."""

    def __call__(self, example: Example, text: str, mode: str, cost: Cost, /) -> float: ...


@dataclass(frozen=True)
class CorrectnessReward:
    """1 minus the mode's cost for a right answer, `incorrect_reward` for a wrong one.

    mode_costs: a mode that is not named costs nothing. The mode is given by the control token, not by the text.
    max_mode_tokens: the most new tokens of a mode. A longer completion earns `incorrect_reward`: without a limit, a
        mode that costs nothing can learn to write what the others write.
    """

    task: Task
    form: PromptFormat
    mode_costs: Mapping[str, float] = field(default_factory=dict)
    incorrect_reward: float = -1.0
    max_mode_tokens: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, example: Example, text: str, mode: str, cost: Cost, /) -> float:
        if cost.new_tokens > self.max_mode_tokens.get(mode, cost.new_tokens) or not self.is_correct(example, text):
            return self.incorrect_reward
        return 1.0 - self.mode_costs.get(mode, 0.0)

    def is_correct(self, example: Example, text: str) -> bool:
        return self.task.judge(read_answer(text, self.form), example.answer)


@dataclass(frozen=True)
class Group:
    """The completions of one question, with their `rewards` (S,), float32."""

    example: Example
    completions: tuple[Completion, ...]
    rewards: Tensor


def examples_that_fit(
    lm: LatentLM, examples: Sequence[Example], limit: int, skip: bool, file: str, advice: str, mode: str | None = None
) -> list[Example]:
    """The examples whose questions leave room for `limit` new tokens, in every mode or in `mode`.

    The others are left out with `skip`; else ValueError is raised, which names them in `file` and ends with `advice`.
    """
    room = room_for_question(lm, mode=mode) + 1 - limit
    questions = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    lengths = [len(row) for row in questions]
    too_long = [i for i, length in enumerate(lengths) if length > room]
    if not too_long:
        return list(examples)
    if not skip or len(too_long) == len(examples):
        raise ValueError(
            f"{file}: {len(too_long)} of {len(examples)} questions leave no room for an answer of {limit} tokens in "
            f"the model's context of {lm.max_sequence_length}: {list_lengths('question', too_long, lengths)}. {advice}"
        )
    log(f"Left out {len(too_long)} of {len(examples)} questions of {file}, too long for the model's context.")
    return [example for example, length in zip(examples, lengths, strict=True) if length <= room]


def sample_groups(
    lm: LatentLM, examples: Sequence[Example], reward: Reward, *, samples: int, keys: Sequence[Key],
    temperature: float = 1.0, thought_noise: float = 0.0, mode: str | None = None, max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> list[Group]:  # fmt: skip
    """Sample `samples` completions of each question, and reward them.

    keys: whole numbers of 0 or more for each question, such as (seed, step, place). Completion n of a question is
        drawn with the numbers of (*key, n), so that it depends neither on the others nor on `batch_size`, but for
        rounding (`coconut.generation.keyed_random`).
    thought_noise: the standard deviation of noise on the thoughts, which are then drawn for each completion.
    mode: the mode to force on a hybrid model.
    batch_size: questions at a time. Without noise, prompt and thoughts are computed once for all completions of one.
    Raises ValueError for a reward that is not one finite number, or if there is not one key for each question.
    """
    if len(keys) != len(examples):
        raise ValueError(f"There are {len(keys)} keys for {len(examples)} questions. Give one for each question.")
    rows = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    groups: dict[int, Group] = {}
    for indices in longest_first(rows, batch_size):
        ids, mask = pad_rows([rows[index] for index in indices], lm.special.pad)
        out = lm.generate(
            ids, mask, do_sample=True, temperature=temperature, num_return_sequences=samples, mode=mode,
            max_new_tokens=max_new_tokens, log_probs=True, thought_noise=thought_noise,
            random_keys=[(*keys[index], number) for index in indices for number in range(samples)],
        )  # fmt: skip
        for row, index in enumerate(indices):
            completions = completions_of(lm, rows[index], out, range(row * samples, (row + 1) * samples))
            rewards = [checked_reward(reward, examples[index], s.text, s.mode, s.cost) for s in completions]
            groups[index] = Group(examples[index], tuple(completions), torch.tensor(rewards))
    return [groups[index] for index in range(len(examples))]


def checked_reward(reward: Reward, example: Example, text: str, mode: str, cost: Cost) -> float:
    """The reward of a completion. Raises ValueError that names the completion if it is not one finite number."""
    value: Any = reward(example, text, mode, cost)
    subject = f"The reward of {text!r}, an answer to {example.question!r},"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{subject} is {value!r}; the function must return one number.") from None
    if not math.isfinite(number):
        raise ValueError(f"{subject} is {number}, which is not finite.")
    return number
