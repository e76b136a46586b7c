"""Sequences, epochs and batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from helpers.models import build
from hypothesis import given
from hypothesis import strategies as st

from coconut.data.batching import collate, epoch_batches, micro_batches
from coconut.data.sequences import EpochView, fit_context, stage_variants
from coconut.data.tokenization import SpecialIds, TokenizedData
from coconut.methods import METHODS, NOTHING, Curriculum, Cut, Mixing, Plan, Spans, plan
from coconut.models.passes import plan_passes

SPECIAL = SpecialIds(
    bot=90,
    eot=91,
    latent=92,
    pause=93,
    eos=1,
    pad=0,
    control={"short": 94, "think": 95, "latent_3": 96},
    rates=[97, 98, 99, 100, 101],
)


@st.composite
def data_sets(draw: st.DrawFn) -> TokenizedData:
    lengths = draw(
        st.lists(
            st.tuples(st.integers(1, 6), st.lists(st.integers(1, 4), max_size=5), st.integers(2, 4)),
            min_size=1,
            max_size=12,
        )
    )
    segments = [[question, *steps, answer] for question, steps, answer in lengths]
    tokens = [[*range(2, 1 + sum(row)), 1] for row in segments]
    return TokenizedData.from_lists(tokens, segments)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    curriculum = Curriculum(
        thoughts_per_step=draw(st.integers(0, 3)),
        max_stage=draw(st.integers(0, 3)),
        extra_stage=draw(st.booleans()),
        stage0_length=1,
        stage_length=1,
        total_length=10,
        pad_thoughts=draw(st.booleans()),
        mixing=draw(st.sampled_from(list(Mixing))),
        mixing_probability=draw(st.sampled_from([0.0, 0.5])),
        icot_tokens=2,
        icot_limit=6,
        teacher_steps_cut=draw(st.integers(0, 2)),
    )
    method = draw(st.sampled_from(list(METHODS)))
    if METHODS[method].cut is Cut.all and METHODS[method].slot != NOTHING:
        curriculum = replace(curriculum, num_thoughts=draw(st.integers(1, 4)))
    return plan(method, curriculum)


@given(data_sets(), plans(), st.integers(1, 4), st.integers(1, 3))
def test_processes_share_an_update_evenly(data: TokenizedData, stages: Plan, ranks: int, size: int) -> None:
    """Every row and target occurs once; all processes get equally many micro-batches with equally many passes."""
    view = EpochView(data, stages, stages.stages[-1], SPECIAL, seed=0, epoch=0)
    batch = np.arange(len(data))
    shares = [list(micro_batches(view, batch, size, rank, ranks)) for rank in range(ranks)]
    alone = list(micro_batches(view, batch, len(batch)))
    assert len({len(share) for share in shares}) == 1
    counts = [np.sum([part.denominators for part in parts], axis=0) for parts in (list(chain(*shares)), alone)]
    assert counts[0].tolist() == counts[1].tolist()
    rows = [tuple(row[mask > 0].tolist()) for share in shares for part in share if any(part.denominators)
            for row, mask in zip(part.input_ids, part.attention_mask, strict=True)]  # fmt: skip
    assert sorted(rows) == sorted(tuple(item.ids.tolist()) for i in range(len(data)) for item in view.layouts(i))
    slot = stages.stages[-1].form.slot
    for parts in zip(*shares, strict=True):
        thoughts = max(int((part.input_ids == SPECIAL.latent).sum(1).max()) for part in parts)
        iterations = slot.count_iterations(thoughts)
        needed = 1 + (
            iterations + 1 if slot.in_parallel and thoughts and iterations else thoughts * (not slot.in_parallel)
        )
        assert {part.passes for part in parts} == {1 if slot.merges else needed}


@given(data_sets(), plans(), st.integers(0, 3))
def test_view_lengths_and_slot_starts_match_the_sequences(data: TokenizedData, stages: Plan, epoch: int) -> None:
    for stage in stages.stages:
        view = EpochView(data, stages, stage, SPECIAL, seed=0, epoch=epoch)
        for index in range(len(data)):
            items = view.layouts(index)
            assert [len(item.ids) for item in items] == view.lengths[:, index].tolist()
            item = items[0]
            assert item.slot_start == view.slot_starts[index]
            assert item.ids[-1] == SPECIAL.eos
            question = data.question(index)
            assert item.ids[: len(question)].tolist() == question.tolist()
            if view.form(index).markers:
                assert item.ids[item.num_prompt - 1] == SPECIAL.eot
            added = np.isin(item.ids[item.num_prompt :], SPECIAL.added)
            assert not added.any(), "no added token is a target"


@given(data_sets(), plans())
def test_stage_variants_bound_the_length_of_every_epoch(data: TokenizedData, stages: Plan) -> None:
    still = replace(stages, mixing_probability=0.0)
    longest = np.max([EpochView(data, still, form, SPECIAL, 0, 0).longest for form in stage_variants(stages)], axis=0)
    shown = [EpochView(data, stages, s, SPECIAL, 0, epoch).longest for s in stages.stages for epoch in range(6)]
    assert (np.max(shown, axis=0) <= longest).all()
    if not stages.mixing_probability and not stages.stages[0].form.draws_group:
        assert np.max(shown, axis=0).tolist() == longest.tolist(), "and it is shown so in one of a few epochs"


@given(data_sets(), st.integers(1, 5), st.integers(0, 3))
def test_epoch_batches_hold_every_example_once(data: TokenizedData, batch_size: int, epoch: int) -> None:
    stages = plan("coconut", Curriculum())
    view = EpochView(data, stages, stages.stages[0], SPECIAL, seed=0, epoch=epoch)
    batches = epoch_batches(view, batch_size, seed=0, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(data)))
    assert [b.tolist() for b in batches] == [b.tolist() for b in epoch_batches(view, batch_size, 0, epoch)]
    assert all(len(b) <= batch_size for b in batches)


def uneven_data(count: int = 4000) -> TokenizedData:
    random = np.random.default_rng(0)
    steps = [random.integers(8, 13, n) for n in random.integers(3, 7, count)]
    segments = [[int(n), *row, 9] for n, row in zip(random.integers(100, 300, count), steps, strict=True)]
    return TokenizedData.from_lists([[5] * sum(row) for row in segments], segments)


@pytest.mark.parametrize("method", ["coconut", "without_thought"])
def test_batches_hold_similar_lengths_in_changing_order(method: str) -> None:
    data = uneven_data()
    stages = plan(method, Curriculum())
    view = EpochView(data, stages, stages.stages[2], SPECIAL, seed=0, epoch=0)
    batches = epoch_batches(view, 32, seed=0, epoch=0)
    cells = sum(next(micro_batches(view, batch, 32)).attention_mask.numel() for batch in batches)
    least = 0.98 if view.passes.max() == 1 else 0.93  # thoughts stand in one column: padding before and after them
    assert view.lengths.sum() > least * cells
    assert batches[0].tolist() != epoch_batches(view, 32, seed=0, epoch=1)[0].tolist()
    assert batches[0].tolist() != epoch_batches(view, 32, seed=1, epoch=0)[0].tolist()


MODES = ("short", "think", "latent_3")


def hybrid_view(modes: tuple[str, ...], epoch: int = 0) -> EpochView:
    stages = plan("hybrid_warmup", Curriculum(modes=list(modes)))
    return EpochView(uneven_data(), stages, stages.stages[0], SPECIAL, seed=0, epoch=epoch)


@pytest.mark.parametrize(("modes", "batch_size"), [(MODES[:2], 8), (MODES, 32), (MODES[:2], 128)])
def test_batch_modes_are_hypergeometric(modes: tuple[str, ...], batch_size: int) -> None:
    """Drawn without replacement, a mode's share of a batch has the deviation of the hypergeometric distribution."""
    shares, paddings = [], []
    for epoch in range(4):
        view = hybrid_view(modes, epoch)
        for batch in epoch_batches(view, batch_size, seed=0, epoch=epoch):
            if len(batch) == batch_size:
                shares.append([sum(view.form(i).mode == mode for i in batch) / batch_size for mode in modes])
            for part in micro_batches(view, batch, batch_size):
                paddings.append((int(part.attention_mask.sum()), part.attention_mask.numel()))
    found, chance, count = np.array(shares), 1 / len(modes), len(hybrid_view(modes))
    expected = np.sqrt(chance * (1 - chance) / batch_size * (count - batch_size) / (count - 1))
    assert np.allclose(found.std(0), expected, rtol=0.2), (found.std(0), expected)
    tokens, cells = np.array(paddings).sum(0)
    assert tokens > 0.95 * cells, "rows of one mode are padded to each other alone"


