"""Where the thoughts lie: distances, spread over questions, effective rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.memorizing import EXAMPLES, NUM_THOUGHTS, memorizing_model
from helpers.models import build

from coconut import LatentLM
from coconut.analysis.geometry import geometry
from coconut.analysis.probes import Subject
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions
from coconut.methods import NOTHING, PAUSES, Projector, Slot, Source, Update
from coconut.reporting.measurements.geometry import describe
from coconut.runs.study import NotApplicable
from coconut.tasks import TASKS


def subject_of(lm: LatentLM, count: int = len(EXAMPLES), batch_size: int = 7) -> Subject:
    return Subject(lm, TASKS["prosqa"], EXAMPLES[:count], batch_size=batch_size)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(memorizing_model())


def slow_states(lm: LatentLM) -> np.ndarray:
    """(N, P, L + 1, D) one question at a time, without padding, cache or plan."""
    questions = encode_questions(lm.tokenizer, [e.question for e in EXAMPLES], lm.reasoning.format)
    found = []
    for question in questions:
        ids = torch.tensor([*question, *slot_with_markers(lm.reasoning, lm.special, NUM_THOUGHTS)])
        embeds = list(lm.base.get_input_embeddings()(ids))
        for t in [t for t, token in enumerate(ids.tolist()) if token == lm.latent_id]:
            states_TD = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state[0]
            embeds[t] = lm.feedback(states_TD[t - 1])
        out: Any = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True)
        first = len(question)
        found.append(torch.stack([states[0, first : first + NUM_THOUGHTS + 1] for states in out.hidden_states], dim=1))
    return torch.stack(found).detach().double().numpy()


@pytest.mark.parametrize("slot", ["thoughts", "pauses"])
def test_spread_and_rank_equal_a_slow_reading(slot: str) -> None:
    lm = memorizing_model()
    if slot == "pauses":
        lm.reasoning = replace(lm.reasoning, slot=PAUSES)
    by_thought, layers = geometry(subject_of(lm))
    states_NPLD = slow_states(lm)
    assert len(layers.rows) == states_NPLD.shape[1] * states_NPLD.shape[2]
    for row in layers.rows:
        here = states_NPLD[:, row["place"], row["layer"]]
        centre = here.mean(0)
        spread = np.sqrt(np.mean([np.sum((x - centre) ** 2) for x in here]) / np.mean([np.sum(x**2) for x in here]))
        singular = np.linalg.svd(here - centre, compute_uv=False)
        shares = singular / singular.sum() if singular.sum() > 1e-6 else np.ones(1)
        rank = np.exp(-sum(share * np.log(share) for share in shares if share > 0))
        assert row["spread"] == pytest.approx(spread, abs=1e-5)
        assert row["rank"] == pytest.approx(rank, rel=1e-3) or spread < 1e-6
    table = lm.base.get_input_embeddings().weight.detach().double().numpy()  # pyright: ignore
    for row in by_thought.rows:
        fed = states_NPLD[:, row["thought"], 0]
        nearest = np.mean([min(np.linalg.norm(x - word) for word in table) for x in fed])
        assert row["to_nearest_word"] == pytest.approx(nearest, rel=1e-3, abs=1e-3)
        assert row["norm"] == pytest.approx(np.mean([np.linalg.norm(x) for x in fed]), rel=1e-5)
        if row["thought"] > 1:
            before = states_NPLD[:, row["thought"] - 1, 0]
            assert row["to_previous"] == pytest.approx(np.mean(np.linalg.norm(fed - before, axis=1)), abs=1e-5)
    if slot == "pauses":
        assert describe(by_thought, "pause") == ["The pauses are the same whatever the question, as they are fed."]


def test_rows_do_not_depend_on_the_batch(subject: Subject) -> None:
    ours, theirs = (geometry(it) for it in (subject, subject_of(subject.lm, batch_size=24)))
    for one, other in zip([*ours[0].rows, *ours[1].rows], [*theirs[0].rows, *theirs[1].rows], strict=True):
        expected = {k: v if v is None else pytest.approx(v, rel=1e-3, abs=1e-4) for k, v in other.items()}
        assert one == expected


def test_thoughts_that_are_updated_all_at_once_are_measured_as_they_are_fed() -> None:
    slot = Slot(Source.thought, Projector.mlp_ln, update=Update.jacobi, iterations=2)
    lm = memorizing_model()
    other = build("gpt2", torch.float32, slot=slot, num_thoughts=2)
    other.reasoning = replace(other.reasoning, format=lm.reasoning.format)
    by_thought, _ = geometry(subject_of(other, 6))
    thoughts_NKD = subject_of(other, 6).baseline.thoughts
    for row in by_thought.rows:
        assert row["norm"] == pytest.approx(float(thoughts_NKD[:, row["thought"] - 1].norm(dim=1).mean()), rel=1e-4)


def test_what_does_not_apply_is_named(subject: Subject) -> None:
    with pytest.raises(NotApplicable, match="at least two questions"):
        geometry(subject_of(subject.lm, 1))
    lm = memorizing_model()
    lm.reasoning = replace(lm.reasoning, slot=NOTHING, num_thoughts=0)
    with pytest.raises(NotApplicable, match="nothing in its slot"):
        geometry(subject_of(lm))


def test_a_model_whose_thoughts_are_all_alike_is_told_apart() -> None:
    lm = memorizing_model()
    lm.feedback.forward = lambda states, words: torch.ones_like(states)  # pyright: ignore
    by_thought, layers = geometry(subject_of(lm))
    assert all(row["spread"] < 1e-6 for row in by_thought.rows)
    assert describe(by_thought, "thought")[0].startswith("The thoughts are the same whatever the question")
    assert max(row["spread"] for row in layers.rows) > 0.1, "they still attend to the question"
