"""End an answer with a text, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class StopStrings(StoppingCriteria):
    """Ends a row as soon as its new text contains one of the texts. What the prompt says does not count.

    transformers' own criterion works on the strings of the vocabulary, which fails for a vocabulary of words, and also
    finds a text that begins in the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], num_prompt: int):
        """`num_prompt`: the columns of the prompt."""
        self.tokenizer, self.texts, self.num_prompt = tokenizer, tuple(texts), num_prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        new = self.tokenizer.batch_decode(input_ids[:, self.num_prompt :], clean_up_tokenization_spaces=False)
        found = [any(text in row for text in self.texts) for row in new]
        return torch.tensor(found, device=input_ids.device)
