"""Apply a trained configuration policy: choose the settings of each question, and answer it with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coconut.adaptive.backends import LatentBackend, Reply, fit_all, refuse_unknown
from coconut.adaptive.encoders import latent_encoder, load_encoder
from coconut.adaptive.judges import Vote
from coconut.adaptive.outcome_table import OutcomeTable
from coconut.adaptive.policy import ConfigurationPolicy
from coconut.adaptive.space import Settings
from coconut.models.latent_lm import LatentLM
from coconut.tasks import TASKS

TOLERANCE = 0.02  # the largest relative distance between the probe's embedding and the stored one


def policy_metadata(table: OutcomeTable) -> dict[str, Any]:
    """The metadata of a policy's file: those of the table, and a probe, one question with its embedding.

    By the probe `Chooser` recognizes whether a model gives the embeddings that the policy was trained on.
    """
    embedding = [round(float(x), 4) for x in table.embeddings[0]]
    return {**table.about, "probe": {"question": table.questions[0], "embedding": embedding}}


@dataclass(frozen=True)
class Answered:
    """The answer to a question, with its configuration. `text`: that of `reply` at index `taken`, by majority vote."""

    text: str
    taken: int
    label: str
    settings: Settings
    reply: Reply


class Chooser:
    """A policy from a file, applied to the model that it was trained for. `about`: the file's metadata."""

    def __init__(self, path: Path | str, lm: LatentLM, batch_size: int = 64):
        """Raises ValueError if the model's embedding of the probe differs: the policy belongs to another model."""
        self.policy, self.about = ConfigurationPolicy.load(path)
        self.encode = load_encoder(self.about["embedding"], lm.device, batch_size, partial(latent_encoder, lm))
        probe = self.about["probe"]
        [actual], expected = self.encode([probe["question"]]), torch.tensor(probe["embedding"])
        if actual.shape != expected.shape or (actual - expected).norm() > TOLERANCE * expected.norm():
            raise ValueError(
                f"{path} was trained for another model, {self.about['backend']}, "
                f"checkpoint={self.about['checkpoint']}: this model gives other embeddings. Name that run and "
                "checkpoint, or train a policy for this model: coconut adaptive run=DIR"
            )

    def choose(self, questions: Sequence[str]) -> list[int]:
        """For each question, the number of its configuration in the policy's space."""
        return self.policy.best(self.encode(questions)[None])[0].tolist()

    def answer(self, backend: LatentBackend, questions: Sequence[str], seed: int = 0) -> list[Answered]:
        """Answer each question in its configuration; questions of one configuration form a batch.

        Raises ValueError if the backend does not accept the settings, or a question leaves no room for an answer.
        """
        space = self.policy.space
        refuse_unknown(space, backend)
        for number, fits in enumerate(fit_all(backend, questions, space), 1):
            if not fits:
                raise ValueError(
                    f"Question {number} is too long: in one of the configurations it leaves no room for an answer in "
                    f"the model's context of {backend.lm.max_sequence_length} tokens."
                )
        vote = Vote(TASKS[self.about["task"]], backend.lm.reasoning.format)
        answers: dict[int, Answered] = {}
        numbers = self.choose(questions)
        for number in sorted(set(numbers)):
            indices, settings = [i for i, other in enumerate(numbers) if other == number], space.settings(number)
            [replies] = backend([questions[i] for i in indices], settings, (seed, number))
            for index, reply in replies.items():
                taken = vote.chosen_sample(reply)
                answers[indices[index]] = Answered(reply.texts[taken], taken, space.label(number), settings, reply)
        return [answers[i] for i in range(len(questions))]
