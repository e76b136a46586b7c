"""Start a training on as many processes as asked for, and say what carries it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coconut.config import RunConfig
from coconut.engine.launch import num_processes, run_on_processes
from coconut.engine.launcher_env import read_launcher_env
from coconut.engine.world import World
from coconut.runs.tracking import check_tracker
from coconut.utils.console import silence_libraries


def runtime_info(config: RunConfig, world: World) -> dict[str, Any]:
    """What a run is carried out by. It may change from session to session."""
    return {
        "processes": world.size,
        "engine": str(config.engine.kind),
        "device": config.engine.device,
        "micro_batch_size": config.micro_batch_size,
    }


def launch_training(config: RunConfig, shared: str, module: str, work: Callable[[World], int]) -> int:
    """The exit status of a run's work in each of its processes, among which the key `shared` is a number to share out.

    Workers that are started for it run the module.
    """
    silence_libraries()
    if (
        read_launcher_env().size == 1 and (count := num_processes(config.launch, config.engine)) > 1
    ):  # before workers are started
        check_divisible(getattr(config, shared), count, shared)
        check_tracker(config.tracking)
    return run_on_processes(config.launch, config.engine, module, work)


def check_divisible(number: int, ranks: int, key: str = "batch_size") -> None:
    """Raise ValueError if so many examples, which `key` asks for, cannot be shared out evenly."""
    if over := number % ranks:
        below = number - over
        near = f"{below} or {below + ranks}" if below else f"{ranks}"
        raise ValueError(
            f"{key}={number} is not divisible by {ranks} processes. It is a number of examples over all of them: "
            f"choose a multiple, such as {near}."
        )
