"""Thoughts merged from the chain: what is trained equals a slow reading, and generation ends itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import build, in_float64, padded, rows_of
from torch import Tensor

from coconut.completions.completion import completion_from_ids
from coconut.completions.noisy_thoughts import refuse_noise
from coconut.data.batching import Batch, micro_batches
from coconut.data.examples import Example
from coconut.data.sequences import EpochView, Layout, merged_lengths, stage_variants
from coconut.data.tokenization import TokenizedData, tokenize
from coconut.engine.base import TermSums
from coconut.engine.world import World
from coconut.generation.thoughts import think
from coconut.methods import (
    Content,
    Curriculum,
    Plan,
    Pooling,
    Projector,
    PromptFormat,
    Reasoning,
    Spans,
    Update,
    plan,
)
from coconut.models.latent_lm import LatentLM
from coconut.objectives.training_model import TrainingModel

FORMAT = PromptFormat("{}", "{} a", "b {}")
CURRICULUM = Curriculum(total_length=4)
EVEN = {"spans": "even"}


def examples(count: int) -> list[Example]:
    """Chains of no to four steps, with words that the small models' tokenizer has."""
    random = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(map(str, random.integers(0, 40, random.integers(least, most))))

    return [Example(words(2, 9), tuple(words(1, 4) for _ in range(k % 5)), words(1, 3)) for k in range(count)]


def planned(method: str, slot: dict[str, Any] | None = None, **weights: float) -> Plan:
    return plan(method, CURRICULUM, weights, {"width": 12, **(slot or {})})


def trained(
    method: str, family: str = "gpt2", slot: dict[str, Any] | None = None, **weights: float
) -> tuple[TrainingModel, Plan]:
    its = planned(method, slot, **weights)
    lm = build(family, torch.float32, slot=its.stages[0].form.slot, num_thoughts=9, max_new_tokens=4, format=FORMAT)
    lm.add_rates(its.stages[0].form.slot.max_group, "random")
    module = TrainingModel(lm, its).double().train()
    return (in_float64(module) if family != "gpt2" else module), its  # pyright: ignore


def view_of(lm: LatentLM, its: Plan, count: int = 12, epoch: int = 0) -> EpochView:
    return EpochView(tokenize(examples(count), lm.tokenizer, FORMAT), its, its.stages[0], lm.special, 0, epoch)