def test_hybrid_batches_hold_similar_lengths_per_mode() -> None:
    view = hybrid_view(MODES[:2])
    spread = [view.longest[batch[view.modes[batch] == 1]].std() for batch in epoch_batches(view, 32, seed=0, epoch=0)]
    assert np.mean(spread) < 0.1 * view.longest[view.modes == 1].std()


def steps_of(data: TokenizedData, index: int) -> list[list[int]]:
    bounds = data.bounds[data.first[index] : data.first[index + 1] - 1]
    return [data.tokens[start:stop].tolist() for start, stop in pairwise(bounds)]


@given(
    data_sets(),
    st.integers(1, 6),
    st.sampled_from([rule for rule in Spans if rule is not Spans.fixed]),
    st.integers(0, 5),
)
def test_spans_divide_the_chain(data: TokenizedData, num_thoughts: int, rule: Spans, epoch: int) -> None:
    """In order and without a gap; each thought has a token as long as there are enough."""
    stages = plan("mux", Curriculum(num_thoughts=num_thoughts), options={"spans": {"spans": rule.value}})
    view = EpochView(data, stages, stages.stages[0], SPECIAL, seed=0, epoch=epoch)
    for index in range(len(data)):
        spans = [span.tolist() for span in view.layouts(index)[0].spans]
        steps = steps_of(data, index)
        chain_tokens = list(chain(*steps))
        lengths = [len(span) for span in spans]
        assert len(spans) == num_thoughts
        assert list(chain(*spans)) == chain_tokens[: num_thoughts if rule is Spans.tokens else None]
        if rule is Spans.steps:
            assert spans[:-1] == [*steps[: num_thoughts - 1], *[[]] * (num_thoughts - 1 - len(steps))]
        else:
            assert lengths == sorted(lengths, key=lambda length: length == 0), "thoughts without a token come last"
            assert sum(length > 0 for length in lengths) == min(num_thoughts, len(chain_tokens))
        if rule is Spans.even:
            assert max(lengths) - min(lengths) <= 1
        assert spans == [span.tolist() for span in view.layouts(index)[0].spans]


