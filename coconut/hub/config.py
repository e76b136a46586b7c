"""Configuration of the export command."""

from __future__ import annotations

from dataclasses import dataclass, field

from coconut.config import EngineConfig, at_least
from coconut.hub.releases import released_reasoning
from coconut.methods import Reasoning, get_method
from coconut.utils.overrides import PathName, Place, Template


@dataclass
class ExportConfig:
    run: PathName = ""
    checkpoint: str = "best"
    released: PathName = ""  # instead of a run: a checkpoint of released code, a file or a folder
    base: Place = ""  # its base model, for config and tokenizer; for a LoRA run the name of the base to record
    tokenizer: Place = ""  # by default the base's
    method: str = "coconut"  # how the released checkpoint was trained
    stage: int | None = None
    thoughts_per_step: int = 1
    num_thoughts: int | None = None  # of methods without stages
    lora_alpha: float | None = None  # of a released checkpoint with LoRA weights
    question: Template = ""  # template of a question, if it is not the release's
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
        at_least("", self, stage=0, thoughts_per_step=0, num_thoughts=1)
        get_method(self.method)
        if self.released:
            self.reasoning()

    def reasoning(self) -> Reasoning:
        """How the released model is asked."""
        return released_reasoning(self.method, self.stage, self.thoughts_per_step, self.num_thoughts, self.question)
