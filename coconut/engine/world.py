"""The processes of one run and what they tell each other."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from coconut.engine.launcher_env import RankInfo

T = TypeVar("T")
LOST = 3  # exit status of a process that ends because another one did, or does not get on
STARTING, ENDING = "starting", "ending"  # what takes as long as it takes: loading data and models, the last words


class World:
    """All processes of a run, seen from one of them; with a single one, everything is immediate."""

    def __init__(self, place: RankInfo | None = None):
        place = place or RankInfo()
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.activity, self.count, self.waiting = STARTING, 0, False
        self.endings = contextlib.ExitStack()  # what engines let go of before the process groups are destroyed

    def close(self) -> None:
        """End the engines, then the process groups with their threads.

        A group's threads run until nothing refers to it. One of gloo's threads that frees a tensor while Python
        shuts down asks for the GIL in vain, and aborts the process.
        """
        with contextlib.suppress(Exception):  # the others may have gone
            self.endings.close()
        if not dist.is_initialized():
            return
        deepspeed = sys.modules.get("deepspeed.comm")  # it has groups of its own, and refers to them
        owner: Any = deepspeed if deepspeed and deepspeed.is_initialized() else dist
        with contextlib.suppress(Exception):
            owner.destroy_process_group()
        gc.collect()  # DeepSpeed's engine and optimizer refer to each other, and to the groups

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def set_activity(self, doing: str) -> None:
        """Note that this process gets on, and with what."""
        self.activity = doing
        self.heartbeat()

    def heartbeat(self) -> None:
        """Note that this process gets on."""
        self.count += 1

    def broadcast_object(self, value: T) -> T:
        """What the first process gives."""
        box = [value]
        if self.size > 1:
            with self._waiting():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """What each process gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(found, value)
        return found

    def all_reduce_sum(self, value: float) -> float:
        """Over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(total)
        return total.item()

    def any_process(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.all_reduce_sum(float(flag)) > 0

    def on_main_process(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process. Raises its ValueError or OSError in all of them."""
        result: Any = None
        error: tuple[bool, str] | None = None
        if self.is_main:
            try:
                result = work()
            except (ValueError, OSError) as caught:
                if self.size == 1:
                    raise
                error = isinstance(caught, ValueError), str(caught)
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise (ValueError if error[0] else OSError)(error[1])
        return result

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """A block that the first process goes through before the others begin it."""
        if not self.is_main:
            self.broadcast_object(None)
        try:
            yield
        finally:
            if self.is_main:
                self.broadcast_object(None)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.heartbeat()
