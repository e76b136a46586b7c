"""What the screen shows: lines, and a bar for what takes long."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

SECONDS_BETWEEN_LINES = 10  # where the screen is no terminal


_hushed = False


def log(text: str) -> None:
    if not _hushed:
        print(text, flush=True)


@contextlib.contextmanager
def hush() -> Iterator[None]:
    """Say nothing: another process does."""
    global _hushed
    _hushed = True
    try:
        yield
    finally:
        _hushed = False


def silence_libraries() -> None:
    """Keep the progress bars of transformers, and what DeepSpeed says where it finds no GPU, off the screen."""
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed where it is installed
    logging.disable_progress_bar()


@contextlib.contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal, a line now and then elsewhere; call it with what is done and a remark."""
    start, last = time.monotonic(), time.monotonic()

    if sys.stdout.isatty() and not _hushed:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[remark]}"), transient=True) as progress:
            bar = progress.add_task(what, total=total, completed=done, remark="")
            yield lambda now, remark: progress.update(bar, completed=now, remark=remark)
        return

    def line(now: int, remark: str) -> None:
        nonlocal last
        if time.monotonic() - last < SECONDS_BETWEEN_LINES:
            return
        last = time.monotonic()
        left = (last - start) / max(now - done, 1) * (total - now)
        log(f"  {what} {now:,} of {total:,}, {remark}, about {duration(left)} left")

    yield line


def listed(items: Iterable[str]) -> str:
    """In words: "a", "a and b", "a, b and c"."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
