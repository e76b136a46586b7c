"""The schema of serve."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address

from coconut.config import EngineConfig, at_least, needs_run
from coconut.utils.overrides import PathName, Text

TOKEN_VARIABLE = "COCONUT_TOKEN"


@dataclass
class ServeConfig:
    run: PathName = ""
    checkpoint: str = "best"
    name: str = ""  # of the model, in requests and responses; by default that of the run's folder
    host: str = "127.0.0.1"  # the address to listen on; any but a loopback address needs a token
    port: int = 8000  # 0: any free port
    token: Text = ""  # that each request must bring; by default the environment variable COCONUT_TOKEN
    max_batch: int = 16  # answers that are generated together, and the most to one question
    gather_ms: float = 5.0  # how long a question waits for others to share its batch
    max_queue: int = 256  # questions that wait; further ones are refused
    max_new_tokens: int | None = None  # the most that a request may ask for; by default the model's context
    max_prompt_tokens: int | None = None  # by default what leaves room for thoughts and an answer in the context
    max_body_kb: int = 1000  # of a request, in thousands of bytes
    timeout: float = 120.0  # seconds from a request to its last token
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        self.token = self.token or os.environ.get(TOKEN_VARIABLE, "")
        at_least(
            "", self, port=0, max_batch=1, gather_ms=0, max_queue=1, max_new_tokens=1, max_prompt_tokens=1,
            max_body_kb=1,
        )  # fmt: skip
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; it must be at most 65535.")
        if not 0 < self.timeout < float("inf"):
            raise ValueError(f"timeout is {self.timeout}; it must be a number of seconds above 0.")
        if not self.host:
            raise ValueError("host is empty. Name an address or a name of this machine, such as 127.0.0.1.")
        if not self.token.isascii() or any(character.isspace() for character in self.token):
            raise ValueError("token has white space or letters that a header cannot carry. Use others.")
        if not self.token and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host} lets other machines use the model. Set a token that their requests must bring: "
                f"token=SECRET, or {TOKEN_VARIABLE}=SECRET in the environment. host=127.0.0.1 serves this machine only."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
