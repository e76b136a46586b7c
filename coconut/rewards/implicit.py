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


def digest_of(place: Path) -> str:
    """Of the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(place.glob("*.safetensors")):
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
    started = Path(read_json(folder / DESCRIPTION)["init"])
    missing = "put it back, or name another reward model"
    if not started.is_dir():
        raise ValueError(f"{run} was trained against {started}, which is not there any more: {missing}.")
    kept = torch.load(folder / REFERENCE, weights_only=True)
    if WEIGHTS not in kept:
        raise ValueError(
            f"{run} is of an earlier version, which did not keep against which weights it was trained. Train it anew."
        )
    if kept[WEIGHTS] != digest_of(started):
        raise ValueError(f"{run} was trained against {started}, which holds other weights by now: {missing}.")
    return started


@dataclass(frozen=True)
class ImplicitReward:
    """A reward model and its reference."""

    lm: LatentLM
    reference: LatentLM
    beta: float

    def tokens(self, samples: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(M,) for each answer: the reward of each of its tokens."""
        policy = SamplingDistribution.of(self.lm.special)
        mine, its = (policy.score(lm, samples, batch_size) for lm in (self.lm, self.reference))
        return [self.beta * (a - b) for a, b in zip(mine, its, strict=True)]

    def steps(self, samples: Sequence[Completion], batch_size: int = 256) -> list[Tensor]:
        """(P,) for each answer: the rewards of its steps, and of the answer itself last."""
        return [
            sum_by_part(row, self.parts(sample))
            for row, sample in zip(self.tokens(samples, batch_size), samples, strict=True)
        ]

    def parts(self, sample: Completion) -> list[int]:
        return completion_parts(self.lm, sample.completion_ids)


def sum_by_part(rewards_M: Tensor, parts: Sequence[int]) -> Tensor:
    """(P,) sums over the tokens of each part."""
    assert len(parts) == len(rewards_M), "rewards reach into the prompt"
    count = max(parts, default=-1) + 1
    return torch.zeros(count, dtype=rewards_M.dtype).index_add(0, torch.tensor(parts), rewards_M)
