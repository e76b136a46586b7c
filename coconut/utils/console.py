"""Terminal output: log lines and progress bars."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

SECONDS_BETWEEN_LINES = 10  # between progress lines if standard output is not a terminal

_muted = False


def log(text: str) -> None:
    if not _muted:
        print(text, flush=True)


@contextlib.contextmanager
def mute_log() -> Iterator[None]:
    """Suppress `log` inside this context, in the processes of a run other than the main one."""
    global _muted
    _muted = True
    try:
        yield
    finally:
        _muted = False


def silence_libraries() -> None:
    """Turn off transformers' progress bars, and DeepSpeed's messages on a machine without a GPU."""
    import torch
    from transformers.utils import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed if it is installed
    logging.disable_progress_bar()


@contextlib.contextmanager
def progress_bar(label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show progress: a bar on a terminal, elsewhere a line every SECONDS_BETWEEN_LINES seconds.

    Yields a function to call with the number of items done and a remark.
    """
    start, last = time.monotonic(), time.monotonic()

    if sys.stdout.isatty() and not _muted:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[remark]}"), transient=True) as progress:
            bar = progress.add_task(label, total=total, completed=done, remark="")
            yield lambda now, remark: progress.update(bar, completed=now, remark=remark)
        return

    def print_line(now: int, remark: str) -> None:
        nonlocal last
        if time.monotonic() - last < SECONDS_BETWEEN_LINES:
            return
        last = time.monotonic()
        left = (last - start) / max(now - done, 1) * (total - now)
        log(f"  {label} {now:,} of {total:,}, {remark}, about {duration(left)} left")

    yield print_line


def listed(items: Iterable[str]) -> str:
    """Join items as in a sentence: "a", "a and b", "a, b and c"."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def list_lengths(noun: str, indices: Sequence[int], lengths: Sequence[int]) -> str:
    """The first five of these items, counted from 1, with their lengths: "question 3 (120 tokens), ... and 2 more"."""
    shown = ", ".join(f"{noun} {i + 1} ({lengths[i]} tokens)" for i in indices[:5])
    return shown + (f" and {len(indices) - 5} more" if len(indices) > 5 else "")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
