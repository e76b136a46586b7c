"""The influence of each unit on later units and on the answer."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from helpers.memorizing import EXAMPLES, NUM_THOUGHTS, memorizing_model
from helpers.models import build
from helpers.planted import FORM
from torch import Tensor
from transformers import DynamicCache

from coconut import LatentLM
from coconut.analysis import influence as module
from coconut.analysis.influence import influence
from coconut.analysis.probes import Subject
from coconut.analysis.statistics import partners
from coconut.analysis.unit_chain import UnitRunner, unit_chains
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions, encode_texts
from coconut.methods import NOTHING, PAUSES, Projector, PromptFormat, Slot, Source, Update
from coconut.reporting.measurements.influence import chart
from coconut.runs.study import NotApplicable
from coconut.tasks import TASKS

COUNT = 6  # questions in slow comparisons


def subject_of(lm: LatentLM, count: int = len(EXAMPLES), batch_size: int = 7) -> Subject:
    return Subject(lm, TASKS["prosqa"], EXAMPLES[:count], batch_size=batch_size)


def models() -> dict[str, LatentLM]:
    """Models in float64 with thoughts in turn, thoughts updated all at once, pauses, and a written chain."""
    slots = {
        "in turn": Slot(Source.thought, Projector.mlp_ln),
        "all at once": Slot(Source.thought, update=Update.jacobi, iterations=2),
    }
    found = {name: build("gpt2", slot=slot, num_thoughts=NUM_THOUGHTS, format=FORM, steps_cut=None)
             for name, slot in slots.items()}  # fmt: skip
    found["pauses"] = build("llama", slot=PAUSES, num_thoughts=NUM_THOUGHTS, format=FORM, steps_cut=None)
    found["steps"] = build("llama", slot=NOTHING, markers=False, format=FORM)
    return found


class Slow:
    """One question without padding, column by column with transformers' own cache."""

    def __init__(self, lm: LatentLM, index: int):
        self.lm, reasoning = lm, lm.reasoning
        example = EXAMPLES[index]
        form = reasoning.format
        question = encode_questions(lm.tokenizer, [example.question], form)[0]
        slot = slot_with_markers(reasoning, lm.special, reasoning.num_thoughts).tolist()
        steps = () if reasoning.steps_cut is None else example.steps
        texts = encode_texts(lm.tokenizer, [PromptFormat.fill(form.step, step) for step in steps])
        answer = encode_texts(lm.tokenizer, [PromptFormat.fill(form.answer, example.answer)])[0]
        self.ids = [*question, *slot, *chain(*texts), *answer, lm.special.eos]
        self.first = len(question) + reasoning.markers  # the first column after the prompt
        self.unit = [0] * len(self.ids)
        if reasoning.num_thoughts:
            for k in range(reasoning.num_thoughts):
                self.unit[self.first + k] = k + 1
        else:
            place = self.first
            for number, text in enumerate(texts, 1):
                self.unit[place : place + len(text)] = [number] * len(text)
                place += len(text)
        self.answer = len(self.ids) - (len(answer) - 1) - 1  # the first column of the answer after the mark

    def run(self, new: dict[int, Tensor], anew_from: int | None, cache: tuple[int, Any] | None = None) -> Any:
        """Log-probabilities (T, V) before each column, and the inputs; thoughts behind `anew_from` are computed."""
        lm = self.lm
        kv: Any = DynamicCache(config=lm.base.config)
        table: Any = lm.base.get_input_embeddings()
        before: list[Tensor] = []
        fed = []
        self.kept = {}
        for t, token in enumerate(self.ids):
            if t in new:
                x = new[t]
            elif token == lm.latent_id and (anew_from is None or self.unit[t] > anew_from):
                x = lm.feedback(before[-1])
            else:
                x = table.weight[token]
            fed.append(x)
            out = lm.base.base_model(inputs_embeds=x[None, None], use_cache=True, **{lm.cache_argument: kv})
            before.append(out.last_hidden_state[0, -1])
            self.kept[t] = [(layer.keys[0, :, -1].clone(), layer.values[0, :, -1].clone()) for layer in kv.layers]
            if cache and t == cache[0]:
                for layer, (keys, values) in zip(kv.layers, cache[1], strict=True):
                    layer.keys[0, :, -1], layer.values[0, :, -1] = keys, values
        logits = lm.logits(torch.stack([before[0], *before[:-1]]))
        logits[:, lm.special.added] = -math.inf
        return logits.log_softmax(-1), fed


def divergence(before: Tensor, after: Tensor) -> float:
    p = before.exp()
    return float(sum((p[v] * (before[v] - after[v]) for v in range(len(p)) if p[v] > 0), torch.zeros(())))


