"""What is trained, as data: the table of methods, the curriculum that walks through one, and how a model is asked.

Nothing here knows tokens or tensors.
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
