"""The exact implicit reward of a thought, where thoughts are noisy.

A deterministic thought has no probability, and so no reward of this kind. With noise (`generate(thought_noise=sigma)`)
the i-th is z_i ~ N(mu_i, sigma^2 I), where mu_i is the model's own state after the question and the thoughts before it,
as they were fed, and its reward is

    beta log N(z_i; mu_i) / N(z_i; mu_ref,i) = beta (|z_i - mu_ref,i|^2 - |z_i - mu_i|^2) / (2 sigma^2).

One pass gives all mu_i, since every z is known. The rewards of the thoughts and of the tokens said after them add up to
beta times the log-ratio of the whole.

Shapes: N answers, K thoughts of each, D hidden, M tokens of one answer; B rows of a batch, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coconut.completions.completion import refuse_too_long
from coconut.data.sequences import slot_ids
from coconut.generation.generate import longest_first
from coconut.methods import Slot
from coconut.models.losses import target_log_probs
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM
    from coconut.rewards.implicit import ImplicitReward


def thought_rewards(
    reward: ImplicitReward,
    questions: Sequence[Sequence[int]],
    thoughts: Tensor,
    sigma: float,
    batch_size: int = 256,
) -> Tensor:
    """(N, K), float32: the reward of each thought that was fed, drawn with noise of this standard deviation.

    `questions`: token ids, of each answer its own. `thoughts` (N, K, D): `Generated.thoughts`. Raises ValueError for
    sigma <= 0, for a model without latent thoughts, or for thoughts of another shape.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(
            f"sigma is {sigma}; it must be above 0, the thought_noise that the thoughts were drawn with. A thought "
            "without noise has no probability, and so no implicit reward."
        )
    model_means, reference_means = (
        thought_means(lm, questions, thoughts, batch_size).double() for lm in (reward.lm, reward.reference)
    )
    # |z - its|^2 - |z - mine|^2 as one product, in which nothing large cancels
    gaps_NK = ((model_means - reference_means) * (2 * thoughts.cpu().double() - model_means - reference_means)).sum(-1)
    return (reward.beta * gaps_NK / (2 * sigma**2)).float()


def token_rewards(
    reward: ImplicitReward,
    questions: Sequence[Sequence[int]],
    thoughts: Tensor,
    completion_ids: Sequence[Sequence[int]],
    batch_size: int = 256,
) -> list[Tensor]:
    """(M,) for each answer: the rewards of what was said after these thoughts (`Generated.said`).

    `ImplicitReward.tokens` scores an answer after each model's own thoughts, this after those that were fed.
    Raises ValueError for a model without latent thoughts, or for thoughts of another shape.
    """
    model_log_probs, reference_log_probs = (
        _read(lm, questions, thoughts, completion_ids, batch_size)[1] for lm in (reward.lm, reward.reference)
    )
    return [
        reward.beta * (model - reference) for model, reference in zip(model_log_probs, reference_log_probs, strict=True)
    ]


def thought_means(lm: LatentLM, questions: Sequence[Sequence[int]], thoughts: Tensor, batch_size: int = 256) -> Tensor:
    """(N, K, D), float32, on the CPU: what the model would have fed itself where each of these thoughts was fed.

    Raises ValueError for a model without latent thoughts, or for thoughts of another shape.
    """
    return _read(lm, questions, thoughts, [()] * len(questions), batch_size)[0]


@torch.no_grad()
def _read(
    lm: LatentLM,
    questions: Sequence[Sequence[int]],
    thoughts: Tensor,
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> tuple[Tensor, list[Tensor]]:
    """The states (N, K, D) before given thoughts, and the log-probabilities (M,) of what was said after them."""
    _check(lm, questions, thoughts)
    slot = slot_ids(lm.reasoning, lm.special, thoughts.shape[1]).tolist()
    rows = [[*question, *slot, *tokens] for question, tokens in zip(questions, completion_ids, strict=True)]
    refuse_too_long(lm, [len(row) for row in rows])
    table: Any = lm.base.get_input_embeddings()
    means_NKD = torch.zeros(thoughts.shape)
    log_probs: dict[int, Tensor] = {}
    with eval_mode(lm):
        for indices in longest_first(rows, batch_size):
            ids_BT = pad_sequence([torch.tensor(rows[i]) for i in indices], batch_first=True).to(lm.device)
            counts = [len(completion_ids[i]) for i in indices]
            is_completion_BT = pad_sequence(
                [torch.arange(len(rows[i])) >= len(rows[i]) - n for i, n in zip(indices, counts, strict=True)],
                batch_first=True,
            ).to(lm.device)
            is_thought_BT = ids_BT == lm.latent_id
            embeds_BTD = table(ids_BT)
            embeds_BTD[is_thought_BT] = thoughts[indices].to(embeds_BTD).flatten(0, 1)
            ones_BT = torch.ones_like(ids_BT)  # nothing looks at the padding, which stands at the end
            states_BTD = lm.hidden_states(embeds_BTD, ones_BT, ones_BT.cumsum(1) - 1)
            means = states_BTD[is_thought_BT.roll(-1, 1)]
            means_NKD[indices] = means.float().cpu().view(len(indices), *thoughts.shape[1:])
            logits_MV = lm.logits(states_BTD[is_completion_BT.roll(-1, 1)])
            logits_MV[:, lm.special.added] = -torch.inf  # they are never said
            log_probs_M = target_log_probs(logits_MV, ids_BT[is_completion_BT]).float().cpu()
            log_probs |= zip(indices, log_probs_M.split(counts), strict=True)
    return means_NKD, [log_probs[i] for i in range(len(rows))]


def _check(lm: LatentLM, questions: Sequence[Sequence[int]], thoughts: Tensor) -> None:
    table: Any = lm.base.get_input_embeddings()
    if lm.reasoning.slot is not Slot.thought or lm.reasoning.modes:
        raise ValueError(
            f"{lm.reasoning.method} has no latent thoughts of its own to be rewarded. Take a model that was trained "
            "with them, such as method=coconut; what is said has rewards without them, ImplicitReward.tokens."
        )
    if thoughts.dim() != 3 or len(thoughts) != len(questions) or thoughts.shape[2] != table.weight.shape[1]:
        raise ValueError(
            f"thoughts has the shape {tuple(thoughts.shape)}, for {len(questions)} questions and states of "
            f"{table.weight.shape[1]} numbers. It must be (questions, thoughts, hidden): of several answers to a "
            "question each has its own."
        )
