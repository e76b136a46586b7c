"""Losses of logits. Shapes: N targets, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def summed_cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Sum of the targets' negative log-likelihoods, in float32 or wider; 0 without targets."""
    return F.cross_entropy(at_least_float32(logits_NV), targets_N, reduction="sum")


def target_log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """(N,) log-probability of each target, in float32 or wider."""
    return -F.cross_entropy(at_least_float32(logits_NV), targets_N, reduction="none")


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
