"""Where a run stands: taken up from its checkpoints, and kept in them."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from coconut.config import RunConfig
from coconut.engine.base import Engine, restore_master
from coconut.engine.world import World
from coconut.methods import Reasoning
from coconut.models.latent_lm import LatentLM
from coconut.runs.checkpoints import Checkpoints, load_state, load_trainer
from coconut.utils.console import log
from coconut.utils.files import atomic_folder


class TrainingState:
    """The checkpoints of one run. `found` is the one to go on from, None if the run is new.

    `state`: what the checkpoint says of where the run stands, or, for a new one, step 0, no best and `new`.
    """

    def __init__(self, config: RunConfig, folder: Path, world: World, new: dict[str, Any]):
        self.world = world
        self.checkpoints = Checkpoints(folder, config.keep_checkpoints, config.keep_every)
        self.resume_from = world.on_main_process(self.checkpoints.latest_valid)
        self.trainer = load_trainer(self.resume_from) if self.resume_from else {}
        self.state = load_state(self.resume_from) if self.resume_from else {"step": 0, "best": None, **new}

    def snapshot_model(self, place: Path, lm: LatentLM) -> None:
        """A copy of a model in the run's folder, when the run begins: what is there then is of another beginning."""
        if not self.resume_from:
            with atomic_folder(place) as part:
                lm.save_pretrained(part)

    def restore(self, lm: LatentLM) -> None:
        """Put what a checkpoint has in higher precision into the model, before an engine is made of it."""
        restore_master(lm, self.trainer)

    def resume(self, engine: Engine) -> None:
        """Go on where the checkpoint was written. After a rehearsal, which some engines need for it."""
        if self.resume_from:
            engine.load_state_dict(self.trainer)
            self.trainer = {}
            self.world.on_main_process(lambda: self.checkpoints.quarantine_after(self.state["step"]))

    def save(
        self,
        step: int,
        engine: Engine,
        reasoning: Reasoning,
        state: dict[str, Any],
        extra_models: Mapping[str, Engine] | None = None,
    ) -> None:
        """Write a checkpoint, of a model that is to be asked so. `beside`: engines of other models, by their names."""
        trainer = engine.state_dict()
        trainers = {name: its.state_dict() for name, its in (extra_models or {}).items()}
        with ExitStack() as held:
            lm = held.enter_context(engine.full_module())
            lm.reasoning = reasoning
            others = {
                name: (held.enter_context(its.full_module()), trainers[name])
                for name, its in (extra_models or {}).items()
            }
            self.world.on_main_process(
                lambda: self.checkpoints.save(step, lm, trainer, state, self.world.heartbeat, others)
            )


def stopped(number: int, where: str) -> int:
    """The exit status of a run that a signal stopped and that is saved, which is said."""
    log(f"Stopped by {signal.Signals(number).name}; saved at {where}. The same command goes on from here.")
    return 128 + number
