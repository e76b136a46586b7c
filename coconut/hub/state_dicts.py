"""Read the weights of a checkpoint: a file of torch or safetensors, or a folder of them. Only tensors are loaded."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module)\.")  # of DDP, compile and FSDP
DERIVED_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|\.attention\.(masked_)?bias)$")
FILES = ("model*.safetensors", "pytorch_model*.bin")  # of a folder; the first kind that is there


def read_weights(place: Path) -> dict[str, Tensor]:
    """The tensors by their names, without the prefixes of wrappers and without buffers that follow from the config.

    Raises FileNotFoundError if nothing is there, or ValueError if a file contains anything but tensors or two files
    have the same name.
    """
    weights: dict[str, Tensor] = {}
    for file in _files(place):
        for name, value in _read(file).items():
            if DERIVED_BUFFERS.search(name):
                continue
            name = WRAPPERS.sub("", name)
            if name in weights:
                raise ValueError(f"{place} has {name} twice. Name the one file that holds the weights.")
            weights[name] = value
    return weights


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"{place} does not exist.")
    for pattern in FILES:
        if found := sorted(place.glob(pattern)):
            return found
    raise FileNotFoundError(f"{place} has no {' and no '.join(FILES)}. Name the file that holds the weights.")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} must contain tensors only; other objects are not loaded: {error}") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} contains no state dict (names to tensors).")
    return state
