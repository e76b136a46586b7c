"""Coconut: train, compare and understand language models that reason in continuous latent space."""

from __future__ import annotations

import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coconut.data.examples import Example
    from coconut.generation.generate import answer, logit_lens
    from coconut.methods import METHODS, Curriculum, Reasoning, plan
    from coconut.models.latent_lm import LatentLM

__all__ = ["METHODS", "Curriculum", "Example", "LatentLM", "Reasoning", "answer", "logit_lens", "plan"]

_MODULE_OF = {
    **dict.fromkeys(("METHODS", "Curriculum", "Reasoning", "plan"), "coconut.methods"),
    "Example": "coconut.data.examples",
    "LatentLM": "coconut.models.latent_lm",
    **dict.fromkeys(("answer", "logit_lens"), "coconut.generation.generate"),
}

_module = next((name for flag, name in pairwise(sys.orig_argv) if flag == "-m"), "")
_is_command = (
    _module.partition(".")[0] in ("coconut", "data_builders")
    if sys.argv[:1] == ["-m"]
    else Path((sys.argv or [""])[0]).name == "coconut"
)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if imports are interrupted; commands set handlers later


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import coconut` and `--help` do not load torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'coconut' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_OF[name]), name)
