"""Compute the tanh approximation of GELU (GPT-2's) in one kernel; transformers writes it as eight operations.

The output also carries its input, from which a linear layer that follows can compute the output again in the backward
pass. The layer then does not have to save the output (`coconut.acceleration.linear`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from coconut.acceleration.patching import patched_forwards

PRE_GELU_ATTR = "pre_gelu"  # attribute of an output: the input that it was computed from


def fused_gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def patched_gelu(model: nn.Module) -> AbstractContextManager[None]:
    """Use the fused kernel in every module of the model that computes this GELU."""
    return patched_forwards((module, _forward) for module in model.modules() if isinstance(module, NewGELUActivation))


def _forward(x: Tensor) -> Tensor:
    output = fused_gelu(x)
    if torch.is_grad_enabled():
        setattr(output, PRE_GELU_ATTR, x)
    return output
