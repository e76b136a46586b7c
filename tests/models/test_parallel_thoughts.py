"""Thoughts that are updated all at once: Jacobi iterations (PCCoT) and loops (LOTUS)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.family_table import FAMILIES, Family, base_of, new_tokenizer
from helpers.models import build, gradients, relative, same_step, summed_step
from torch import Tensor

from coconut import LatentLM
from coconut.config import MECHANISMS, EngineConfig, ModelConfig
from coconut.data.batching import IGNORED
from coconut.generation.generate import logit_lens
from coconut.methods import PAUSES, Curriculum, Projector, Reasoning, Slot, Source, Update, plan
from coconut.models.passes import Reads
from coconut.rewards.thoughts import thought_means
from coconut.training.model_setup import apply_engine_options

COUNTS, BEFORE, AFTER = (4, 2, 0, 3), (5, 9, 7, 3), (3, 5, 4, 6)  # of each row: thoughts, tokens before and after them
CASES = [
    ("gpt2", Slot(Source.thought, update=Update.jacobi, iterations=2)),
    ("llama", Slot(Source.thought, Projector.mlp_ln, width=12, update=Update.jacobi, iterations=3)),
    ("gpt2", Slot(Source.thought, Projector.mlp_ln, update=Update.loop, iterations=1)),
    ("qwen3", Slot(Source.thought, update=Update.loop, iterations=3)),
    ("gpt2", Slot(Source.thought, update=Update.loop, iterations=1, iterations_per=2)),
]


def rows_of(lm: LatentLM) -> list[tuple[list[int], int]]:
    """Token ids of each row, and how many of the last ones are targets."""
    random = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        return torch.randint(5, 40, (count,), generator=random).tolist()

    special = lm.special
    return [
        ([*words(before), special.bot, *[lm.latent_id] * count, special.eot, *words(after)], after)
        for count, before, after in zip(COUNTS, BEFORE, AFTER, strict=True)
    ]


def batch_of(rows: list[tuple[list[int], int]], left: bool = True) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    batch = {name: torch.full((len(rows), width), value) for name, value in
             (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))}  # fmt: skip
    for r, (ids, targets) in enumerate(rows):
        start = width - len(ids) if left else 0
        stop = start + len(ids)
        batch["input_ids"][r, start:stop] = torch.tensor(ids)
        batch["attention_mask"][r, start:stop] = 1
        batch["labels"][r, stop - targets : stop] = torch.tensor(ids[-targets:])
    return batch


def questions_of(lm: LatentLM) -> tuple[Tensor, Tensor]:
    batch = batch_of([(ids[: ids.index(lm.special.bot)], 1) for ids, _ in rows_of(lm)])
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize(("family", "slot"), CASES)
def test_both_paths_equal_a_flat_reading(family: str, slot: Slot) -> None:
    """The flat reading takes one row at a time, without padding, cache or plan."""
    lm = build(family, slot=slot)
    rows = rows_of(lm)

    def flat(ids: list[int], targets: int) -> Tensor:
        place, K = ids.index(lm.latent_id) if lm.latent_id in ids else 0, ids.count(lm.latent_id)
        embeds_TD = lm.base.get_input_embeddings()(torch.tensor(ids))
        tokens_KD = thoughts_KD = embeds_TD[place : place + K]

        def states(thoughts_KD: Tensor) -> Tensor:
            inputs_TD = torch.cat([embeds_TD[:place], thoughts_KD, embeds_TD[place + K :]])
            return lm.base.base_model(inputs_embeds=inputs_TD[None]).last_hidden_state[0]

        for _ in range(slot.iterations * (math.ceil(K / slot.iterations_per) if slot.iterations_per else 1)):
            states_TD = states(thoughts_KD)
            if slot.update is Update.loop:
                thoughts_KD = tokens_KD + lm.feedback.projector(states_TD[place : place + K])
            else:
                thoughts_KD = lm.feedback.projector(states_TD[place - 1 : place + K - 1]) if K else thoughts_KD
        logits_TV = lm.logits(states(thoughts_KD))
        return F.cross_entropy(logits_TV[-targets - 1 : -1], torch.tensor(ids[-targets:]), reduction="sum")

    lm.zero_grad(set_to_none=True)
    loss = torch.stack([flat(*row) for row in rows]).sum()
    loss.backward()
    expected = loss.detach(), gradients(lm)
    for left in (True, False):
        assert same_step(summed_step(lm, batch_of(rows, left)), expected)
        assert same_step(summed_step(lm, batch_of(rows, left), use_cache=False), expected)
    lm.acceleration.mechanisms = frozenset()
    assert same_step(summed_step(lm, batch_of(rows)), expected)
    lm.acceleration.mechanisms = frozenset(MECHANISMS)
    lm.acceleration.activation_checkpointing = True
    assert same_step(summed_step(lm.train(), batch_of(rows)), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_both_paths_are_equal_in_every_family(family: Family) -> None:
    torch.manual_seed(0)
    base = base_of(family).to(torch.float64 if family.float64 else torch.float32)
    reasoning = Reasoning(slot=Slot(Source.thought, Projector.mlp_ln, update=Update.jacobi, iterations=2))
    lm = LatentLM.from_base(base, new_tokenizer(), reasoning=reasoning).to(base.dtype).eval()
    batch = batch_of(rows_of(lm))
    (loss, found), (other_loss, others) = summed_step(lm, batch), summed_step(lm, batch, use_cache=False)
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    assert relative(found, others) < 1e-4


@pytest.mark.parametrize("projector", [Projector.none, Projector.mlp_ln])
def test_as_many_iterations_as_thoughts_are_sequential_thoughts(projector: Projector) -> None:
    """In loss, gradients, answers and thoughts. PCCoT, arXiv 2506.18582, section 3."""
    parallel = build("gpt2", slot=Slot(Source.thought, projector, update=Update.jacobi, iterations=4), num_thoughts=4)
    sequential = build("gpt2", slot=Slot(Source.thought, projector), num_thoughts=4)
    batch = batch_of(rows_of(parallel))
    assert same_step(summed_step(parallel, batch), summed_step(sequential, batch))
    questions = questions_of(parallel)
    answers = [lm.generate(*questions, max_new_tokens=8) for lm in (parallel, sequential)]
    assert answers[0].texts == answers[1].texts
    assert torch.allclose(torch.stack(list(answers[0].thoughts)), torch.stack(list(answers[1].thoughts)), atol=1e-6)
    one_fewer = build("gpt2", slot=replace(parallel.reasoning.slot, iterations=3), num_thoughts=4)
    assert not same_step(summed_step(one_fewer, batch), summed_step(sequential, batch))


@pytest.mark.parametrize("update", [Update.jacobi, Update.loop])
def test_without_iterations_they_are_pauses(update: Update) -> None:
    lm = build("llama", slot=Slot(Source.thought, update=update))
    pauses = build("llama", slot=PAUSES)
    with torch.no_grad():
        for model in (lm, pauses):
            table: Any = model.base.get_input_embeddings().weight
            table[model.special.pause] = table[model.latent_id]
    batch = batch_of(rows_of(lm))
    paused = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] != lm.latent_id, lm.special.pause)}
    one, other = summed_step(lm, batch), summed_step(pauses, paused)
    for found in (one[1], other[1]):  # the rows of the two tokens exchange their gradients
        name = next(name for name in found if "embed_tokens" in name)
        found[name][lm.special.pause] = found[name][[lm.special.pause, lm.latent_id]].sum(0)
        found[name][lm.latent_id] = 0
    assert same_step(one, other)


@pytest.mark.parametrize("slot", [CASES[1][1], CASES[4][1]])
def test_a_row_alone_gives_the_same_and_more_passes_change_nothing(slot: Slot) -> None:
    lm = build("gpt2", slot=slot, num_thoughts=3)
    rows = rows_of(lm)
    whole = summed_step(lm, batch_of(rows))
    parts = [
        summed_step(lm, batch_of([row]), min_passes=passes) for row, passes in zip(rows, (1, 5, 5, 1), strict=True)
    ]
    summed = {
        name: torch.stack([part.get(name, torch.zeros_like(total)) for _, part in parts]).sum(0)
        for name, total in whole[1].items()
    }
    assert same_step(whole, (torch.stack([loss for loss, _ in parts]).sum(), summed))
    ids_BT, mask_BT = questions_of(lm)
    together = lm.generate(ids_BT, mask_BT, max_new_tokens=6)
    for row, (ids_T, mask_T) in enumerate(zip(ids_BT, mask_BT, strict=True)):
        assert lm.generate(ids_T[None, mask_T.bool()], max_new_tokens=6).texts[0] == together.texts[row]


def test_generation_feeds_the_thoughts_of_the_forward_pass() -> None:
    lm = build("llama", slot=CASES[2][1], num_thoughts=3)
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    fed = torch.stack(list(lm.generate(ids, max_new_tokens=2).thoughts))
    slot = torch.tensor([lm.special.bot, *[lm.latent_id] * 3, lm.special.eot]).expand(2, -1)
    whole, columns = torch.cat([ids, slot], dim=1), torch.arange(5, 8).expand(2, -1)
    output = lm(whole, labels=whole, return_target_logits=True, reads=Reads(thoughts_BK=columns))
    assert output.thoughts is not None
    assert torch.allclose(output.thoughts.float(), fed, atol=1e-6)


def test_the_lens_reads_the_states_of_loops_without_the_added_embedding() -> None:
    lm = build("gpt2", slot=Slot(Source.thought, update=Update.loop, iterations=2))
    ids = torch.tensor([[7, 8, lm.special.bot, *[lm.latent_id] * 3, lm.special.eot]])
    reads = Reads(thoughts_BK=torch.tensor([[3, 4, 5]]), before_thoughts=True)
    output = lm(ids, labels=ids, return_target_logits=True, reads=reads)
    assert output.thoughts is not None
    assert output.before_thoughts is not None
    states_KD = output.before_thoughts[-2, 0, 1:]  # before the last two thoughts: of the first two
    likeliest = lm.logits(states_KD.detach()).detach().softmax(-1).max(-1)
    for found, value, token in zip(logit_lens(lm, output.thoughts[0, :2]), *likeliest, strict=True):
        assert found[0] == (lm.tokenizer.decode([int(token)]), pytest.approx(float(value), rel=1e-4))


def test_what_cannot_be_is_refused() -> None:
    lm = build("gpt2", slot=CASES[0][1], num_thoughts=2)
    apart = torch.tensor([[5, lm.latent_id, 6, lm.latent_id, 7]])
    with pytest.raises(ValueError, match="must stand together"):
        lm(apart, labels=apart)
    with pytest.raises(ValueError, match="records passes with one thought each"):
        apply_engine_options(lm, EngineConfig(cuda_graphs=True))
    with pytest.raises(ValueError, match="no probability of their own"):
        thought_means(lm, [[5, 6]], torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="stopping early saves nothing"):
        lm.generate(torch.tensor([[5, 6]]), stop=lambda thoughts: torch.ones(len(thoughts), dtype=torch.bool))
    with pytest.raises(ValueError, match="iterations is -1; it must be at least 0"):
        ModelConfig(base="gpt2", iterations=-1)
    with pytest.raises(ValueError, match=r"computed one after the other\. Leave it out"):
        plan("coconut", Curriculum(), slot={"iterations": 3})
