"""Being asked to stop: work goes on to a good place, is saved, and ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coconut.engine.launch import stop_signals
from coconut.engine.world import World


class StopRequest:
    """Whether a signal has asked this process to stop, and whether one has asked any of them."""

    def __init__(self, world: World):
        self.world, self.number = world, 0

    def __bool__(self) -> bool:
        return self.number > 0

    def anywhere(self) -> int:
        """The number of the signal, 0 for none."""
        return max(self.world.all_gather_object(self.number)) if self.world.any_process(self.number > 0) else 0


@contextmanager
def handle_stop_signals(world: World) -> Iterator[StopRequest]:
    """Note a signal that asks to stop, in place of what it does; a later SIGINT interrupts as usual.

    Under a launcher the first may come twice: from the terminal, and handed on.
    """
    asked = StopRequest(world)
    first = float("inf")

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if number == signal.SIGINT and time.monotonic() > first + 2:
            raise KeyboardInterrupt
        asked.number, first = number, min(first, time.monotonic())

    before = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
