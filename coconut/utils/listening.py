"""Addresses to listen on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator


@contextlib.contextmanager
def explain_address_errors(what: str, host: str, port: int) -> Iterator[None]:
    """Raise ValueError with a remedy if an address cannot be had, where `what` is to be served."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"Port {port} is taken by another program. Choose another: port={port + 1}, or port=0 for any free one."
            ) from None
        raise ValueError(
            f"{what} cannot be served at host={host} port={port} ({error.strerror}). Use host=127.0.0.1 and a port "
            "above 1023."
        ) from None
