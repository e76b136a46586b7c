"""Random numbers from a key of each answer, so that a sampled answer depends neither on its batch nor on the process.

A key is a few whole numbers, such as (seed, question, sample). From it come independent streams: one for the words, one
for the noise on the thoughts, one for the choice of a mode, one for the dropout of thoughts.

Shapes: B answers, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

Key = Sequence[int]


class Stream(IntEnum):
    """What the random numbers are for."""

    words = 0
    thoughts = 1
    mode = 2
    dropout = 3


def generator(key: Key, stream: Stream) -> np.random.Generator:
    """The generator of one stream of a key, whose numbers must be 0 or more."""
    return np.random.default_rng(np.random.SeedSequence(list(key), spawn_key=(stream,)))


def uniform(keys: Sequence[Key], stream: Stream, count: int) -> Tensor:
    """(B, count), float64: uniform numbers in [0, 1)."""
    return torch.from_numpy(np.stack([generator(key, stream).random(count) for key in keys]))


def normal(keys: Sequence[Key], stream: Stream, *shape: int) -> Tensor:
    """(B, *shape), float32: standard normal numbers. A larger first dimension only adds numbers."""
    return torch.from_numpy(np.stack([generator(key, stream).standard_normal(shape, np.float32) for key in keys]))


def choose(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """(B,) one token of each row by the inverse of its cumulative distribution; never one of probability 0."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    thresholds_B = uniform_B.to(cumulative_BV) * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, thresholds_B[:, None], right=True)[:, 0]


class KeyedSampling:
    """Samples words with numbers of each answer's own. transformers calls it as the last logits processor.

    It leaves one possible token in each row, which greedy decoding then takes. `temperature`, `top_k` and `top_p` are
    those of transformers' sampling, applied in this order; the others' defaults leave all tokens possible.
    """

    SETTINGS = ("temperature", "top_k", "top_p")

    def __init__(
        self, keys: Sequence[Key], prompt_length: int, limit: int,
        temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    ):  # fmt: skip
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.prompt_length = prompt_length
        self.uniform_BN = uniform(keys, Stream.words, limit)
        self.filters: list[Any] = [TemperatureLogitsWarper(float(temperature))]
        self.filters += [TopKLogitsWarper(top_k)] if top_k else []
        self.filters += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        filtered = scores.float()
        for apply_filter in self.filters:
            filtered = apply_filter(input_ids, filtered)
        chosen_B = choose(filtered, self.uniform_BN[:, input_ids.shape[1] - self.prompt_length])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)
