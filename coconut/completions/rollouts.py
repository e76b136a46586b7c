"""Groups of sampled answers, rewarded: what the policy learns from.

Shapes: S answers of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import Completion, Cost, completions_of, list_lengths, longest_completions
from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.generation.generate import longest_first, pad_rows
from coconut.methods import PromptFormat
from coconut.tasks import Task
from coconut.utils.console import log
from coconut.utils.torch_utils import seeded

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

THINKLESS_COSTS = {"short": 0.0, "think": 0.5}  # Fang et al., arXiv 2505.13379, eq. 5, with gamma = .5


class Reward(Protocol):
    """How good an answer is. `mode`: of a hybrid model, how it was answered, else an empty text."""

    def __call__(self, example: Example, text: str, mode: str, cost: Cost, /) -> float: ...


@dataclass(frozen=True)
class CorrectnessReward:
    """1 for a right answer, less the cost of its mode; `wrong` for any other.

    A mode without a cost has none. The mode is the one that was answered in, by its token: what the text says of modes
    changes nothing. `limits`: the most new tokens of a mode; a longer answer earns `wrong`, or else a mode that costs
    nothing learns to do what the others do.
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
        return self.task.judge(self.task.read_answer(text, self.form), example.answer)


@dataclass(frozen=True)
class Group:
    """The answers to one question, with their `rewards` (S,), float32."""

    example: Example
    completions: tuple[Completion, ...]
    rewards: Tensor


def examples_that_fit(
    lm: LatentLM,
    examples: Sequence[Example],
    limit: int,
    skip: bool,
    file: str,
    advice: str,
    mode: str | None = None,
) -> list[Example]:
    """The examples whose questions leave room for an answer of so many tokens in every mode, or in the one that is
    forced.

    Raises ValueError that names the others, unless `skip`.
    """
    forms = longest_completions(lm, [], limit)
    room = lm.max_sequence_length - max(len(form.layout.ids) for form in [f for f in forms if f.mode == mode] or forms)
    asked = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    lengths = [len(row) for row in asked]
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
    lm: LatentLM,
    examples: Sequence[Example],
    reward: Reward,
    *,
    samples: int,
    seed: Sequence[int],
    temperature: float = 1.0,
    mode: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> list[Group]:
    """So many answers to each question, sampled and rewarded.

    A question and its thoughts are read once for all its answers, `batch_size` questions at a time. What is sampled
    depends on `seed` alone, numbers such as (seed, step, process), and no other draw depends on it. `mode` is forced on
    a hybrid model. Raises ValueError for a reward that is not one finite number.
    """
    rows = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    groups: dict[int, Group] = {}
    with seeded(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)), lm.device):
        for places in longest_first(rows, batch_size):
            ids, mask = pad_rows([rows[place] for place in places], lm.special.pad)
            out = lm.generate(
                ids, mask, do_sample=True, temperature=temperature, num_return_sequences=samples, mode=mode,
                max_new_tokens=max_new_tokens, log_probs=True,
            )  # fmt: skip
            for row, place in enumerate(places):
                found = completions_of(lm, rows[place], out, range(row * samples, (row + 1) * samples))
                groups[place] = _reward_group(examples[place], found, reward)
    return [groups[place] for place in range(len(examples))]


def _reward_group(example: Example, samples: Sequence[Completion], reward: Reward) -> Group:
    numbers = [checked_reward(reward, example, sample.text, sample.mode, sample.cost) for sample in samples]
    return Group(example, tuple(samples), torch.tensor(numbers))


def checked_reward(reward: Reward, example: Example, text: str, mode: str, cost: Cost) -> float:
    """What the reward gives. Raises ValueError that names the answer if it is not one finite number."""
    value: Any = reward(example, text, mode, cost)
    of = f"The reward of {text!r}, an answer to {example.question!r},"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{of} is {value!r}; it must be one number for each answer.") from None
    if not math.isfinite(number):
        raise ValueError(f"{of} is {number}, which is not finite.")
    return number
