"""What all trainers share."""

from __future__ import annotations


class NonFiniteLossError(ValueError):
    """Training stopped on a loss that is not finite; the message is the diagnosis."""
