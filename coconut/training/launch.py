"""Start a training: on one process or several, from its beginning or from its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut.config import RunConfig
from coconut.engine.launch import num_processes, run_on_processes
from coconut.engine.launcher_env import read_launcher_env
from coconut.engine.world import World
from coconut.runs.description import DESCRIPTION
from coconut.runs.folder import open_run_folder
from coconut.runs.tracking import check_tracker
from coconut.training.loop import AnyTrainer, run_loop
from coconut.utils.console import log, silence_libraries
from coconut.utils.files import read_json

NewTrainer = Callable[[Any, Path, dict[str, str], World], AnyTrainer]  # configuration, folder, file of each split


def launch_training(
    config: RunConfig, trainer: NewTrainer, module: str, world: World | None, batch_key: str = "batch_size"
) -> int:
    """Train a run, or resume it, in each of its processes, starting them if the configuration asks for them.

    Processes that are started run `module`. `world`: its processes are there already, and this is one of them. Raises
    ValueError if the number that `batch_key` names cannot be divided among them. Returns the exit status.
    """

    def train(world: World) -> int:
        with open_run_folder(config, world) as (folder, files):
            return _begin_or_resume(trainer(config, folder, files, world))

    return on_processes(config, train, module, world, batch_key)


def on_processes(
    config: RunConfig, work: Callable[[World], int], module: str, world: World | None, batch_key: str = "batch_size"
) -> int:
    """Do `work` in each process of a run, as `launch_training` does."""

    def checked(world: World) -> int:
        _check_divisible(config, batch_key, world.size)
        return work(world)

    if world:
        return checked(world)
    silence_libraries()
    if read_launcher_env().size == 1 and (count := num_processes(config.launch, config.engine)) > 1:
        _check_divisible(config, batch_key, count)  # before any process is started
        check_tracker(config.tracking)
    return run_on_processes(config.launch, config.engine, module, checked)


def _check_divisible(config: RunConfig, key: str, processes: int) -> None:
    number = getattr(config, key)
    if over := number % processes:
        below = number - over
        near = f"{below} or {below + processes}" if below else f"{processes}"
        raise ValueError(
            f"{key}={number} is not divisible by {processes} processes. It is a number of examples over all of them: "
            f"choose a multiple, such as {near}."
        )


def _begin_or_resume(trainer: AnyTrainer) -> int:
    """Check, describe and train a run from where it stands. Returns the exit status."""
    if trainer.step == trainer.num_steps and not trainer.pending:
        log(f"This run is complete: {trainer.step:,} {trainer.unit}s. Next: {trainer.next_command}")
        return 0
    trainer.log_summary()
    trainer.dry_run()
    trainer.resume()
    runtime = runtime_info(trainer.config, trainer.world)
    trainer.world.on_main_process(lambda: trainer.describe({**runtime, "from_step": trainer.step}))
    if trainer.step:
        log(f"Going on from {trainer.unit} {trainer.step:,}")
        if trainer.world.is_main:
            _log_changes(read_json(trainer.folder / DESCRIPTION)["sessions"][-2], runtime)
    return run_loop(trainer)


def runtime_info(config: RunConfig, world: World) -> dict[str, Any]:
    """The settings of a session that may differ when the run is resumed."""
    return {
        "processes": world.size,
        "engine": str(config.engine.kind),
        "device": config.engine.device,
        "micro_batch_size": config.micro_batch_size,
    }


def _log_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    if changes := [f"{k}: {before[k]} before, {now[k]} now" for k in now if before.get(k, now[k]) != now[k]]:
        log(
            f"note: {', '.join(changes)}. The order of the data is the same. Losses differ in their last digits, and "
            "dropout and sampled answers may draw other random numbers."
        )
