"""Training methods as data: the table of methods, the curriculum, prompt formats, and settings for inference.

No tokenizers and no tensors here.
"""

from coconut.methods.curriculum import Curriculum, Form, Mixing, Plan, Stage, Unit, plan
from coconut.methods.modes import Mode, parse_mode
from coconut.methods.reasoning import REASONING_FILE, GatedWords, PromptFormat, Reasoning
from coconut.methods.table import (
    METHODS,
    NOTHING,
    PAUSES,
    STUDENT,
    TEACHER,
    THOUGHTS,
    WRITTEN,
    At,
    Compression,
    Content,
    Cut,
    Method,
    Per,
    Pooling,
    Projector,
    Slot,
    Source,
    Spans,
    Term,
    Update,
    get_method,
)

__all__ = [
    "METHODS", "NOTHING", "PAUSES", "REASONING_FILE", "STUDENT", "TEACHER", "THOUGHTS", "WRITTEN", "At",
    "Compression", "Content", "Curriculum", "Cut", "Form", "GatedWords", "Method", "Mixing", "Mode", "Per", "Plan",
    "Pooling", "Projector",
    "PromptFormat", "Reasoning", "Slot", "Source", "Spans", "Stage", "Term", "Unit", "Update", "get_method",
    "parse_mode", "plan",
]  # fmt: skip
