"""How far the gates of a policy are open, over the words of sampled completions.

Shapes: G words of a completion that were fed through the gates, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coconut.completions.completion import Completion
from coconut.models.latent_lm import LatentLM


@torch.no_grad()
def gate_statistics(lm: LatentLM, completions: Sequence[Completion]) -> dict[str, float]:
    """Means over the words that were fed through the gates; nothing if there is none.

    gate: a, over words and components: how much of a word is kept. latent_share: of each word's input, the norm of what
    comes from the expected embedding, divided by the sum of that and of the norm of what comes from the word.
    """
    assert lm.gates
    table = lm.base.get_input_embeddings()
    kept, shares, count = 0.0, 0.0, 0
    for completion in completions:
        assert completion.expected is not None
        expected_GD = completion.expected.to(lm.device)
        ids_G = torch.tensor(completion.completion_ids[: len(expected_GD)], dtype=torch.long, device=lm.device)
        embeds_GD = table(ids_G)
        word_G, latent_G = (part.norm(dim=-1) for part in lm.gates.parts(embeds_GD, expected_GD))
        kept += float(lm.gates.a(embeds_GD).mean(-1).sum())
        shares += float((latent_G / (latent_G + word_G)).sum())
        count += len(ids_G)
    return {"gate": kept / count, "latent_share": shares / count} if count else {}
