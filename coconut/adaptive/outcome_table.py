"""The table of outcomes: what comes of each question in each configuration, so that experiments need no model.

Shapes: Q questions, C configurations, D numbers of an embedding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from coconut.adaptive.space import Space
from coconut.utils.files import atomic_file

Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class OutcomeTable:
    """`score`, `correct`, `passes`: (Q, C) each; `embeddings` (Q, D).

    `score` is what is learned from, in [0, 1]; `correct` is the exact judge's, whatever is learned from: 0 or 1, or
    where a vote is tied the share of the tied answers that is right.
    `steps` (Q,): of each question's written chain, which is how hard it is. `about`: who answered, and how.
    """

    space: Space
    questions: list[str]
    steps: NDArray[np.int64]
    score: Numbers
    correct: Numbers
    passes: Numbers
    embeddings: Numbers
    about: dict[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError if there is nothing in it, or a score outside [0, 1]."""
        if not self.questions:
            raise ValueError("The table of outcomes is empty: there is no question in it.")
        shape = (len(self.questions), len(self.space))
        for name in ("score", "correct", "passes"):
            assert getattr(self, name).shape == shape, name
        if not ((self.score >= 0) & (self.score <= 1)).all():
            worst = float(self.score.flat[np.nanargmax(np.abs(self.score - 0.5))])
            raise ValueError(f"The table of outcomes has a score of {worst}; they are in [0, 1].")

    def rewards(self, cost: float) -> Numbers:
        """(Q, C) the score less the cost of the passes."""
        return (self.score - cost * self.passes).astype(np.float32)

    def write(self, path: Path | str) -> None:
        told = {"space": self.space.as_data(), "questions": self.questions, "about": self.about}
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in told}
        with atomic_file(path) as part, part.open("wb") as file:
            np.savez_compressed(file, told=np.array(json.dumps(told, ensure_ascii=False)), **arrays)

    @classmethod
    def read(cls, path: Path | str) -> OutcomeTable:
        """Raises FileNotFoundError or ValueError if the file holds none."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no table {path}. coconut adaptive table run=DIR makes one.")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            told = json.loads(str(arrays.pop("told")))
        except (BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is no table of coconut adaptive table ({error}).") from None
        return cls(space=Space.of(told["space"]), questions=told["questions"], about=told["about"], **arrays)
