"""Save and restore training state."""

from __future__ import annotations

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
from coconut.runs.description import DESCRIPTION
from coconut.runs.loading import resolve_weights
from coconut.utils.files import atomic_folder, read_json


class TrainingState:
    """The checkpoints of a run, and the state of the one that it resumes from.

    `resume_from` is that checkpoint's folder, None for a new run. `state` is its state.json: `step`, `best`, `pending`
    (a validation that was due and is not done) and what the trainer adds. A new run starts with `initial`, at step 0.
    """

    def __init__(self, config: RunConfig, folder: Path, world: World, **initial: Any):
        self.folder, self.world = folder, world
        self.checkpoints = Checkpoints(folder, config.keep_checkpoints, config.keep_every)
        self.resume_from = world.on_main_process(self.checkpoints.require_newest_valid)
        self.state = load_state(self.resume_from) if self.resume_from else {"step": 0, "best": None, **initial}

    def initial_weights(self, init: str) -> Path:
        """The folder that `init` named when the run began."""

        def find() -> Path:
            if self.resume_from:
                return Path(read_json(self.folder / DESCRIPTION)["init"])
            return resolve_weights(init)

        return self.world.on_main_process(find)

    def snapshot_model(self, path: Path, lm: LatentLM) -> None:
        """Copy a model to the run's folder if the run is new, replacing a copy by an earlier attempt to begin it."""
        if not self.resume_from:
            with atomic_folder(path) as part:
                lm.save_pretrained(part)

    def load_model(self, name: str = "", attention: str | None = None) -> LatentLM:
        """The checkpoint's model, or the extra model of this name, with its float32 weights."""
        assert self.resume_from
        lm = LatentLM.from_pretrained(self.resume_from / name, attention)
        restore_master(lm, load_trainer(self.resume_from / name))
        return lm

    def resume(self, engine: Engine, extra_models: Mapping[str, Engine] | None = None) -> None:
        """Load optimizers and random states. After the dry run, without which some engines cannot load them."""
        if self.resume_from:
            for name, its_engine in {"": engine, **(extra_models or {})}.items():
                its_engine.load_state_dict(load_trainer(self.resume_from / name))
            self.world.on_main_process(lambda: self.checkpoints.quarantine_after(self.state["step"]))

    def save(
        self, step: int, engine: Engine, reasoning: Reasoning, state: dict[str, Any],
        extra_models: Mapping[str, Engine] | None = None, tensors: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a checkpoint. `reasoning` is saved with the model; `extra_models`: other models' engines by name.

        `tensors`: what the trainer adds to trainer.pt, by names that engines do not use; `load_trainer` returns it.
        """
        engines = {"": engine, **(extra_models or {})}
        trainers = {name: its_engine.state_dict() for name, its_engine in engines.items()}
        trainers[""] |= tensors or {}
        with ExitStack() as full_modules:
            models = {name: full_modules.enter_context(each.full_module()) for name, each in engines.items()}
            models[""].reasoning = reasoning
            extra = {name: (models[name], trainers[name]) for name in extra_models or {}}
            self.world.on_main_process(
                lambda: self.checkpoints.save(step, models[""], trainers[""], state, self.world.heartbeat, extra)
            )
