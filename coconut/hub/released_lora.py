"""LoRA weights in checkpoints of released code: find them by peft's names, and merge them into the weights.

Shapes: of a linear layer O outputs, I inputs, R the rank of its correction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.utils.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.default\.weight")
BASE_LAYER = ".base_layer."
CONFIG_FILE = "adapter_config.json"
OTHER_KINDS = ("use_dora", "alpha_pattern", "rank_pattern")  # settings of peft that change what a correction is


@dataclass
class LoraWeights:
    """A (R, I) and B (O, R) by the name of the layer. `corrected`: the layers that have a `base_layer` in the file.

    `prefix`: what the file has before the names of layers.
    """

    prefix: str
    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    corrected: set[str] = field(default_factory=set)

    def takes(self, name: str, weight: Tensor) -> bool:
        """Whether this is A or B of a layer, which is then kept."""
        if found := NAME.fullmatch(name):
            self.sides.setdefault(found["layer"], {})[found["side"]] = weight
        return bool(found)

    def plain_name(self, name: str) -> str:
        """The name of a weight without LoRA: that of a corrected layer has `base_layer` in it."""
        layer, between, own = name.rpartition(BASE_LAYER)
        if between:
            self.corrected.add(layer)
        return f"{layer}.{own}" if between else name

    def merge_into(self, weights: dict[str, Tensor], model: Any, place: Path, alpha: float | None, advice: str) -> None:
        """Replace the weights of the corrected layers by W + scale * B A.

        `model`: has the layers, of which some keep W as (I, O). `alpha`: if no adapter_config.json beside the file has
        it. Raises ValueError if a part of a correction is missing or has a wrong shape, or if the scale is not known or
        given twice.
        """
        if not self.sides and not self.corrected:
            if alpha is not None:
                raise ValueError(f"lora_alpha={alpha}, and {place} has no LoRA weights. Leave lora_alpha out.")
            return
        if missing := self._missing():
            raise ValueError(f"The LoRA weights in {place} are incomplete: {count(missing, 'missing')}. {advice}")
        scale = lora_scale(place, {len(sides["A"]) for sides in self.sides.values()}, alpha)
        layers = dict(model.named_modules())
        for layer, sides in self.sides.items():
            if (name := f"{layer}.weight") not in weights or layer not in layers:
                raise ValueError(f"The LoRA weights in {place} correct {layer}, which the base does not have. {advice}")
            merged = _merged(weights[name], sides["A"], sides["B"], scale, layers[layer])
            if merged is None:
                raise ValueError(
                    f"The LoRA weights of {self.prefix}{layer} in {place} are A {tuple(sides['A'].shape)} and B "
                    f"{tuple(sides['B'].shape)}, which do not fit weights of {tuple(weights[name].shape)}. {advice}"
                )
            weights[name] = merged

    def _missing(self) -> list[str]:
        layers = sorted(self.sides.keys() | self.corrected)
        sides = [
            f"{self.prefix}{layer}.lora_{side}.default.weight"
            for layer in layers for side in "AB" if side not in self.sides.get(layer, {})
        ]  # fmt: skip
        return sides + [f"{self.prefix}{layer}{BASE_LAYER}weight" for layer in layers if layer not in self.corrected]


def _merged(weight: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, layer: Any) -> Tensor | None:
    """W + scale * B A, with at least float32; None if the shapes do not fit."""
    import torch
    from transformers.pytorch_utils import Conv1D

    transposed = isinstance(layer, Conv1D)  # which keeps its weight as (I, O)
    weight_OI = weight.T if transposed else weight
    if (*b_OR.shape, *a_RI.shape) != (weight_OI.shape[0], len(a_RI), len(a_RI), weight_OI.shape[-1]):
        return None
    dtype = torch.promote_types(weight.dtype, torch.promote_types(a_RI.dtype, torch.float32))
    merged_OI = weight_OI.to(dtype) + scale * (b_OR.to(dtype) @ a_RI.to(dtype))
    return merged_OI.T if transposed else merged_OI


def lora_scale(place: Path, ranks: set[int], alpha: float | None) -> float:
    """alpha / rank, as in training. Raises ValueError if alpha is missing, or is not that of peft's file."""
    file = (place if place.is_dir() else place.parent) / CONFIG_FILE
    settings = read_json(file) if file.is_file() else {}
    if len(ranks) > 1:
        raise ValueError(f"The LoRA weights in {place} have the ranks {sorted(ranks)}; the released code has one.")
    [rank] = ranks
    if others := [name for name in OTHER_KINDS if settings.get(name)]:
        raise ValueError(f"{file} has {', '.join(others)}; corrections of this kind are not merged here.")
    if settings.get("r", rank) != rank:
        raise ValueError(f"{file} has the rank {settings['r']}, and the weights in {place} have the rank {rank}.")
    recorded = settings.get("lora_alpha")
    if alpha is None and recorded is None:
        raise ValueError(
            f"{place} has LoRA weights of rank {rank}, and not how much they count. Set lora_alpha=A, as in training; "
            "the scripts of the released code have 32."
        )
    if None not in (alpha, recorded) and alpha != recorded:
        raise ValueError(f"lora_alpha={alpha}, and {file} has {recorded}. Leave lora_alpha out.")
    alpha = recorded if alpha is None else alpha
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha is {alpha}; it must be a number above 0.")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def count(names: Iterable[str], what: str) -> str:
    """How many names there are, and the first three; "" if there is none."""
    names = list(names)
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} {what} ({', '.join(names[:3])})" if names else ""