def test_random_spans_take_every_division_equally_often() -> None:
    data = TokenizedData.from_lists([[*range(2, 8), 1]], [[1, 5, 1]])
    stages = plan("mux", Curriculum(num_thoughts=3))
    divisions = Counter(
        tuple(len(span) for span in EpochView(data, stages, stages.stages[0], SPECIAL, 0, epoch).layouts(0)[0].spans)
        for epoch in range(600)
    )
    assert sorted(divisions) == [(1, 1, 3), (1, 2, 2), (1, 3, 1), (2, 1, 2), (2, 2, 1), (3, 1, 1)]
    assert min(divisions.values()) > 70, "100 are expected of each, with a deviation of 9"


@given(data_sets(), plans())
def test_collate_aligns_thoughts_in_one_column(data: TokenizedData, stages: Plan) -> None:
    view = EpochView(data, stages, stages.stages[-1], SPECIAL, seed=0, epoch=0)
    items = [item for form in zip(*map(view.layouts, range(len(data))), strict=True) for item in form]
    batch = collate(items, SPECIAL, len(view.forms))
    firsts = set()
    for row, item in enumerate(items):
        real = batch.attention_mask[row].bool()
        assert batch.input_ids[row][real].tolist() == item.ids.tolist()
        labels = batch.labels[row][real]
        assert labels[item.num_prompt :].tolist() == item.ids[item.num_prompt :].tolist()
        before = [item.ids[i] if i == item.control else -100 for i in range(item.num_prompt)]
        assert labels[: item.num_prompt].tolist() == before
        assert (batch.labels[row][~real] == -100).all()
        if (item.ids == SPECIAL.latent).any():
            firsts.add(int((batch.input_ids[row] == SPECIAL.latent).nonzero()[0]))
    assert len(firsts) <= 1
    counts = [len(item.ids) - item.num_prompt + (item.control >= 0) for item in items]
    assert int((batch.labels != -100).sum()) == sum(counts)