@pytest.mark.parametrize("name", ["in turn", "all at once", "pauses", "steps"])
@torch.no_grad()
def test_effects_equal_a_slow_reading(name: str) -> None:
    lm = models()[name]
    subject = subject_of(lm, COUNT, batch_size=4)
    rows = {(r["unit"], r["change"], r["control"], r["later"], r["on"]): r for r in influence(subject).rows}
    slow = [Slow(lm, i) for i in range(COUNT)]
    units = next(unit_chains(subject, COUNT, 8))
    own = UnitRunner(lm, units, 4).embeds_NSD
    thoughts = subject.baseline.thoughts.double()  # float32, as an evaluation gives them
    fixed = [{} if name != "all at once" else {s.first + k: own[i, k] for k in range(NUM_THOUGHTS)}
             for i, s in enumerate(slow)]  # fmt: skip
    if name == "all at once":
        assert torch.allclose(own[:, :NUM_THOUGHTS], thoughts, atol=1e-5)
    base = [s.run(fixed[i], None) for i, s in enumerate(slow)]
    kept = [dict(s.kept) for s in slow]
    for i, (s, (_, fed)) in enumerate(zip(slow, base, strict=True)):
        assert torch.allclose(torch.stack(fed[s.first :]), own[i, : len(fed) - s.first], atol=1e-9)
    laters = ["kept", "recomputed"] if name == "in turn" else ["kept"]
    compared, rotation = 0, module._rotation(own.shape[2]).double()
    for unit in range(1, units.count + 1):
        columns = [[t for t, u in enumerate(s.unit) if u == unit] for s in slow]
        vectors = [[base[i][1][t] for t in ts] for i, ts in enumerate(columns)]
        everything = torch.stack([x for i, s in enumerate(slow) for t, x in enumerate(base[i][1]) if s.unit[t]])
        width = max(map(len, columns))
        step_mean = [torch.stack([v[w] for v in vectors if len(v) > w]).mean(0) for w in range(width)]
        same_width = partners([len(ts) for ts in columns])
        same_prompt = partners([s.first for s in slow])
        for change in ("zeros", "mean", "step_mean", "other", "turned", "cache"):
            if change == "cache" and name == "steps":
                continue
            for later in laters:
                effects: dict[int, list[tuple[float, float, bool]]] = {}
                for i, s in enumerate(slow):
                    partner = same_prompt[i] if change == "cache" else same_width[i]
                    if not columns[i] or (change in ("other", "turned", "cache") and partner < 0):
                        continue
                    new = dict(fixed[i])
                    known = units.count if later == "kept" else unit
                    new |= {t: x for t, x in enumerate(base[i][1]) if 0 < s.unit[t] <= known}
                    swap = None
                    if change == "cache":
                        (column,) = columns[i]
                        swap = column, kept[partner][columns[partner][0]]
                    for w, t in enumerate(columns[i]):
                        new |= {
                            "zeros": {t: torch.zeros_like(everything[0])}, "mean": {t: everything.mean(0)},
                            "step_mean": {t: step_mean[w]}, "cache": {},
                            "other": {t: vectors[partner][w] if change == "other" else everything[0]},
                            "turned": {t: vectors[i][w] + (vectors[partner][w] - vectors[i][w]) @ rotation
                                       if change == "turned" else everything[0]},
                        }[change]  # fmt: skip
                    after, _ = s.run(new, unit, swap)
                    before = base[i][0]
                    for on in range(unit + 1, units.count + 2):
                        ts = [t for t, u in enumerate(s.unit) if u == on]
                        ts = list(range(s.answer, len(s.ids))) if on == units.count + 1 else ts
                        if ts:
                            gained = sum(float(after[t][s.ids[t]] - before[t][s.ids[t]]) for t in ts)
                            right = all(int(after[t].argmax()) == s.ids[t] for t in ts)
                            kl = sum(divergence(before[t], after[t]) for t in ts)
                            effects.setdefault(on, []).append((kl, gained, right))
                for on, several in effects.items():
                    name_and_control = ("other", True) if change == "turned" else (change, False)
                    row = rows[unit, *name_and_control, later, None if on == units.count + 1 else on]
                    assert row["questions"] == len(several)
                    kl, gained, right = (float(np.mean([one[n] for one in several])) for n in range(3))
                    assert row["kl"] == pytest.approx(kl, abs=1e-9), (unit, change, later, on)
                    if row["on"] is None:
                        assert row["log_prob"] == pytest.approx(gained, abs=1e-9)
                        assert row["right"] == pytest.approx(right)
                    compared += kl > 1e-6
    assert compared >= 5


