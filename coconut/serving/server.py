"""Listen on an address and serve the application there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from coconut.models.latent_lm import LatentLM
from coconut.serving.app import build_app
from coconut.serving.config import ServeConfig
from coconut.utils.listening import explain_address_errors

GRACE = 10  # seconds that requests have to end after Ctrl-C


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises ValueError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with explain_address_errors("The model", host, port):
        found = socket.create_server((host, port), family=family)
    with found:
        yield found


def address(host: str, listener: socket.socket) -> str:
    """The base URL for clients."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"


def make_server(lm: LatentLM, config: ServeConfig) -> uvicorn.Server:
    """A server for `run(sockets=[...])`, which ends after Ctrl-C or `should_exit = True`."""
    quiet: Any = {"log_level": "warning", "access_log": False, "server_header": False}
    app: Any = build_app(lm, config)
    return uvicorn.Server(
        uvicorn.Config(app, loop="asyncio", http="h11", ws="none", timeout_graceful_shutdown=GRACE, **quiet)
    )
