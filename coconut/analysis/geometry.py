"""Where the thoughts lie: how far apart, how far from words, and how much questions differ in each layer.

Shapes: N questions, K thoughts, P = K + 1 places (`<bot>` and the thoughts), L layers, D width,
M rows of a set, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coconut.analysis.probes import Subject
from coconut.analysis.states import need_places, slot_states
from coconut.runs.study import NotApplicable, Study
from coconut.utils.torch_utils import effective_rank

ROUNDING = 1e-6  # a smaller spread is that of equal rows


@torch.no_grad()
def geometry(subject: Subject) -> list[Study]:
    """The studies `geometry`, a row for each position of the slot, and `layers`, a row for each place and layer.

    `geometry`: mean Euclidean `norm`, distance `to_previous` (None for the first), `to_mean_word` (the mean of the
    input embeddings) and `to_nearest_word`, of what is fed. `spread`: the distance to the mean over questions, as a
    share of the norm (both root mean squares). `rank`: the effective rank over questions, exp of the entropy of the
    singular values after the mean is taken away (Roy and Vetterli 2007).
    `layers`: the same `spread` and `rank` of the hidden states at the position, in layer 0 (its input) to L (the last,
    after the final norm). Place 0 is the token before the slot, which is the same in every question.
    facts: `word_norm`, `word_spread`: of the embeddings of the questions' words, around their mean; `width`.

    Raises NotApplicable if the slot is empty, for fewer than two questions, or for states of several widths.
    """
    lm, K = subject.lm, need_places(subject.lm)
    if len(subject.examples) < 2:
        raise NotApplicable("Spread over questions needs at least two questions.")
    states_NPLD = slot_states(lm, subject.question_ids, subject.batch_size)
    table: Any = lm.base.get_input_embeddings()
    table_VD = table(torch.arange(len(table.weight), device=lm.device)).float().cpu()
    fed_NKD = states_NPLD[:, 1:, 0] if not lm.reasoning.slot.thinks else subject.baseline.thoughts.float()
    rows = []
    for k in range(K):
        here_ND = fed_NKD[:, k]
        rows.append({
            "thought": k + 1, "norm": _mean_norm(here_ND),
            "to_previous": _mean_norm(here_ND - fed_NKD[:, k - 1]) if k else None,
            "to_mean_word": _mean_norm(here_ND - table_VD.mean(0)),
            "to_nearest_word": float(torch.cdist(here_ND, table_VD).amin(1).mean()), **_spread(here_ND),
        })  # fmt: skip
    by_layer = [
        {"place": place, "layer": layer, **_spread(states_NPLD[:, place, layer])}
        for place in range(K + 1)
        for layer in range(states_NPLD.shape[2])
    ]
    words_MD = subject.word_embeddings
    facts = {"word_norm": _mean_norm(words_MD), "word_spread": _spread(words_MD)["spread"], "width": fed_NKD.shape[2]}
    return [Study("geometry", rows, facts), Study("layers", by_layer, facts)]


def _mean_norm(rows_MD: Tensor) -> float:
    return float(rows_MD.norm(dim=1).mean())


def _spread(rows_MD: Tensor) -> dict[str, Any]:
    """The distance to the mean row as a share of the norm, by root mean squares; the effective rank around the mean."""
    rows_MD = rows_MD.double()
    centred_MD = rows_MD - rows_MD.mean(0)
    size = rows_MD.square().sum(1).mean().sqrt()
    spread = float(centred_MD.square().sum(1).mean().sqrt() / size) if size > 0 else 0.0
    return {"spread": spread, "rank": effective_rank(centred_MD) if spread > ROUNDING else 1.0}
