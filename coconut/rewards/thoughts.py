"""Exact implicit rewards of noisy latent thoughts, and of the tokens after them.

A deterministic thought has no density, and so no implicit reward. With noise (`generate(thought_noise=sigma)`) thought
i is z_i ~ N(mu_i, sigma^2 I), where mu_i is the model's own thought after the question and the thoughts fed before it,
and its reward is

    beta log N(z_i; mu_i) / N(z_i; mu_ref,i) = beta (|z_i - mu_ref,i|^2 - |z_i - mu_i|^2) / (2 sigma^2).

One pass gives all mu_i, since all z_i are given. The rewards of the thoughts and of the tokens after them add up to
beta times the log-ratio of the whole.

With dropout before the noise each number of z_i is drawn from a mixture: P N(0, sigma^2) + (1 - P) N(mu / (1 - P),
sigma^2), independently of the others, so that the log-density is a sum over numbers. Dropout without noise leaves a few
possible values, which are others for the reference model; such thoughts have no log-ratio.

Shapes: N completions, K thoughts of each, D hidden, M tokens of one completion; B rows of a batch, T columns,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coconut.completions.completion import refuse_too_long
from coconut.completions.noisy_thoughts import log_density_ratio
from coconut.data.sequences import slot_with_markers
from coconut.generation.generate import longest_first
from coconut.generation.thoughts import ThoughtNoise
from coconut.models.losses import target_log_probs
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM
    from coconut.rewards.implicit import ImplicitReward


def thought_rewards(
    reward: ImplicitReward, questions: Sequence[Sequence[int]], thoughts: Tensor, sigma: float, batch_size: int = 256
) -> Tensor:
    """(N, K), float32: the reward of each thought, which was drawn with noise of standard deviation `sigma`.

    questions: token ids, one list for each completion. thoughts: (N, K, D), as in `Generated.thoughts`.
    Raises ValueError for sigma <= 0, for a model without latent thoughts, or for thoughts of another shape.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(
            f"sigma is {sigma}; it must be above 0: pass the thought_noise of these thoughts. A thought "
            "without noise has no density, and so no implicit reward."
        )
    model_means, reference_means = (
        thought_means(lm, questions, thoughts, batch_size) for lm in (reward.lm, reward.reference)
    )
    return (reward.beta * _log_ratios(thoughts, model_means, reference_means, ThoughtNoise(sigma))).float()


def _log_ratios(thoughts: Tensor, model_means: Tensor, reference_means: Tensor, noise: ThoughtNoise) -> Tensor:
    """(N, K), float64: log p(z) / p_ref(z) of thoughts (N, K, D), which were drawn with this noise, from the means."""
    z_NKD, model_NKD, reference_NKD = (part.cpu().double() for part in (thoughts, model_means, reference_means))
    if not noise.dropout:
        return log_density_ratio(z_NKD, model_NKD, reference_NKD, noise.std)
    kept = 1 - noise.dropout
    dropped_NKD = math.log(noise.dropout) - (z_NKD / noise.std).square() / 2
    logs = [
        torch.logaddexp(dropped_NKD, math.log(kept) - ((z_NKD - mean_NKD / kept) / noise.std).square() / 2)
        for mean_NKD in (model_NKD, reference_NKD)
    ]
    return (logs[0] - logs[1]).sum(-1)


def answer_rewards(
    reward: ImplicitReward, questions: Sequence[Sequence[int]], thoughts: Tensor,
    completion_ids: Sequence[Sequence[int]], noise: ThoughtNoise, batch_size: int = 256,
) -> Tensor:  # fmt: skip
    """(N,), float32: the reward of each answer with its thoughts, in one pass of each model.

    The sum of the rewards of its tokens after the given thoughts and, if these were drawn with noise, of the thoughts.
    Raises ValueError for a model without latent thoughts, or for thoughts of another shape.
    """
    (model_means, model), (reference_means, reference) = (
        _read(lm, questions, thoughts, completion_ids, batch_size) for lm in (reward.lm, reward.reference)
    )
    ratios_N = torch.stack([(a - b).double().sum() for a, b in zip(model, reference, strict=True)])
    if noise.std:
        ratios_N = ratios_N + _log_ratios(thoughts, model_means, reference_means, noise).sum(-1)
    return (reward.beta * ratios_N).float()


