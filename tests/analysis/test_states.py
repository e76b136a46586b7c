"""The hidden states of the slot in every layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.family_table import FAMILIES, Family, base_of, new_tokenizer
from helpers.models import QUESTIONS, build, shift_weights

from coconut import LatentLM
from coconut.analysis.states import need_places, slot_states
from coconut.data.sequences import slot_with_markers
from coconut.methods import NOTHING, PAUSES, THOUGHTS, Projector, Reasoning, Slot, Source, Update
from coconut.models.passes import Reads
from coconut.runs.study import NotApplicable

SLOTS = {
    "thoughts": THOUGHTS,
    "projected": Slot(Source.thought, Projector.mlp_ln),
    "jacobi": Slot(Source.thought, update=Update.jacobi, iterations=2),
    "loop": Slot(Source.thought, update=Update.loop, iterations=1, iterations_per=1),
    "pauses": PAUSES,
}


def by_recomputation(lm: LatentLM) -> torch.Tensor:
    """One question and one place at a time, everything run again for every thought."""
    found = []
    for question in QUESTIONS:
        ids = torch.tensor([[*question, *slot_with_markers(lm.reasoning, lm.special, lm.reasoning.num_thoughts)]])
        first = len(question) - 1 + lm.reasoning.markers
        of_places = [
            lm(ids, reads=Reads(columns_B=torch.tensor([first + place])), use_cache=False).states[0]
            for place in range(lm.reasoning.num_thoughts + 1)
        ]
        found.append(torch.stack(of_places))
    return torch.stack(found).detach().float()


@pytest.mark.parametrize("slot", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_states_equal_those_of_single_questions(family: str, slot: Slot, batch_size: int) -> None:
    lm = build(family, slot=slot, num_thoughts=3)
    torch.testing.assert_close(slot_states(lm, QUESTIONS, batch_size), by_recomputation(lm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.float64 and "narrower" not in f.special], ids=str)
def test_states_equal_those_of_single_questions_in_every_family(family: Family) -> None:
    torch.manual_seed(0)
    lm = LatentLM.from_base(base_of(family), new_tokenizer(), init="random", reasoning=Reasoning(num_thoughts=2))
    shift_weights(lm, 0.1).double().eval()
    torch.testing.assert_close(slot_states(lm, QUESTIONS, 4), by_recomputation(lm), rtol=1e-3, atol=1e-3)


def test_pauses_stand_in_place_of_thoughts() -> None:
    lm = build("llama", slot=THOUGHTS, num_thoughts=3)
    with_pauses = slot_states(lm, QUESTIONS, 4, pauses=True)
    assert not torch.allclose(with_pauses, slot_states(lm, QUESTIONS, 4))
    lm.reasoning = replace(lm.reasoning, slot=PAUSES)
    torch.testing.assert_close(with_pauses, by_recomputation(lm), rtol=1e-5, atol=1e-5)


def test_without_markers_the_question_ends_before_the_slot() -> None:
    lm = build("gpt2", slot=PAUSES, markers=False, num_thoughts=2)
    torch.testing.assert_close(slot_states(lm, QUESTIONS, 4), by_recomputation(lm), rtol=1e-5, atol=1e-5)


def test_what_has_no_places_is_named() -> None:
    with pytest.raises(NotApplicable, match="nothing in its slot"):
        need_places(build("llama", slot=NOTHING))
    narrow = next(family for family in FAMILIES if "narrower" in family.special)
    lm = LatentLM.from_base(base_of(narrow), new_tokenizer(), init="random", reasoning=Reasoning(num_thoughts=2))
    with pytest.raises(NotApplicable, match="not of one width"):
        need_places(lm)
