"""Plant hints of the right answer in a share of the training questions (coconut.tasks.hints)."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from coconut.tasks.hints import with_hint
from data_builders.dataset_writer import Row


def check_share(hint: float) -> None:
    """Raises ValueError unless `hint` is a share."""
    if not 0 <= hint <= 1:
        raise ValueError(f"hint is {hint}; it is a share of the training questions, from 0 to 1.")


def planting(hint: float, name: Callable[[Row], str]) -> Callable[[random.Random, Row], Row] | None:
    """The `adapt` of a Recipe: this share of the rows get a hint. `name`: of the right answer. None for no hints."""
    return partial(_plant, hint=hint, name=name) if hint else None


def _plant(rng: random.Random, row: Row, hint: float, name: Callable[[Row], str]) -> Row:
    return {**row, "question": with_hint(row["question"], name(row))} if rng.random() < hint else row
