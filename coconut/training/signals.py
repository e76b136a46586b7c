"""Graceful shutdown: on a stop signal, finish the step, save a checkpoint and exit."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coconut.engine.launch import stop_signals
from coconut.engine.world import World


class StopRequest:
    """The stop signal that this process has received. False until there is one."""

    def __init__(self, world: World):
        self.world, self.number = world, 0

    def __bool__(self) -> bool:
        return self.number > 0

    def anywhere(self) -> int:
        """The number of a stop signal that any process has received, 0 if none has. All processes call it together."""
        return max(self.world.all_gather_object(self.number)) if self.world.any_process(self.number > 0) else 0


@contextmanager
def handle_stop_signals(world: World) -> Iterator[StopRequest]:
    """Record stop signals inside the context instead of ending the process.

    A SIGINT more than two seconds after the first stop signal raises KeyboardInterrupt. An earlier one may be the same
    Ctrl-C: a process receives it from the terminal and again from its launcher.
    """
    request = StopRequest(world)
    first = float("inf")

    def record(number: int, frame: Any) -> None:
        nonlocal first
        if number == signal.SIGINT and time.monotonic() > first + 2:
            raise KeyboardInterrupt
        request.number, first = number, min(first, time.monotonic())

    before = {number: signal.signal(number, record) for number in stop_signals()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
