"""Configuration of coconut analyze, coconut analyze table and coconut demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from coconut.config import DataFiles, EngineConfig, Precision, at_least, needs_run
from coconut.evaluation.config import SuiteConfig
from coconut.utils.overrides import PathName


@dataclass
class DemoConfig:
    run: PathName = ""
    checkpoint: str = "best"
    host: str = "127.0.0.1"  # the address to listen on; by default only this machine can open the page
    port: int = 8000  # 0: any free port
    max_new_tokens: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, port=0, max_new_tokens=1)
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; it must be at most 65535.")
        if not self.host or ":" in self.host:
            raise ValueError(f"host={self.host} is no IPv4 address or name; 127.0.0.1 serves this machine only.")


class Part(StrEnum):
    """A measurement of a trained run, besides its accuracy."""

    k_forcing = "k_forcing"  # accuracy and reasoning paths with 0 to a few more thoughts than trained
    noise = "noise"  # accuracy under noise on the thoughts or pauses, against noise on words
    prefix_values = "prefix_values"  # what each thought adds to the log-probability of the right answer
    values = "values"  # the latent search tree: the probability of each node as the next step, after each thought
    inner_products = "inner_products"  # inner products of thoughts with the embeddings of nodes
    decoded = "decoded"  # logit lens: the likeliest tokens of each thought
    geometry = "geometry"  # where the thoughts lie: distances, spread over questions in each layer, effective rank
    rollouts = "rollouts"  # sampled answers after each number of thoughts: how varied they are, how many are right
    readout = "readout"  # linear probes that reconstruct the written steps from each position and layer
    audit_thoughts = "audit_thoughts"  # interventions on the thoughts
    influence = "influence"  # what a change of each thought, or written step, does to later ones and to the answer
    audit_edges = "audit_edges"  # interventions on the edges of the graph
    shortcuts = "shortcuts"  # changed and harder questions, shallow rules, planted hints
    stopping = "stopping"  # a classifier that decides when to stop thinking, against a constant number of thoughts


@dataclass
class AnalyzeConfig:
    run: PathName = ""
    checkpoint: str = "best"
    data: DataFiles = field(default_factory=DataFiles)
    parts: list[Part] | None = None  # by default all that apply to the run; []: write the page only
    limit: int | None = None  # measure on the first `limit` test questions
    batch_size: int = 64
    output: PathName | None = None  # by default RUN/report.html
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        needs_run(self.run)
        at_least("", self, limit=1, batch_size=1)


@dataclass
class TableConfig:
    runs: list[PathName] = field(default_factory=list)  # folders, or patterns of folders
    split: str = "test"  # or the name of another evaluation that all runs have
    suite: SuiteConfig = field(default_factory=SuiteConfig)  # in place of one evaluation: one for each set
    precision: Precision = Precision.float32  # in which the suite was evaluated
    sampled: PathName = ""  # in place of these: a pattern of names of sampled evaluations, compared at equal passes
    output: PathName | None = None  # a folder; by default the common parent of the runs

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("Name the runs: runs=DIR,DIR,... or a pattern, such as runs='runs/table1/*-seed*'.")
        if self.sampled and (self.suite.sets or self.split != "test"):
            other = f"suite={self.suite.name}" if self.suite.sets else f"split={self.split}"
            raise ValueError(f"sampled={self.sampled} and {other} are both given: compare one of them.")
        if self.suite.sets and self.split != "test":
            raise ValueError(f"suite={self.suite.name} and split={self.split} are both given: compare one of them.")
        if self.precision is not Precision.float32 and not self.suite.sets:
            raise ValueError(
                f"precision={self.precision.value} is for a suite. Of a single evaluation it is part of the name: "
                f"split=test-{self.precision.value}."
            )


@dataclass
class MethodsConfig:
    runs: list[PathName] = field(default_factory=list)  # folders, or patterns of folders
    output: PathName | None = None  # a folder; by default the common parent of the runs

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("Name the runs: runs=DIR,DIR,... or a pattern, such as runs='runs/table1/*-seed0'.")
