"""Training methods as data: the table of methods, the curriculum, prompt formats, and settings for inference.

No tokenizers and no tensors here.
"""

from coconut.methods.curriculum import Curriculum, Mixing, Plan, Stage, Unit, plan
from coconut.methods.modes import Mode, parse_mode
from coconut.methods.reasoning import REASONING_FILE, PromptFormat, Reasoning
from coconut.methods.table import METHODS, Cut, Method, Slot, get_method

__all__ = [
    "METHODS",
    "REASONING_FILE",
    "Curriculum",
    "Cut",
    "Method",
    "Mixing",
    "Mode",
    "Plan",
    "PromptFormat",
    "Reasoning",
    "Slot",
    "Stage",
    "Unit",
    "get_method",
    "parse_mode",
    "plan",
]
