"""Files of the small modules that stand beside a model's own weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def save_module(module: nn.Module, file: Path) -> None:
    """Write the weights."""
    from safetensors.torch import save_file

    save_file({name: weight.detach().cpu().contiguous() for name, weight in module.state_dict().items()}, file)


def load_module(module: nn.Module, file: Path, what: str) -> None:
    """Read what `save_module` wrote. Raises ValueError, which names `what`, if the file is missing or does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file}, {what}, cannot be read ({error}). Save the model again.") from error
