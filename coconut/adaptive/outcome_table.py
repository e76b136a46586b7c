"""The table of outcomes of each question in each configuration. Experiments read it and need no model.

Shapes: Q questions, C configurations, D embedding size.
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
    """Outcomes of a backend's answers.

    score: (Q, C), the judge's, in [0, 1]; the policies learn from it.
    correct: (Q, C), the exact judge's, whatever gives the score: 0 or 1, or the share that is right among tied answers.
    passes: (Q, C), sequential forward passes.
    embeddings: (Q, D) of the questions. steps: (Q,) of each question's written chain, a measure of difficulty.
    about: backend, task, judge, file and settings.
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
        """Raises ValueError for a table without questions, or with a score outside [0, 1]."""
        if not self.questions:
            raise ValueError("The table of outcomes is empty: it has no questions.")
        shape = (len(self.questions), len(self.space))
        for name in ("score", "correct", "passes"):
            assert getattr(self, name).shape == shape, name
        if not ((self.score >= 0) & (self.score <= 1)).all():
            worst = float(self.score.flat[np.nanargmax(np.abs(self.score - 0.5))])
            raise ValueError(f"The table of outcomes has a score of {worst}; scores must be in [0, 1].")

    def rewards(self, cost: float) -> Numbers:
        """(Q, C) the score minus `cost` for each pass."""
        return (self.score - cost * self.passes).astype(np.float32)

    def write(self, path: Path | str) -> None:
        metadata = {"space": self.space.dimensions, "questions": self.questions, "about": self.about}
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in metadata}
        with atomic_file(path) as part, part.open("wb") as file:
            np.savez_compressed(file, metadata=np.array(json.dumps(metadata, ensure_ascii=False)), **arrays)

    @classmethod
    def read(cls, path: Path | str) -> OutcomeTable:
        """Raises FileNotFoundError or ValueError if the file is missing or holds no table."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no table {path}. coconut adaptive table run=DIR makes one.")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            metadata = json.loads(str(arrays.pop("metadata")))
        except (BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is no table of coconut adaptive table ({error}).") from None
        return cls(
            space=Space.of(metadata["space"]), questions=metadata["questions"], about=metadata["about"], **arrays
        )
