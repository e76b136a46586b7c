"""Decide when to stop thinking by a binary classifier on the latent thought.

The paper names two rules: a classifier on the thoughts, and a constant number of thoughts (Hao et al.,
arXiv 2412.06769, section 3, "Inference process"). The second is Reasoning.num_thoughts; this is the first, fitted to a
trained model, whose weights do not change. The target at thought i is whether the thoughts so far replace all steps of
the example: i >= thoughts_per_step * steps.

Shapes: N examples, K thoughts, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import think
from coconut.methods import Plan
from coconut.utils.files import atomic_file
from coconut.utils.torch_utils import seeded

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

WIDTH, EPOCHS, BATCH = 256, 10, 256


@dataclass(frozen=True)
class Measured:
    """Validation metrics of a classifier.

    trained_on: training examples.
    accuracy: share of right decisions, over all thoughts of the validation examples.
    by_place: the accuracy at the first, second, ... thought.
    positives: the share of examples in which the target there is to stop. Where it is 0 or 1, a constant is as good.
    """

    trained_on: int
    accuracy: float
    by_place: list[float]
    positives: list[float]


class StopClassifier(nn.Module):
    """A classifier with one hidden layer over a thought; with a score above 0, the thought is the last."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, measured: Measured | None = None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.layers = nn.Sequential(nn.Linear(size, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        self.measured = measured

    def forward(self, thoughts_BD: Tensor) -> Tensor:
        """Scores (B,) of thoughts (B, D)."""
        return self.layers((thoughts_BD.float() - self.mean) / self.scale)[..., 0]

    @torch.no_grad()
    def stop(self, thoughts_BD: Tensor) -> Tensor:
        """(B,) whether the thought is the last of its row."""
        return self(thoughts_BD) > 0

    def save(self, file: Path) -> None:
        assert self.measured
        with atomic_file(file) as part:
            save_file(self.state_dict(), part, {"measured": json.dumps(asdict(self.measured))})

    @classmethod
    def load(cls, file: Path) -> StopClassifier:
        with safe_open(file, "pt") as opened:
            measured = Measured(**json.loads(opened.metadata()["measured"]))
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        classifier = cls(len(state["mean"]), measured)
        classifier.load_state_dict(state)
        return classifier


def fit(thoughts_NKD: Tensor, last_NK: Tensor) -> StopClassifier:
    """Fit a classifier of `last` (N, K), whether no further thought is needed, on thoughts (N, K, D)."""
    rows, targets = thoughts_NKD.flatten(0, 1).float(), last_NK.flatten().float()
    with seeded(0):
        classifier = StopClassifier(rows.shape[1])
        classifier.mean.copy_(rows.mean(0))
        classifier.scale.copy_(rows.std(0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(rows)).split(BATCH):
                loss = nn.functional.binary_cross_entropy_with_logits(classifier(rows[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return classifier.eval()


def fit_classifier(lm: LatentLM, train: Sequence[Example], valid: Sequence[Example], batch_size: int) -> StopClassifier:
    """Fit a classifier to a trained model's thoughts on training examples, and measure it on validation examples.

    Raises ValueError if the same thought is the last one needed in all training examples.
    """
    thoughts, last = _thoughts_and_targets(lm, train, batch_size)
    if (last == last[0]).all():
        raise ValueError(
            f"stop=classifier: all {len(train):,} training examples need the same number of thoughts, so there is "
            "nothing to learn. Keep stop=constant and set num_thoughts."
        )
    with torch.autocast(lm.device.type, enabled=False):
        classifier = fit(thoughts, last)
    valid_thoughts, valid_targets = _thoughts_and_targets(lm, valid, batch_size)
    right = (classifier.stop(valid_thoughts) == valid_targets).double()
    classifier.measured = Measured(
        len(train), right.mean().item(), right.mean(0).tolist(), valid_targets.double().mean(0).tolist()
    )
    return classifier.to(lm.device)


def _thoughts_and_targets(lm: LatentLM, examples: Sequence[Example], batch_size: int) -> tuple[Tensor, Tensor]:
    """Thoughts (N, K, D) of the questions, and targets (N, K): whether the thoughts so far replace all steps."""
    count = lm.reasoning.num_thoughts
    rows = [
        [*row, lm.special.bot]
        for row in encode_questions(lm.tokenizer, [e.question for e in examples], lm.reasoning.format)
    ]
    thoughts: list[Tensor] = [torch.empty(0)] * len(rows)
    for indices in longest_first(rows, batch_size):
        ids, mask = pad_rows([rows[i] for i in indices], lm.special.pad)
        batch_thoughts = think(lm, ids.to(lm.device), mask.to(lm.device), count).thoughts.float().cpu()
        for i, thought in zip(indices, batch_thoughts, strict=True):
            thoughts[i] = thought
    needed_N1 = torch.tensor([[lm.reasoning.thoughts_per_step * len(e.steps)] for e in examples])
    return torch.stack(thoughts), torch.arange(1, count + 1) >= needed_N1


def refuse_untrained(lm: LatentLM, trained: Plan) -> None:
    """Raise ValueError if a model trained by this plan cannot answer after fewer thoughts than its stage has."""
    if lm.reasoning.modes:
        raise ValueError("A hybrid model's mode sets the number of its thoughts. Leave out the classifier.")
    if not lm.reasoning.slot.thinks or not lm.reasoning.num_thoughts:
        raise ValueError(f"{lm.reasoning.method}, stage {lm.reasoning.stage}, has no latent thoughts to stop.")
    if lm.reasoning.slot.merges:
        raise ValueError(f"{lm.reasoning.method} ends its thoughts itself, and needs no classifier to. Leave it out.")
    if lm.reasoning.slot.in_parallel:
        raise ValueError(
            f"The thoughts of {lm.reasoning.method} are computed all at once, so that stopping early saves nothing."
        )
    if not trained.trained_with_fewer_thoughts:
        advice = " Train with curriculum.mixing_probability=0.1, or with curriculum.pad_thoughts=false."
        advice = advice if trained.mixing_forms else ""
        raise ValueError(
            "stop=classifier ends the thoughts early, but this model was always trained with "
            f"{lm.reasoning.num_thoughts} thoughts and cannot answer after fewer.{advice}"
        )