def token_rewards(
    reward: ImplicitReward, questions: Sequence[Sequence[int]], thoughts: Tensor,
    completion_ids: Sequence[Sequence[int]], batch_size: int = 256,
) -> list[Tensor]:  # fmt: skip
    """(M,) for each completion: the rewards of its tokens after the given thoughts (`Generated.completion_ids`).

    `ImplicitReward.tokens` scores tokens after each model's own thoughts, this function after the same thoughts for
    both. Raises ValueError for a model without latent thoughts, or for thoughts of another shape.
    """
    models = (reward.lm, reward.reference)
    log_probs = (_read(lm, questions, thoughts, completion_ids, batch_size)[1] for lm in models)
    return [reward.beta * (model - reference) for model, reference in zip(*log_probs, strict=True)]


def thought_means(lm: LatentLM, questions: Sequence[Sequence[int]], thoughts: Tensor, batch_size: int = 256) -> Tensor:
    """(N, K, D), float32, on the CPU: the model's own thought at each position, after the given thoughts before it.

    Raises ValueError for a model without latent thoughts, or for thoughts of another shape.
    """
    return _read(lm, questions, thoughts, [()] * len(questions), batch_size)[0]


@torch.no_grad()
def _read(
    lm: LatentLM, questions: Sequence[Sequence[int]], thoughts: Tensor, completion_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Hidden states (N, K, D) before each given thought, and log-probabilities (M,) of the tokens after them."""
    _check(lm, questions, thoughts)
    slot = slot_with_markers(lm.reasoning, lm.special, thoughts.shape[1]).tolist()
    rows = [[*question, *slot, *tokens] for question, tokens in zip(questions, completion_ids, strict=True)]
    refuse_too_long(lm, [len(row) for row in rows])
    table: Any = lm.base.get_input_embeddings()
    means_NKD = torch.zeros(thoughts.shape)
    log_probs: dict[int, Tensor] = {}
    with eval_mode(lm):
        for indices in longest_first(rows, batch_size):
            ids_BT = pad_sequence([torch.tensor(rows[i]) for i in indices], batch_first=True).to(lm.device)
            counts = [len(completion_ids[i]) for i in indices]
            ends = torch.tensor([[len(rows[i])] for i in indices])
            place_T = torch.arange(ids_BT.shape[1])
            is_completion_BT = ((place_T < ends) & (place_T >= ends - torch.tensor(counts)[:, None])).to(lm.device)
            is_thought_BT = ids_BT == lm.latent_id
            embeds_BTD = table(ids_BT)
            embeds_BTD[is_thought_BT] = thoughts[indices].to(embeds_BTD).flatten(0, 1)
            ones_BT = torch.ones_like(ids_BT)  # padding is on the right, where causal attention does not reach it
            states_BTE = lm.source_states(embeds_BTD, ones_BT, ones_BT.cumsum(1) - 1)
            means = lm.thought(states_BTE[is_thought_BT.roll(-1, 1)]).to(embeds_BTD)
            means_NKD[indices] = means.float().cpu().view(len(indices), *thoughts.shape[1:])
            logits_MV = lm.logits(lm.last_states(states_BTE[is_completion_BT.roll(-1, 1)]))
            logits_MV[:, lm.special.added] = -torch.inf  # never generated
            log_probs_M = target_log_probs(logits_MV, ids_BT[is_completion_BT]).float().cpu()
            log_probs |= zip(indices, log_probs_M.split(counts), strict=True)
    return means_NKD, [log_probs[i] for i in range(len(rows))]


def _check(lm: LatentLM, questions: Sequence[Sequence[int]], thoughts: Tensor) -> None:
    table: Any = lm.base.get_input_embeddings()
    if not lm.reasoning.slot.thinks or lm.reasoning.modes:
        raise ValueError(
            f"{lm.reasoning.method} has no latent thoughts to reward. Take a model that was trained with them, such as "
            "method=coconut. Tokens are rewarded without thoughts by ImplicitReward.tokens."
        )
    if lm.feedback.slot.in_parallel:
        raise ValueError(
            f"{lm.reasoning.method} updates its thoughts all at once, so that none is drawn after the ones before it, "
            "and they have no probability of their own. Take a model whose thoughts are computed one after the other."
        )
    if lm.feedback.slot.merges:
        raise ValueError(
            f"{lm.reasoning.method} ends its thoughts itself, and thoughts of different numbers are not rewarded. Take "
            "a model with a set number of thoughts, such as method=coconut."
        )
    if thoughts.dim() != 3 or len(thoughts) != len(questions) or thoughts.shape[2] != table.weight.shape[1]:
        raise ValueError(
            f"thoughts has the shape {tuple(thoughts.shape)}, with {len(questions)} questions and a hidden size of "
            f"{table.weight.shape[1]}. It must be (questions, thoughts, hidden); repeat a question for each of its "
            "completions."
        )