def test_collated_batches_need_no_further_padding() -> None:
    data = uneven_data(32)
    stages = plan("coconut", Curriculum())
    view = EpochView(data, stages, stages.stages[3], SPECIAL, seed=0, epoch=0)
    batch = collate([view.layouts(i)[0] for i in range(32)], SPECIAL)
    passes = plan_passes(batch.input_ids == SPECIAL.latent, batch.attention_mask.bool())
    assert passes.source_BS.shape == batch.input_ids.shape
    assert len(passes.pass_bounds) == 3 + 2


@pytest.mark.parametrize("method", ["coconut", "hybrid_warmup"])
def test_loss_is_independent_of_the_micro_batch_size(method: str) -> None:
    lm = build("llama")
    segments = [[int(n), 3, 2, 4] for n in np.random.default_rng(0).integers(3, 20, 8)]
    data = TokenizedData.from_lists([np.arange(sum(row)) % 30 + 3 for row in segments], segments)
    if method == "hybrid_warmup":
        lm.add_modes(MODES, "random")
        stages = plan(method, Curriculum(modes=list(MODES)))
    else:
        stages = plan(
            method, Curriculum(max_stage=2, stage0_length=1, stage_length=1, total_length=3, mixing_probability=0.5)
        )
    view = EpochView(data, stages, stages.stages[-1], lm.special, seed=0, epoch=0)
    rows = [view.layouts(i)[0] for i in range(8)]

    def loss(size: int) -> torch.Tensor:
        parts = list(micro_batches(view, np.arange(8), size))
        sums = [lm(b.input_ids, b.attention_mask, labels=b.labels).loss_sum for b in parts]
        return sum(sums, torch.zeros(())) / sum(b.denominators[0] for b in parts)

    one = collate(rows, lm.special)
    whole = lm(one.input_ids, one.attention_mask, labels=one.labels).loss_sum / int((one.labels != -100).sum())
    for size in (1, 3, 4, 8):
        torch.testing.assert_close(loss(size), whole, rtol=1e-12, atol=0)


def test_too_long_examples_are_refused_or_skipped() -> None:
    data = uneven_data(50)
    stages = plan("coconut", Curriculum())

    def views(part: TokenizedData) -> list[EpochView]:
        still = replace(stages, mixing_probability=0.0)
        return [EpochView(part, still, stage, SPECIAL, 0, 0) for stage in stages.stages]

    longest = np.max([view.longest for view in views(data)], axis=0)
    with pytest.raises(
        ValueError, match=r"train.json: \d+ of 50 examples are longer .* context of 250 tokens: example"
    ):
        fit_context(views, data, 250, skip=False, name="train.json")
    kept, indices = fit_context(views, data, 250, skip=True, name="train.json")
    assert indices.tolist() == np.flatnonzero(longest <= 250).tolist()
    assert [kept.question(i).tolist() for i in range(len(kept))] == [data.question(i).tolist() for i in indices]
    assert len(fit_context(views, data, 1000, skip=False, name="train.json")[0]) == 50
    with pytest.raises(ValueError, match="no example fits"):
        fit_context(views, data, 5, skip=True, name="train.json")
