"""World: the processes of one run, and collectives over them."""

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
EXIT_LOST = 3  # exit status of a process that ends because another one died or hangs
STARTING, ENDING = "starting", "ending"  # activities without a time limit: loading data and models, shutting down


class World:
    """All processes of a run, as seen by this one. With a single process collectives return at once."""

    def __init__(self, info: RankInfo | None = None):
        info = info or RankInfo()
        self.rank, self.size = info.rank, info.size
        self.local_rank, self.local_size = info.local_rank, info.local_size
        self.activity, self.progress, self.waiting = STARTING, 0, False
        self.exit_callbacks = contextlib.ExitStack()  # of engines, run before the process groups are destroyed

    def close(self) -> None:
        """Release the engines, then destroy the process groups with their threads.

        A group's threads run until nothing refers to it. If a gloo thread frees a tensor while Python shuts down, it
        cannot get the GIL and aborts the process.
        """
        with contextlib.suppress(Exception):  # the other processes may have ended
            self.exit_callbacks.close()
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

    def set_activity(self, activity: str) -> None:
        """Set what this process is doing, for the watchdog's messages, and count a heartbeat."""
        self.activity = activity
        self.heartbeat()

    def heartbeat(self) -> None:
        """Tell the watchdog that this process makes progress."""
        self.progress += 1

    def broadcast_object(self, value: T) -> T:
        """The main process's value, in all processes."""
        box = [value]
        if self.size > 1:
            with self._collective():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(found, value)
        return found

    def all_reduce_sum(self, value: float) -> float:
        """The sum of the values of all processes."""
        return self.all_reduce_sums(torch.tensor([value], dtype=torch.float64)).item() if self.size > 1 else value

    def all_reduce_sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the tensors of all processes, which are on the CPU, in float64."""
        total = values.double().clone()
        if self.size > 1:
            with self._collective():
                dist.all_reduce(total)
        return total

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.all_reduce_sum(float(flag)) > 0

    def on_main_process(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process and return its result in all; its ValueError or OSError is raised in all."""
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
        """A block that the main process completes before the others begin it."""
        if not self.is_main:
            self.broadcast_object(None)
        try:
            yield
        finally:
            if self.is_main:
                self.broadcast_object(None)

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.heartbeat()
