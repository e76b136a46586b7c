"""Configuration of the export command."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import EngineConfig, at_least
from coconut.methods import METHODS, Curriculum, plan
from coconut.utils.overrides import PathName, Place


@dataclass
class ExportConfig:
    run: PathName = ""
    checkpoint: str = "best"
    released: PathName = ""  # instead of a run: a checkpoint of the code released with the paper
    base: Place = ""  # its base model, for config and tokenizer; for a LoRA run the name of the base to record
    tokenizer: Place = ""  # by default the base's
    method: str = "coconut"  # how the released checkpoint was trained
    stage: int | None = None
    thoughts_per_step: int = 1
    output: PathName = ""
    merge: bool = True  # merge LoRA corrections into the weights
    max_shard_size: str = "5GB"  # of a file of weights
    push: str = ""  # OWNER/NAME on the Hugging Face hub to upload to
    private: bool = True
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.released):
            raise ValueError("Name either run=DIR, a trained run, or released=FILE, a checkpoint of the released code.")
        if not self.output:
            raise ValueError("Name the folder to write with output=FOLDER.")
        if self.released and not self.base:
            raise ValueError("Name the model that the checkpoint was trained from with base=NAME (for its config).")
        at_least("", self, stage=0, thoughts_per_step=0)
        plan(self.method, Curriculum())
        if self.released and self.stage is None and not METHODS[self.method].slot.is_empty:
            raise ValueError(f"Say in which stage the checkpoint was written, stage=K: {self.method} has thoughts or "
                             "pauses according to it.")  # fmt: skip