@pytest.mark.parametrize("name", ["in turn", "steps"])
@torch.no_grad()
def test_one_unit_alone_equals_a_slow_reading(name: str) -> None:
    """`none` and `only`: all units, or all others, are replaced by the means over the questions at their places."""
    lm = models()[name]
    rows = {(r["unit"], r["change"]): r for r in influence(subject_of(lm, COUNT, batch_size=4)).rows
            if r["change"] in ("none", "only") and r["on"] is None}  # fmt: skip
    slow = [Slow(lm, i) for i in range(COUNT)]
    count = max(max(s.unit) for s in slow)
    base = [s.run({}, None) for s in slow]
    places = [[(t, (u, s.unit[:t].count(u))) for t, u in enumerate(s.unit) if u] for s in slow]
    fed: dict[tuple[int, int], list[Tensor]] = {}
    for i, own in enumerate(places):
        for t, place in own:
            fed.setdefault(place, []).append(base[i][1][t])
    assert rows.keys() == {(0, "none"), *((unit, "only") for unit in range(1, count + 1))}
    for (unit, _), row in rows.items():
        gained, right = [], []
        for i, s in enumerate(slow):
            if unit and unit not in s.unit:
                continue
            new = {t: base[i][1][t] if u == unit else torch.stack(fed[u, w]).mean(0) for t, (u, w) in places[i]}
            after, _ = s.run(new, count)
            ts = range(s.answer, len(s.ids))
            gained.append(sum(float(after[t][s.ids[t]] - base[i][0][t][s.ids[t]]) for t in ts))
            right.append(all(int(after[t].argmax()) == s.ids[t] for t in ts))
        assert row["questions"] == len(right)
        assert row["log_prob"] == pytest.approx(float(np.mean(gained)), abs=1e-9)
        assert row["right"] == pytest.approx(float(np.mean(right)))
    assert max(abs(row["log_prob"]) for row in rows.values()) > 1e-4


def test_units_of_some_questions_are_compared_with_the_same_questions() -> None:
    """Chains of two and three steps: the third is that of some questions only."""
    lm = build("llama", slot=NOTHING, markers=False, format=FORM)
    study = influence(subject_of(lm, 8))
    third = [row for row in study.rows if row["unit"] == 3 and row["change"] == "step_mean" and row["on"] is None]
    assert third[0]["questions"] == sum(len(example.steps) == 3 for example in EXAMPLES[:8]) < 8
    assert chart(study, 720, "steps").axes
    alone = influence(subject_of(memorizing_model(), 1))
    assert not [row for row in alone.rows if row["change"] == "other"], "no partner"
    assert chart(alone, 350, "thoughts").axes


def test_questions_without_room_for_their_answers_are_left_out() -> None:
    lm = memorizing_model()
    lengths = [len(row) for row in subject_of(lm).question_ids]
    needed = 2 + NUM_THOUGHTS + 3  # markers, thoughts, answer
    lm.base.config.max_position_embeddings = sorted(lengths)[-1] + needed - 1
    left_out = sum(length + needed > lm.max_sequence_length for length in lengths)
    study = influence(subject_of(lm))
    assert study.facts["left_out"] == {"questions with thoughts": f"{left_out} have no room for their answers."}
    assert max(row["questions"] for row in study.rows) == len(EXAMPLES) - left_out


def test_rows_do_not_depend_on_the_batch() -> None:
    lm = memorizing_model()
    ours, theirs = influence(subject_of(lm)), influence(subject_of(lm, batch_size=24))
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        assert one == {k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in other.items()}


def test_intervals_hold_the_means_and_what_cannot_be_measured_is_empty() -> None:
    study = influence(subject_of(memorizing_model()))
    for row in study.rows:
        assert row["kl_low"] <= row["kl"] + 1e-9
        assert row["kl"] <= row["kl_high"] + 1e-9
        assert (row["on"] is None) == (row["right"] is not None) == (row["log_prob_low"] is not None)
    assert study.facts["units"] == {"thoughts": NUM_THOUGHTS}


def test_controls_have_the_same_norm_and_span() -> None:
    rows = torch.randn(5, 16)
    turned = module._rotated(rows)
    assert torch.allclose(turned @ turned.T, rows @ rows.T, atol=1e-4)
    assert (turned - rows).norm() > 0.5 * rows.norm()


def test_partners_share_the_key_and_are_others() -> None:
    keys = [3, 4, 3, 5, 4, 3]
    found = partners(keys)
    assert found[3] == -1
    for i, partner in enumerate(found):
        assert partner == -1 or (partner != i and keys[partner] == keys[i])
    assert sorted(found[[0, 2, 5]]) == [0, 2, 5]


def test_many_thoughts_are_changed_at_some_places() -> None:
    lm = memorizing_model()
    lm.reasoning = replace(lm.reasoning, num_thoughts=12)
    study = influence(subject_of(lm, 3))
    changed = sorted({row["unit"] for row in study.rows} - {0})
    assert len(changed) == module.MAX_UNITS
    assert (changed[0], changed[-1]) == (1, 12)


def test_a_model_without_units_is_named() -> None:
    lm = build("llama", slot=NOTHING, markers=False, steps_cut=None, format=FORM)
    with pytest.raises(NotApplicable, match="nothing in its slot and writes no steps"):
        influence(subject_of(lm, 4))
