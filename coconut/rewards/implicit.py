"""Implicit process rewards: what a model trained on whole answers says of their parts.

r(y) = beta log pi(y)/pi_ref(y) is a sum over tokens, so that every prefix has a value q^t, the sum up to there, and a
step the reward q^t - q^(t-1), the sum over its own tokens (Yuan et al., arXiv 2412.01981, section 3; their printed sum
begins one step too early). The rewards of the steps add up to r(y) exactly.

Shapes: N answers, M tokens of one of them, P parts of one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coconut.completions.completion import Completion
from coconut.completions.scoring import SamplingDistribution
from coconut.rewards.step_spans import completion_parts
from coconut.runs.description import CONFIG, DESCRIPTION, read_config
from coconut.runs.loading import run_folder_of
from coconut.utils.files import read_json, sha256

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


REFERENCE = "reference.pt"  # in a run's folder: its reference's weights, and how likely it is to give each answer
WEIGHTS = "weights"  # in there, what `digest_of` gives


def digest_of(folder: Path) -> str:
    """Of the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def reference_of(run: Path | str) -> Path:
    """The model that a run of coconut.reward, named by itself or one of its checkpoints, was trained against.

    Raises ValueError if it is no such run, or if that model is not there any more, or is another one by now.
    """
    folder = run_folder_of(str(run))
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    if not {"loss", "beta", "init"} <= config.keys():
        raise ValueError(
            f"{run} is no run of python -m coconut.reward, nor a checkpoint of one, so nothing says what its reference "
            "is. Name the run that trained the reward model."
        )
    reference = Path(read_json(folder / DESCRIPTION)["init"])
    remedy = "put it back, or name another reward model"
    if not reference.is_dir():
        raise ValueError(f"{run} was trained against {reference}, which is not there any more: {remedy}.")
    saved = torch.load(folder / REFERENCE, weights_only=True)
    if WEIGHTS not in saved:
        raise ValueError(
            f"{run} is of an earlier version, which did not keep against which weights it was trained. Train it anew."
        )
    if saved[WEIGHTS] != digest_of(reference):
        raise ValueError(f"{run} was trained against {reference}, which holds other weights by now: {remedy}.")
    return reference


@dataclass(frozen=True)
class ImplicitReward:
    """A reward model and its reference."""

    lm: LatentLM
    reference: LatentLM
    beta: float

    def tokens(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(M,) for each answer: the reward of each of its tokens."""
        sampling = SamplingDistribution.of(self.lm.special)
        model_log_probs, reference_log_probs = (
            sampling.score(lm, completions, batch_size) for lm in (self.lm, self.reference)
        )
        return [
            self.beta * (model - reference)
            for model, reference in zip(model_log_probs, reference_log_probs, strict=True)
        ]

    def steps(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(P,) for each answer: the rewards of its steps, and of the answer itself last."""
        return [
            sum_by_part(row, self.parts(completion))
            for row, completion in zip(self.tokens(completions, batch_size), completions, strict=True)
        ]

    def parts(self, completion: Completion) -> list[int]:
        return completion_parts(self.lm, completion.completion_ids)


def sum_by_part(rewards_M: Tensor, parts: Sequence[int]) -> Tensor:
    """(P,) sums over the tokens of each part."""
    assert len(parts) == len(rewards_M), "rewards reach into the prompt"
    count = max(parts, default=-1) + 1
    return torch.zeros(count, dtype=rewards_M.dtype).index_add(0, torch.tensor(parts), rewards_M)
