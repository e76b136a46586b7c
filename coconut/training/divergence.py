"""A loss or a gradient that is not finite ends training with a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from coconut.config import AdamWConfig
from coconut.engine.base import NonFiniteUpdate
from coconut.runs.description import read_metrics
from coconut.training.loop import AnyTrainer
from coconut.utils.files import write_json

FILE = "diverged.json"  # in the run's folder


class NonFiniteLossError(ValueError):
    """Training stopped at a loss or a gradient that is not finite; the message is the diagnosis."""


@contextmanager
def explain_non_finite_loss(
    trainer: AnyTrainer, where: str, lr: float, details: dict[str, Any], optimizer: str = "optimizer"
) -> Iterator[None]:
    """Write diverged.json and raise NonFiniteLossError in place of NonFiniteUpdate.

    `where` names the update in the message. `details`, the indices of its `examples` among them, go to the file.
    `optimizer`: the configuration key of the optimizer's settings.
    """
    try:
        yield
    except NonFiniteUpdate as error:
        settings: AdamWConfig = attrgetter(optimizer)(trainer.config)
        rows = [row for row in read_metrics(trainer.folder) if row["kind"] == "train" and "loss" in row][-5:]
        if trainer.world.is_main:
            before = [{key: row.get(key) for key in ("step", "loss", "grad_norm", "lr")} for row in rows]
            found = {"loss": str(error.loss), "grad_norm": str(error.grad_norm), "not_finite": error.non_finite_names}
            failed = {"step": trainer.step + 1, "lr": lr, **details, **found, "before": before}
            write_json(trainer.folder / FILE, failed)
        saved = trainer.training_state.checkpoints.steps()
        names = error.non_finite_names
        first = (
            f"{names[0]} ({len(names)} in all)" if names else "a gradient" if math.isfinite(error.loss) else "the loss"
        )
        before = "; ".join(f"{row['loss']:.3g} ({row['grad_norm']:.3g})" for row in rows) or "none"
        raise NonFiniteLossError(
            f"The loss of {where} is {error.loss}, its gradient norm {error.grad_norm}. The update was not applied"
            + (f", and the checkpoint of {trainer.unit} {saved[-1]} is whole.\n" if saved else ".\n")
            + f"  not finite in: {first}\n"
            f"  losses before, with gradient norms: {before}\n"
            f"  learning rate {lr:g}, clipping {settings.max_grad_norm or 'off'}, "
            f"{trainer.config.engine.precision.value}\n"
            f"If the norm grew before, lower {optimizer}.lr, or set {optimizer}.max_grad_norm=1 and "
            f"{optimizer}.warmup_steps=100. If it did not, look at the data: the examples of this {trainer.unit} are "
            f"listed in {trainer.folder / FILE}."
        ) from error
