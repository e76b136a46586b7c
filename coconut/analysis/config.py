"""The schema of analyze, its table of runs, and demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from coconut.config import DataFiles, EngineConfig, at_least, needs_run
from coconut.utils.overrides import PathName


@dataclass
class DemoConfig:
    run: PathName = ""
    checkpoint: str = "best"
    host: str = "127.0.0.1"  # who can open the page: this machine alone
    port: int = 8000  # 0: any that is free
    max_new_tokens: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, port=0, max_new_tokens=1)
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; it must be at most 65535.")
        if not self.host or ":" in self.host:
            raise ValueError(f"host={self.host} is no IPv4 address or name; 127.0.0.1 is this machine alone.")


class Part(StrEnum):
    """What can be measured of a trained run, besides its accuracy."""

    k_forcing = "k_forcing"  # accuracy and reasoning paths with any number of thoughts
    prefix_values = "prefix_values"  # what each thought adds to the probability of the right answer
    values = "values"  # the latent search tree: what the next step would be after each thought
    inner_products = "inner_products"  # thoughts against the embeddings of nodes
    decoded = "decoded"  # the tokens that a thought is closest to saying
    audit_thoughts = "audit_thoughts"  # other thoughts in place of its own
    audit_edges = "audit_edges"  # questions with an edge changed
    stopping = "stopping"  # a classifier that ends the thoughts against their constant number


@dataclass
class AnalyzeConfig:
    run: PathName = ""
    checkpoint: str = "best"
    data: DataFiles = field(default_factory=DataFiles)
    parts: list[Part] | None = None  # by default all that fit the run; []: the page alone
    limit: int | None = None  # the first so many test questions
    batch_size: int = 64
    output: PathName | None = None  # by default RUN/report.html
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, limit=1, batch_size=1)


@dataclass
class TableConfig:
    runs: list[PathName] = field(default_factory=list)  # folders, or patterns of folders
    split: str = "test"  # or the name of another evaluation that all of them have
    output: PathName | None = None  # a folder; by default the one that all runs lie in

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("Name the runs: runs=DIR,DIR,... or a pattern, such as runs='runs/table1/*-seed*'.")
