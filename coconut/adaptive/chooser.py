"""A policy at work: for each question the settings with which to ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coconut.adaptive import encoders
from coconut.adaptive.backends import LatentBackend, Reply, fit_all, refuse_unknown
from coconut.adaptive.judges import Vote
from coconut.adaptive.outcome_table import OutcomeTable
from coconut.adaptive.policy import ConfigurationPolicy
from coconut.adaptive.space import Settings
from coconut.tasks import TASKS

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

TOLERANCE = 0.02  # how far an embedding may lie from the one that was kept, as a share of it


def policy_metadata(table: OutcomeTable) -> dict[str, Any]:
    """What a policy's file says of where it belongs: how it sees a question, with one question as it saw it."""
    embedding = [round(float(x), 4) for x in table.embeddings[0]]
    return {**table.about, "probe": {"question": table.questions[0], "embedding": embedding}}


@dataclass(frozen=True)
class Answered:
    """A question's answer, and how it was asked for: `text` is the one of `reply` with most votes, at place `taken`."""

    text: str
    taken: int
    label: str
    settings: Settings
    reply: Reply


class Chooser:
    """From a policy's file, for the model that it learned beside. `about`: what the file says of that."""

    def __init__(self, path: Path | str, lm: LatentLM, batch_size: int = 64):
        """Raises ValueError if the policy sees a question otherwise than it did, so that it is another model's."""
        self.policy, self.about = ConfigurationPolicy.load(path)
        how, probe = self.about["embedding"], self.about["probe"]
        own = how in encoders.POOLINGS
        self.encode = (
            encoders.latent_encoder(lm, how, batch_size) if own else encoders.load_encoder(how, lm.device, batch_size)
        )
        [here], there = self.encode([probe["question"]]), torch.tensor(probe["embedding"])
        if here.shape != there.shape or (here - there).norm() > TOLERANCE * there.norm():
            raise ValueError(
                f"{path} was learned beside another model, {self.about['backend']}, "
                f"checkpoint={self.about['checkpoint']}: "
                "this one sees the same question differently. Name the run and the checkpoint that it was learned "
                "beside, or learn one: python -m coconut.adaptive run=DIR"
            )

    def choose(self, questions: Sequence[str]) -> list[int]:
        """The numbers of the configurations, in the policy's space."""
        return self.policy.best(self.encode(questions)[None])[0].tolist()

    def answer(self, backend: LatentBackend, questions: Sequence[str], seed: int = 0) -> list[Answered]:
        """Each question in the configuration that is chosen for it; those of one configuration together.

        Raises ValueError if the model does not know the settings, or a question leaves no room for an answer.
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
        found: dict[int, Answered] = {}
        numbers = self.choose(questions)
        for number in sorted(set(numbers)):
            places, settings = [i for i, other in enumerate(numbers) if other == number], space.settings(number)
            for replies in backend([questions[i] for i in places], settings, (seed, number)):
                for place, reply in replies.items():
                    taken = vote.chosen_sample(reply)
                    found[places[place]] = Answered(reply.texts[taken], taken, space.label(number), settings, reply)
        return [found[i] for i in range(len(questions))]
