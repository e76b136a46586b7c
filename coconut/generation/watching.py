"""See the tokens of each answer as they are chosen, and end an answer early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria


class Watcher(Protocol):
    """Is given each token of one answer once, including the end of the sequence. Returning True ends the answer."""

    def __call__(self, token: int, /) -> bool: ...


class Watching(StoppingCriteria):
    """Calls the watcher of each row after each token, until the row ends.

    `lengths`: of each row, the number of tokens after which its watcher ended it, None if it did not.
    """

    def __init__(self, watchers: Sequence[Watcher], eos: int, num_prompt: int, others: Sequence[StoppingCriteria] = ()):
        """`num_prompt`: the columns of the prompt. `others`: criteria that also end rows."""
        self.watchers, self.eos, self.num_prompt, self.others = watchers, eos, num_prompt, others
        self.lengths: list[int | None] = [None] * len(watchers)
        self._ended = [False] * len(watchers)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.others:
            ended = ended | criterion(input_ids, scores, **kwargs)
        by_others = ended.tolist()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self._ended[row]:
                continue
            if self.watchers[row](token):
                self.lengths[row] = input_ids.shape[1] - self.num_prompt
            self._ended[row] = self.lengths[row] is not None or token == self.eos or by_others[row]
        return torch.tensor(self._ended, device=input_ids.device)
