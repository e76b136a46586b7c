"""Implicit process rewards: step rewards from a model that was trained on labels of whole completions.

r(y) = beta log pi(y)/pi_ref(y) is a sum over tokens. The value q^t of a prefix is the sum up to its end, and the reward
of a step, q^t - q^(t-1), is the sum over its own tokens (Yuan et al., arXiv 2412.01981, section 3; their printed sum
begins one step too early). The rewards of the steps add up to r(y) exactly.

Shapes: M tokens of one completion, P parts of one completion: its steps and its answer.
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


REFERENCE = "reference.pt"  # in a run's folder: the reference's log-probability of each completion, and
WEIGHTS = "weights"  # under this key, the digest of its weights by `digest_of`


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and hashes of the safetensors files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def reference_of(run: Path | str) -> Path:
    """The folder of the reference model that a run of coconut.reward (its folder or a checkpoint) was trained against.

    Raises ValueError if `run` is no such run, or if the reference model is missing or has changed.
    """
    folder = run_folder_of(str(run))
    config = read_config(folder) if (folder / CONFIG).is_file() else {}
    if not {"loss", "beta", "init"} <= config.keys():
        raise ValueError(
            f"{run} is neither a run of coconut reward nor a checkpoint of one, so its reference is not "
            "known. Name the run that trained the reward model."
        )
    reference = Path(read_json(folder / DESCRIPTION)["init"])
    remedy = "Restore it, or name another reward model"
    if not reference.is_dir():
        raise ValueError(f"{run} was trained against {reference}, which is missing. {remedy}.")
    saved = torch.load(folder / REFERENCE, weights_only=True)
    if WEIGHTS not in saved:
        raise ValueError(
            f"{folder / REFERENCE} has no digest of the weights that {run} was trained against. Train it again."
        )
    if saved[WEIGHTS] != digest_of(reference):
        raise ValueError(f"{run} was trained against {reference}, whose weights have changed since. {remedy}.")
    return reference


@dataclass(frozen=True)
class ImplicitReward:
    """The implicit reward of a model against its reference model."""

    lm: LatentLM
    reference: LatentLM
    beta: float

    def tokens(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(M,) for each completion: the rewards of its tokens."""
        sampling = SamplingDistribution.of(self.lm.special)
        log_probs = (sampling.score(lm, completions, batch_size) for lm in (self.lm, self.reference))
        return [self.beta * (model - reference) for model, reference in zip(*log_probs, strict=True)]

    def steps(self, completions: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(P,) for each completion: the rewards of its steps and, last, of its answer."""
        return [
            sum_by_part(row, completion_parts(self.lm, completion.completion_ids))
            for row, completion in zip(self.tokens(completions, batch_size), completions, strict=True)
        ]


def sum_by_part(rewards_M: Tensor, parts: Sequence[int]) -> Tensor:
    """(P,) sums over the tokens of each part. `parts` (M,): the part of each token."""
    assert len(parts) == len(rewards_M), "rewards reach into the prompt"
    count = max(parts, default=-1) + 1
    return torch.zeros(count, dtype=rewards_M.dtype).index_add(0, torch.tensor(parts), rewards_M)
