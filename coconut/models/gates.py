"""Gates that mix what a model expected into the words that it writes while it reasons (HRPO, arXiv 2505.18454).

The input of the next step is not the word's embedding e alone, but

    a * e + sqrt(1 - a^2) * (i * h)
    a = exp(-8 softplus(-Lambda) r),    r = sigmoid(Linear_r(e)),    i = sigmoid(Linear_i(e))

with all products elementwise. h is the expected embedding of the distribution that the word was taken from. With a = 1
the gates are closed and the input is e. The gates have the form of the RG-LRU's (De et al., arXiv 2402.19427).

Shapes: (..., D) embeddings; B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "gates.safetensors"  # beside a model's own weights, which AutoModel opens without it
SHARPNESS = 8.0


class Gates(nn.Module):
    """Trained beside the model, and part of it at inference.

    low, high: with r = 1, each component of a starts from a number drawn uniformly between them.
    """

    def __init__(self, hidden: int, low: float = 0.99, high: float = 0.999):
        super().__init__()
        start_D = torch.empty(hidden).uniform_(low, high)
        self.Lambda = nn.Parameter(-((start_D ** (-1 / SHARPNESS) - 1).log()))
        self.recurrence = nn.Linear(hidden, hidden)
        self.input = nn.Linear(hidden, hidden)

    def forward(self, embeds: Tensor, expected: Tensor) -> Tensor:
        """(..., D) the inputs, in the dtype of `embeds`. They are computed in that of the gates, without autocast."""
        of_word, of_expected = self.parts(embeds, expected)
        return (of_word + of_expected).to(embeds.dtype)

    def parts(self, embeds: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) what the input takes from the word, and from what was expected."""
        with torch.autocast(embeds.device.type, enabled=False):
            words, expected = embeds.to(self.Lambda.dtype), expected.to(self.Lambda.dtype)
            log_a = self._log_a(words)
            return log_a.exp() * words, _sqrt(-torch.expm1(2 * log_a)) * self.input(words).sigmoid() * expected

    def a(self, embeds: Tensor) -> Tensor:
        """(..., D) the share of each component of the word that is kept, in (0, 1]."""
        with torch.autocast(embeds.device.type, enabled=False):
            return self._log_a(embeds.to(self.Lambda.dtype)).exp()

    def _log_a(self, words: Tensor) -> Tensor:
        return -SHARPNESS * F.softplus(-self.Lambda) * self.recurrence(words).sigmoid()


def _sqrt(values: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    is_zero = values == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, values).sqrt())


def expected_embedding(logits_BV: Tensor, embeds_VD: Tensor, temperature: float) -> Tensor:
    """(B, D) the expected embedding of the distributions softmax(logits / temperature), divided by their norm.

    The norm is that of the vector of probabilities (equation 3 of the paper). It keeps the length of a word's
    embedding where embeddings are orthogonal and equally long, and a distribution on one word gives its embedding.
    """
    with torch.autocast(logits_BV.device.type, enabled=False):
        probs_BV = (logits_BV / temperature).softmax(-1)
        return probs_BV.to(embeds_VD.dtype) @ embeds_VD / probs_BV.norm(dim=-1, keepdim=True).to(embeds_VD.dtype)
