"""Import DeepSpeed without its output and warnings."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any


def import_deepspeed() -> Any:
    """Import DeepSpeed and configure its logging. Raises ValueError if it is not installed."""
    try:
        with quiet():
            import deepspeed
    except ImportError as error:
        raise ValueError(f"engine=deepspeed needs DeepSpeed ({error}). Install it: pip install deepspeed") from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on CPUs, which takes a minute
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress DeepSpeed's deprecation warnings and its messages about its operators."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