def update(module: TrainingModel, parts: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    terms = TermSums(module.loss, parts, World())
    given = () if len(parts) == 1 or not module.measured else (sum(module(part, measure=True) for part in parts),)
    for part in parts:
        terms.add(module(part, *given)).backward()
    return terms.means(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the slow reading: one example at a time, its groups taken from its text --------------------------------


def chain_of(data: TokenizedData, index: int) -> list[int]:
    first, last = data.first[index], data.first[index + 1]
    return data.tokens[data.bounds[first] : data.bounds[last - 2]].tolist()


def slow_means(module: TrainingModel, view: EpochView) -> dict[str, Tensor]:
    lm, form = module.lm, view.forms[0].forms[0]
    embeddings: Any = lm.base.get_input_embeddings()
    table, eot = embeddings.weight, lm.special.eot
    sums: dict[str, list[Tensor]] = {"answer": [], "drawn": [], "latent": [], "words": []}
    for index in range(len(view)):
        item, chain, size = view.layouts(index)[0], chain_of(view.data, index), int(view.groups[index])
        groups = [chain[i : i + size] for i in range(0, len(chain), size)]
        merged: list[Any] = [
            sum(table[t] for t in g) / (len(g) ** 0.5 if form.slot.pooling == "sqrt" else len(g)) for g in groups
        ]
        question = view.data.question(index).tolist()
        begin = lm.special.rates[size - 1] if form.slot.max_group else lm.special.bot
        answer = item.ids[item.num_prompt :].tolist()
        inputs = [*table[[*question, begin]], *(m.detach() for m in merged), table[eot], *table[answer]]  # pyright: ignore
        states = lm.base.base_model(inputs_embeds=torch.stack(inputs)[None]).last_hidden_state[0]
        head: Any = lm.base.get_output_embeddings()
        log_probs = head(states).log_softmax(-1)
        start = len(inputs) - len(answer)
        sums["answer"] += [-log_probs[start - 1 + i, token] for i, token in enumerate(answer)]
        before = states[len(question) : len(question) + len(groups) + 1]
        targets = [*(m.detach() for m in merged), table[eot].detach()]
        for number, (state, target) in enumerate(zip(before, targets, strict=True)):
            group = groups[number] if number < len(groups) else [eot]
            if view.terms[1].name == "random_token":
                word = int(item.drawn[number])
                assert word in group
                sums["drawn"].append(-head(state).log_softmax(-1)[word])
                mean, log_deviation = slow_gaussian(lm.feedback.projector, state)
                scale = lm.feedback.projector.scale
                sums["latent"].append(((mean - target / scale) ** 2 + (log_deviation.exp()) ** 2).mean())
            else:
                if number < len(groups) and len(group) < size:
                    group = [*group, eot]
                layers = lm.feedback.projector.layers
                hidden = F.gelu(state @ layers[0].weight.T + layers[0].bias) @ layers[2].weight.T + layers[2].bias
                for place, word in enumerate(group):
                    sums["words"].append(-head(hidden[place * 32 : place * 32 + 32]).log_softmax(-1)[word])
    answer_and_drawn = len(sums["answer"]) + len(sums["drawn"])
    if sums["drawn"]:
        return {
            "tokens": torch.stack(sums["answer"]).sum() / answer_and_drawn,
            "random_token": torch.stack(sums["drawn"]).sum() / answer_and_drawn,
            "latent": torch.stack(sums["latent"]).mean(),
        }
    return {"tokens": torch.stack(sums["answer"]).mean(), "multi_token": torch.stack(sums["words"]).mean()}


def slow_gaussian(head: Any, state: Tensor) -> tuple[Tensor, Tensor]:
    trunk = head.trunk
    hidden = F.gelu(state @ trunk[0].weight.T + trunk[0].bias) @ trunk[2].weight.T + trunk[2].bias
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt() * trunk[3].weight + trunk[3].bias
    return tuple(hidden @ part.weight.T + part.bias for part in (head.mean, head.log_deviation))


CASES = [
    ("colar", "gpt2", {}), ("colar", "llama", {"max_group": 0, "group": 3}), ("colar", "gpt2", {"scale": 0.3}),
    ("c_mtp", "gpt2", {"group": 3}), ("c_mtp", "llama", {"pooling": Pooling.sqrt}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "family", "slot"), CASES)
def test_one_pass_equals_a_slow_reading_for_any_split(method: str, family: str, slot: dict[str, Any]) -> None:
    without_teacher = {} if method == "colar" else {"teacher": 0.0, "states": 0.0}
    module, its = trained(method, family, slot, **without_teacher)
    view = view_of(module.lm, its)
    assert set(view.passes) == {1}
    slow = slow_means(module, view)
    names = [term.name for term in module.terms]
    means, expected = update(module, list(micro_batches(view, np.arange(12), 12)))
    for name, value in slow.items():
        torch.testing.assert_close(means[names.index(name)], value.detach(), rtol=1e-11, atol=0)
    module.zero_grad()
    torch.stack([slow[name] for name in names]).sum().backward()
    for name, weight in module.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(expected[name], weight.grad, rtol=1e-8, atol=1e-12)
    alike_in_any_split(module, view)


def alike_in_any_split(module: TrainingModel, view: EpochView) -> None:
    means, expected = update(module, list(micro_batches(view, np.arange(12), 12)))
    for size in (1, 5):
        same, gradients = update(module, list(micro_batches(view, np.arange(12), size)))
        torch.testing.assert_close(same, means, rtol=1e-11, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-12)


def test_a_teacher_beside_merged_thoughts_is_alike_in_any_split() -> None:
    module, its = trained("c_mtp")
    assert [term.name for term in module.terms] == ["tokens", "multi_token", "teacher", "states"]
    alike_in_any_split(module, view_of(module.lm, its))


def test_the_latent_term_is_the_mean_over_samples() -> None:
    module, its = trained("colar")
    (batch,) = micro_batches(view_of(module.lm, its), np.arange(12), 12)
    with torch.no_grad():
        output = module._run(batch)
        value = module.objectives["latent"](module.lm, output, batch, None)
        is_group = (batch.spans_RGS >= 0).any(-1)
        mean, log_deviation = module.lm.feedback.projector(output.before_thoughts[-1][is_group])  # pyright: ignore
        target = output.thoughts[is_group] / module.lm.feedback.projector.scale  # pyright: ignore
        drawn = [
            (mean + log_deviation.exp() * torch.randn_like(mean) - target).square().mean(1).sum() for _ in range(2000)
        ]
    assert float(value) == pytest.approx(float(torch.stack(drawn).mean()), rel=5e-3)


def test_groups_of_one_token_are_the_words_themselves() -> None:
    """The inputs are the chain's embeddings, so that predictions are those of the written chain with the markers."""
    for method in ("colar", "c_mtp"):
        module, its = trained(method, slot={"group": 1, "max_group": 0})
        lm, view = module.lm, view_of(module.lm, its)
        for index in range(len(view)):
            item, chain = view.layouts(index)[0], chain_of(view.data, index)
            written = item.ids.copy()
            written[item.slot_start : item.slot_start + len(chain)] = chain
            row = torch.from_numpy(item.ids.astype(np.int64))[None]
            spans = torch.tensor([[[token] for token in chain]], dtype=torch.long).view(1, -1, 1)
            ours = lm(row, thoughts=lm.merged_thoughts(spans), return_logits=True).logits
            theirs = lm.base(torch.from_numpy(written.astype(np.int64))[None]).logits
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
            assert [*map(int, item.drawn)] == [*chain, lm.special.eot]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_given_thoughts_are_fed_on_both_paths_and_with_padding_on_either_side(family: str) -> None:
    lm = build(family)
    generator = torch.Generator().manual_seed(0)
    rows = [[5, 6, lm.latent_id, lm.latent_id, 7], [8, lm.latent_id, 9, 10, 11, 12], [4, 5]]
    thoughts = torch.randn(3, 2, 32, dtype=torch.float64, generator=generator)
    alone = []
    for row, own in zip(rows, thoughts, strict=True):
        embeds, left = lm.embed(torch.tensor(row)).clone(), iter(own)
        for place, token in enumerate(row):
            if token == lm.latent_id:
                embeds[place] = next(left)
        alone.append(lm.base(inputs_embeds=embeds[None]).logits[0])
    for right in (False, True):
        ids, mask = padded(rows, right)
        for options in ({}, {"use_cache": False}, {"min_passes": 3}):
            logits = lm(ids, mask, thoughts=thoughts, return_logits=True, **options).logits
            for row, expected in enumerate(alone):
                torch.testing.assert_close(logits[row][mask[row].bool()], expected, rtol=1e-9, atol=1e-10)
        moved = lm(ids, mask, thoughts=thoughts - 1, thought_offsets=torch.ones_like(thoughts), return_logits=True)
        torch.testing.assert_close(moved.logits[mask.bool()], torch.cat(alone), rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="with 3 rows of up to 2 thoughts"):
        lm(ids, mask, thoughts=thoughts[:, :1])


def generating(method: str, family: str = "gpt2") -> LatentLM:
    """A model that ends its thoughts after different numbers of them."""
    lm = trained(method, family)[0].lm.eval()
    head: Any = lm.base.get_output_embeddings()
    with torch.no_grad():
        head.weight[lm.special.eot] = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    return lm


QUESTIONS = [[k, *range(3, 3 + k % 4)] for k in range(5, 35)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["colar", "c_mtp"])
def test_thoughts_end_themselves_alone_as_in_a_batch(method: str, family: str) -> None:
    lm = generating(method, family)
    ids, mask = padded(QUESTIONS)
    together = lm.generate(ids, mask)
    assert len(set(together.num_thoughts.tolist())) > 2, "rows stop at different times"
    for row, question in enumerate(QUESTIONS):
        fed, count = slow_thoughts(lm, question), int(together.num_thoughts[row])
        assert count == len(fed)
        torch.testing.assert_close(
            together.thoughts[row, :count].double(), torch.stack(fed) if fed else torch.zeros(0, 32).double(),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        assert not together.thoughts[row, count:].any()
        if row % 4:
            continue
        alone = lm.generate(torch.tensor([question]))
        assert rows_of(alone)[0] == rows_of(together)[row]
        assert (
            int(alone.passes[0])
            == int(together.passes[row])
            == int(together.lengths[row]) + (not together.truncated[row]) + 1 + count
        )


def slow_thoughts(lm: LatentLM, question: list[int]) -> list[Tensor]:
    """Everything run again for every thought."""
    begin = lm.special.rates[lm.reasoning.slot.group - 1] if lm.special.rates else lm.special.bot
    inputs, fed = [*lm.embed(torch.tensor([*question, begin]))], []
    others = [token for token in lm.special.added if token != lm.special.eot]

    def likeliest(state: Tensor) -> int:
        logits = lm.base.get_output_embeddings()(state).clone()  # pyright: ignore
        logits[others] = -torch.inf
        return int(logits.argmax())

    while len(fed) < lm.reasoning.num_thoughts:
        state = lm.base.base_model(inputs_embeds=torch.stack(inputs)[None]).last_hidden_state[0, -1]
        if lm.reasoning.method == "coconut" and hasattr(lm.feedback.projector, "layers"):
            words = [likeliest(part) for part in lm.feedback.projector(state)]
            words = words[: words.index(lm.special.eot)] if lm.special.eot in words else words
            if not words:
                break
            thought = torch.stack([lm.embed(torch.tensor(word)) for word in words]).mean(0)
        else:
            if likeliest(state) == lm.special.eot:
                break
            thought = slow_gaussian(lm.feedback.projector, state)[0] * lm.feedback.projector.scale
        fed.append(thought.detach())
        inputs.append(thought)
    return fed


def test_a_limit_of_thoughts_and_given_ones_are_kept() -> None:
    lm = generating("colar")
    ids, mask = padded(QUESTIONS)
    free, limited = lm.generate(ids, mask), lm.generate(ids, mask, num_thoughts=2)
    assert limited.num_thoughts.tolist() == free.num_thoughts.clamp(max=2).tolist()
    given = torch.randn(len(QUESTIONS), 3, 32)
    assert lm.generate(ids, mask, thoughts=given).num_thoughts.tolist() == [3] * len(QUESTIONS)
    state = think(lm, ids, mask, 2, thoughts=given[:, :2])
    assert state.counts.tolist() == [2] * len(QUESTIONS)
    with pytest.raises(ValueError, match="ends its thoughts itself"):
        lm.generate(ids, mask, stop=lambda thoughts: thoughts[:, 0] > 0)


def test_what_needs_a_fixed_number_of_thoughts_is_refused() -> None:
    lm = generating("colar")
    with pytest.raises(ValueError, match=r"thought_noise=0\.1 is not for .*: it ends its thoughts itself"):
        refuse_noise(lm.reasoning, 0.1)
    with pytest.raises(ValueError, match="each answer needs the number of its thoughts"):
        completion_from_ids(lm, QUESTIONS[0], [7], text="")
    assert completion_from_ids(lm, QUESTIONS[0], [7], text="", num_thoughts=2).num_thoughts == 2
    with pytest.raises(ValueError, match="predicts its thoughts by a head"):
        lm.add_modes(["think", "latent_2"])


def test_the_rate_is_said_in_the_prompt() -> None:
    lm = generating("colar")
    assert lm.reasoning.slot.group == 2
    faster = lm.reasoning.at_rate(5)
    assert (faster.slot.group, faster.num_thoughts) == (5, 4)
    for group in (1, 5):
        lm.reasoning = replace(lm.reasoning.at_rate(group), num_thoughts=9)
        count = int(lm.generate(torch.tensor([QUESTIONS[3]])).num_thoughts[0])
        assert count == len(slow_thoughts(lm, QUESTIONS[3]))
    with pytest.raises(ValueError, match=r"rate=6 .* coconut was trained with rates 1 to 5\. Take one"):
        lm.reasoning.at_rate(6)


def test_rates_and_words_are_drawn_by_seed_epoch_and_index() -> None:
    module, its = trained("colar")
    views = [view_of(module.lm, its, 400, epoch) for epoch in (0, 0, 1)]
    groups = [view.groups.tolist() for view in views]
    assert groups[0] == groups[1] != groups[2]
    assert np.bincount(groups[0], minlength=6)[1:] == pytest.approx(80, abs=30)

    def layouts(view: EpochView) -> list[Layout]:
        return [view.layouts(i)[0] for i in range(40)]

    drawn = [[item.drawn.tolist() for item in layouts(view)] for view in views]
    assert drawn[0] == drawn[1] != drawn[2]
    for item, index in zip(layouts(views[0]), range(40), strict=True):
        size, chain = groups[0][index], chain_of(views[0].data, index)
        assert item.ids[item.slot_start - 1] == module.lm.special.rates[size - 1]
        assert [t for span in item.spans for t in span if t != module.lm.special.eot] == chain
        assert [len(span) for span in item.spans[:-2]] == [size] * (len(item.spans) - 2)
        assert len(item.ids) == views[0].lengths[0, index]
        assert item.ids[item.thought_end] == module.lm.special.eot == item.spans[-1]
    longest = max(view.longest.max() for view in views)
    variants = stage_variants(its)
    assert longest <= max(EpochView(views[0].data, its, s, module.lm.special, 0, 0).longest.max() for s in variants)
    assert merged_lengths(views[0].data, 1).tolist() == [len(chain_of(views[0].data, i)) for i in range(400)]


@pytest.mark.parametrize("method", ["colar", "c_mtp"])
def test_saved_and_loaded_it_answers_alike(method: str, tmp_path: Path) -> None:
    lm = generating(method).float()
    lm.save_pretrained(tmp_path)
    again = LatentLM.from_pretrained(tmp_path).eval()
    assert again.special == lm.special
    assert again.feedback.slot == lm.feedback.slot
    ids, mask = padded(QUESTIONS)
    ours, theirs = lm.generate(ids, mask), again.generate(ids, mask)
    assert torch.equal(ours.thoughts, theirs.thoughts)
    assert ours.texts == theirs.texts


def test_the_scale_is_the_tables_deviation_unless_given() -> None:
    module, its = trained("colar")
    table: Any = module.lm.base.get_input_embeddings()
    head: Any = module.lm.new_feedback(its.stages[0].form.slot).projector
    assert float(head.scale) == pytest.approx(table.weight.detach().std().item())
    head = module.lm.new_feedback(replace(its.stages[0].form.slot, scale=0.12)).projector
    assert float(head.scale) == pytest.approx(0.12)


@pytest.mark.parametrize(
    ("method", "slot", "options", "message"),
    [
        ("coconut", {"update": Update.teacher_forced}, {}, "need model.update=teacher_forced, a head"),
        ("colar", {"update": Update.sequential}, {}, "Take method=colar or c_mtp"),
        ("colar", {"group": 6}, {}, "group is 6; it must be between 1 and model.max_group=5"),
        ("c_mtp", {"max_group": 3}, {}, "the head multi_token predicts groups of one"),
        ("c_mtp", {"scale": 0.1}, {}, "thought_scale=0.1 is for the head gaussian"),
        ("colar", {"scale": -0.1}, {}, "thought_scale is -0.1"),
        ("coconut", {"pooling": Pooling.mean}, {}, "are for thoughts that are merged from the chain"),
        ("colar", {"content": Content.mixture}, {}, "is for thoughts that are fed back"),
        ("codi", {"max_group": 3}, {}, "are for thoughts that are merged from the chain"),
        ("colar", {}, {"latent": EVEN, "random_token": EVEN}, "does not fit colar, which needs fixed"),
        ("mux", {}, {"spans": {"spans": "fixed"}}, "spans=fixed does not fit mux"),
        ("colar", {"projector": Projector.multi_token, "max_group": 0}, {}, "No term of colar trains its head"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(method: str, slot: dict[str, Any], options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(method, Curriculum(num_thoughts=3), {}, slot, options)


def test_reasoning_knows_how_thoughts_are_merged() -> None:
    its = planned("colar")
    reasoning = Reasoning.at(its, its.stages[0])
    assert Reasoning.from_dict(reasoning.as_dict()) == reasoning
    assert its.terms[1].spans is Spans.fixed
    assert its.stages[0].describe() == "a thought for every 1 to 5 tokens of the chain, answer only"
