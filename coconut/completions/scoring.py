"""Batches of completions, and the log-probabilities of their sampled tokens.

Shapes: M sampled tokens of all rows, one after the other; V vocabulary; B rows, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from coconut.completions.completion import Completion, passes_and_length, refuse_too_long, shard_by_length
from coconut.completions.noisy_thoughts import log_density_ratio
from coconut.data.batching import collate
from coconut.data.tokenization import SpecialIds
from coconut.models.passes import Reads

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class CompletionBatch:
    """Padded completions with their prompts. `labels` mark the sampled tokens; `is_control` (M,) is one for each.

    `passes`: sequential passes of the forward, equal on all ranks. Noisy thoughts count as sampled tokens. `thoughts`
    and `thought_means` (B, K, D) are those of every row, and `places` (M,) says where each sampled token stands among
    the values of the B * K thoughts, followed by those of the words; None without noise. `expected` (B, T, D): what
    gates mix into the words, see LatentLM.forward; None for a model without gates.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    passes: int
    is_control: Tensor
    thoughts: Tensor | None = field(default=None, kw_only=True)
    thought_means: Tensor | None = field(default=None, kw_only=True)
    places: Tensor | None = field(default=None, kw_only=True)
    expected: Tensor | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, completions: Sequence[Completion], special: SpecialIds, passes: int) -> CompletionBatch:
        batch = collate([completion.layout for completion in completions], special)
        is_control_M = torch.cat([completion.is_control for completion in completions])
        result = cls(batch.input_ids, batch.attention_mask, batch.labels, passes, is_control_M)
        result.expected = _expected_of(completions, batch.input_ids.shape[1])
        noisy = [completion.noisy for completion in completions if completion.noisy]
        if not noisy:
            return result
        assert len(noisy) == len(completions), "noisy thoughts and others in one batch"
        thoughts_BKD, means_BKD = (
            pad_sequence([getattr(row, name) for row in noisy], batch_first=True) for name in ("fed", "means")
        )
        places_M = _places(completions, thoughts_BKD.shape[1])
        return replace(result, thoughts=thoughts_BKD, thought_means=means_BKD, places=places_M)

    @property
    def is_thought(self) -> Tensor:
        """(M,) true for noisy thoughts."""
        if self.places is None or self.thoughts is None:
            return torch.zeros_like(self.is_control)
        return self.places < self.thoughts.shape[:2].numel()

    def to(self, device: torch.device | str) -> Self:
        values = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **values)


def _places(completions: Sequence[Completion], most: int) -> Tensor:
    """`CompletionBatch.places` of completions with up to `most` noisy thoughts each."""
    places, words = [], len(completions) * most
    for row, completion in enumerate(completions):
        count = len(completion.log_probs) - completion.num_noisy
        places += [*range(row * most, row * most + completion.num_noisy), *range(words, words + count)]
        words += count
    return torch.tensor(places, dtype=torch.long)


def _expected_of(completions: Sequence[Completion], width: int) -> Tensor | None:
    """(B, T, D) `CompletionBatch.expected` of rows that are padded on the right."""
    given = [completion.expected for completion in completions]
    if given[0] is None:
        return None
    rows = zip(given, (completion.layout.num_prompt for completion in completions), strict=True)
    padded = [nn.functional.pad(its, (0, 0, first, width - first - len(its))) for its, first in rows if its is not None]
    return torch.stack(padded)


def forward_at_targets(module: nn.Module, batch: CompletionBatch) -> Any:
    """Run a batch through the model, with logits (M, V) where its targets are predicted."""
    return module(
        batch.input_ids, batch.attention_mask, labels=batch.labels, return_target_logits=True, min_passes=batch.passes,
        thoughts=batch.thoughts, reads=Reads(own_thoughts=batch.thoughts is not None), expected=batch.expected,
    )  # fmt: skip


def score_tokens(
    lm: LatentLM, completions: Sequence[Completion], size: int, score: Callable[[CompletionBatch], Tensor]
) -> list[Tensor]:
    """A score for each sampled token of each completion: one tensor a completion, on the CPU.

    `score` gives (M,) for a batch of up to `size` completions. Raises ValueError if a completion is longer, with its
    prompt, than the model's context.
    """
    refuse_too_long(lm, [len(completion.layout.ids) for completion in completions])
    scores: dict[int, Tensor] = {}
    for indices, passes in shard_by_length([passes_and_length([completion]) for completion in completions], size):
        chosen = [completions[i] for i in indices]
        batch = CompletionBatch.of(chosen, lm.special, passes).to(lm.device)
        lengths = [len(completion.log_probs) for completion in chosen]
        scores |= zip(indices, score(batch).cpu().split(lengths), strict=True)
    return [scores[index] for index in range(len(completions))]


@dataclass(frozen=True)
class SamplingDistribution:
    """The distribution that completions are sampled from: softmax at a temperature over the allowed tokens.

    Where a control token is sampled, only `controls` are allowed; elsewhere all tokens but `suppressed`. Noisy thoughts
    have the standard deviation `thought_noise`.
    """

    suppressed: tuple[int, ...] = ()
    controls: tuple[int, ...] = ()
    temperature: float = 1.0
    thought_noise: float = 0.0

    @classmethod
    def of(cls, special: SpecialIds, temperature: float = 1.0, thought_noise: float = 0.0) -> SamplingDistribution:
        """The distribution of a model with these added tokens."""
        return cls(tuple(special.added), tuple(special.control.values()), temperature, thought_noise)

    def log_probs(self, module: nn.Module, batch: CompletionBatch) -> Tensor:
        """(M,) log-probabilities of a batch's sampled tokens, float32.

        A noisy thought's is the log of the ratio of its density to that at sampling. What does not change with the
        model cancels in every use: in the policy's ratio, in its divergence from a reference, in an implicit reward.
        """
        out = forward_at_targets(module, batch)
        words_W = self._of_words(out, batch.is_control[~batch.is_thought])
        if batch.thoughts is None or batch.thought_means is None or batch.places is None:
            return words_W
        ratios_BK = log_density_ratio(batch.thoughts, out.own_thoughts, batch.thought_means, self.thought_noise)
        return torch.cat([ratios_BK.to(words_W).flatten(), words_W])[batch.places]

    def _of_words(self, out: Any, is_control_W: Tensor) -> Tensor:
        logits_MV = out.target_logits.float() / self.temperature
        suppressed_2V = torch.zeros(2, logits_MV.shape[1], dtype=torch.bool, device=logits_MV.device)
        suppressed_2V[0, list(self.suppressed)] = True
        suppressed_2V[1] = True
        suppressed_2V[1, list(self.controls)] = False
        logits_MV = logits_MV.masked_fill(suppressed_2V[is_control_W.long()], -torch.inf)
        return logits_MV.log_softmax(-1).gather(1, out.targets[:, None])[:, 0]

    @torch.no_grad()
    def score(self, lm: LatentLM, completions: Sequence[Completion], size: int) -> list[Tensor]:
        """Log-probabilities of the sampled tokens of each completion: one tensor a completion, float32, on the CPU.

        `lm` is the full model, not sharded; `size`: the most completions of a forward pass.
        """
        return score_tokens(lm, completions, size, lambda batch: self.log_probs(lm, batch))
