"""Sampled answers as a batch to be scored, and the states and log-probabilities at their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from coconut.completions.completion import Completion, passes_and_length, refuse_too_long, shard_by_length
from coconut.data.batching import collate
from coconut.data.tokenization import SpecialIds

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class CompletionBatch:
    """A batch of answers; `is_control` (M,) of each sampled token."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    passes: int
    is_control: Tensor

    @classmethod
    def of(cls, samples: Sequence[Completion], special: SpecialIds, passes: int) -> CompletionBatch:
        made = collate([sample.layout for sample in samples], special)
        is_control_M = torch.cat([sample.is_control for sample in samples])
        return cls(made.input_ids, made.attention_mask, made.labels, passes, is_control_M)

    def to(self, device: torch.device | str) -> Self:
        values = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **values)


def forward_at_targets(module: nn.Module, batch: CompletionBatch) -> Any:
    """The forward pass over a batch, with logits where its targets are predicted."""
    return module(
        batch.input_ids, batch.attention_mask, labels=batch.labels, return_target_logits=True, min_passes=batch.passes
    )


def score_tokens(
    lm: LatentLM, samples: Sequence[Completion], size: int, score: Callable[[CompletionBatch], Tensor]
) -> list[Tensor]:
    """For each answer, on the CPU, what `score` says (M,) of the sampled tokens of a batch of up to `size` answers.

    Raises ValueError if one is longer than the model's context.
    """
    refuse_too_long(lm, [len(sample.layout.ids) for sample in samples])
    found: dict[int, Tensor] = {}
    for places, passes in shard_by_length([passes_and_length([sample]) for sample in samples], size):
        chosen = [samples[i] for i in places]
        batch = CompletionBatch.of(chosen, lm.special, passes).to(lm.device)
        lengths = [len(sample.log_probs) for sample in chosen]
        found |= zip(places, score(batch).cpu().split(lengths), strict=True)
    return [found[place] for place in range(len(samples))]


@dataclass(frozen=True)
class SamplingDistribution:
    """What may be said where, and at which temperature: the distribution that answers are sampled from.

    A control token is one of `controls`; any other token is none of `refused`.
    """

    suppressed: tuple[int, ...] = ()
    controls: tuple[int, ...] = ()
    temperature: float = 1.0

    @classmethod
    def of(cls, special: SpecialIds, temperature: float = 1.0) -> SamplingDistribution:
        """That of a model with these tokens."""
        return cls(tuple(special.added), tuple(special.control.values()), temperature)

    def log_probs(self, module: nn.Module, batch: CompletionBatch) -> Tensor:
        """(M,) of the targets of a batch, in float32."""
        out = forward_at_targets(module, batch)
        logits_MV = out.target_logits.float() / self.temperature
        refused_2V = torch.zeros(2, logits_MV.shape[1], dtype=torch.bool, device=logits_MV.device)
        refused_2V[0, list(self.suppressed)] = True
        refused_2V[1] = True
        refused_2V[1, list(self.controls)] = False
        logits_MV = logits_MV.masked_fill(refused_2V[batch.is_control.long()], -torch.inf)
        return logits_MV.log_softmax(-1).gather(1, out.targets[:, None])[:, 0]

    @torch.no_grad()
    def score(self, lm: LatentLM, samples: Sequence[Completion], size: int) -> list[Tensor]:
        """How likely the sampled tokens of each answer are to a whole model, float32, on the CPU."""
        return score_tokens(lm, samples, size, lambda batch: self.log_probs(lm, batch))
