"""Thoughts made of words: mixtures of input embeddings (Soft Thinking), and sums with a hidden state (LT-Tuning)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.family_table import FAMILIES, Family, base_of, new_tokenizer
from helpers.models import (
    QUESTIONS,
    build,
    by_recomputation,
    gradients,
    mixed_batch,
    padded,
    relative,
    rows_of,
    same_step,
    summed_step,
)
from torch import Tensor

from coconut import LatentLM
from coconut.analysis.context import Context
from coconut.config import MECHANISMS, EngineConfig, ModelConfig
from coconut.generate import run as generate
from coconut.generation.config import GenerateConfig
from coconut.generation.generate import logit_lens
from coconut.methods import (
    PAUSES,
    THOUGHTS,
    Content,
    Curriculum,
    Projector,
    Reasoning,
    Slot,
    Source,
    Update,
    get_method,
    plan,
)
from coconut.models.feedback import mixture
from coconut.models.passes import Reads
from coconut.objectives.training_model import TrainingModel
from coconut.rewards.thoughts import thought_means
from coconut.training.model_setup import apply_engine_options

MIXTURE, FUSED = (Slot(Source.thought, content=content) for content in (Content.mixture, Content.fused))
SLOTS = [
    replace(MIXTURE, top_k=3, temperature=0.6),
    MIXTURE,
    replace(FUSED, layer=1, alpha=0.3, temperature=2.0),
    replace(FUSED, layer=0, top_k=5, projector=Projector.mlp_ln, width=12),
    replace(FUSED, layer=1, top_k=4, update=Update.jacobi, iterations=2),
    replace(MIXTURE, update=Update.loop, iterations=2),
]


def batch_for(lm: LatentLM) -> dict[str, Tensor]:
    """Rows with different numbers of thoughts, which stand together, and padding on both sides."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 35, (5, 14), generator=random)
    mask = torch.ones_like(ids)
    ids[0, 5:8] = ids[1, 7] = ids[2, 4:6] = ids[4, 9:12] = lm.latent_id
    mask[1, :3] = mask[2, 11:] = mask[3, :2] = mask[4, 13:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where((ids != lm.latent_id) & mask.bool(), ids, -100),
    }


def slow_thought(lm: LatentLM, layers: list[Tensor]) -> Tensor:
    """The thought after a position, from the states (D,) of all layers there; word by word."""
    slot = lm.feedback.slot
    logits_V = lm.logits(layers[-1])
    words = sorted(set(range(len(logits_V))) - set(lm.special.added), key=lambda word: -logits_V[word].item())
    words = words[: slot.top_k or None]
    odds = [(logits_V[word] / slot.temperature).exp() for word in words]
    embed = lm.base.get_input_embeddings()
    total = torch.stack(odds).sum()
    mixed = torch.stack([odd / total * embed(torch.tensor(word)) for odd, word in zip(odds, words, strict=True)])
    alpha = slot.alpha if slot.content is Content.fused else 0.0
    return lm.feedback.projector(alpha * layers[slot.layer] + (1 - alpha) * mixed.sum(0))


def slow_loss(lm: LatentLM, ids: list[int], labels: list[int]) -> Tensor:
    """One row without padding, cache or plan."""
    embeds = list(lm.base.get_input_embeddings()(torch.tensor(ids)))
    tokens, slot = list(embeds), lm.feedback.slot
    thoughts = [t for t, token in enumerate(ids) if token == lm.latent_id]

    def states() -> list[Tensor]:
        out = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True)
        return [layer[0] for layer in out.hidden_states]

    for updated in [thoughts] * slot.iterations if slot.in_parallel else [[t] for t in thoughts]:
        layers = states()
        loop = slot.update is Update.loop
        for t in updated:
            made = slow_thought(lm, [layer[t if loop else t - 1] for layer in layers])
            embeds[t] = made + tokens[t] if loop else made
    logits_TV = lm.logits(states()[-1])
    return F.cross_entropy(logits_TV[:-1], torch.tensor(labels[1:]), reduction="sum")


@pytest.mark.parametrize("slot", SLOTS)
def test_both_paths_equal_a_flat_reading(slot: Slot, family: str) -> None:
    lm = build(family, slot=slot)
    batch = batch_for(lm)
    lm.zero_grad(set_to_none=True)
    rows = [(batch["input_ids"][r][keep].tolist(), batch["labels"][r][keep].tolist())
            for r, keep in enumerate(batch["attention_mask"].bool())]  # fmt: skip
    loss = torch.stack([slow_loss(lm, *row) for row in rows]).sum()
    loss.backward()
    expected = loss.detach(), gradients(lm)
    assert same_step(summed_step(lm, batch), expected)
    assert same_step(summed_step(lm, batch, use_cache=False), expected)
    assert same_step(summed_step(lm, batch, min_passes=6), expected)
    lm.acceleration.mechanisms = frozenset()
    assert same_step(summed_step(lm, batch), expected)
    lm.acceleration.mechanisms = frozenset(MECHANISMS)
    lm.acceleration.activation_checkpointing = True
    assert same_step(summed_step(lm.train(), batch), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_both_paths_are_equal_in_every_family(family: Family) -> None:
    torch.manual_seed(0)
    base = base_of(family).to(torch.float64 if family.float64 else torch.float32)
    lm = LatentLM.from_base(base, new_tokenizer(), reasoning=Reasoning(slot=replace(FUSED, top_k=4, layer=-1)))
    lm.to(base.dtype).eval()
    batch = batch_for(lm)
    (loss, found), (other_loss, others) = summed_step(lm, batch), summed_step(lm, batch, use_cache=False)
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    assert relative(found, others) < 1e-4
    [[thought_D]] = lm.generate(torch.tensor([[5, 6, 7]]), num_thoughts=1, max_new_tokens=1).thoughts
    assert thought_D.isfinite().all()


def test_one_word_is_the_embedding_that_a_model_is_fed() -> None:
    """Also in families that scale the embeddings of their words in the table's own module."""
    for family in (one for one in FAMILIES if one.name.startswith("Gemma")):
        table: Any = base_of(family).get_input_embeddings()
        logits_V = torch.zeros(table.num_embeddings).index_fill(0, torch.tensor([7]), 60.0)
        for top_k in (0, 1):
            torch.testing.assert_close(mixture(logits_V, table, [3, 4], top_k), table(torch.tensor(7)))
            assert not torch.equal(mixture(logits_V, table, [7], top_k), table(torch.tensor(7)))


@pytest.mark.parametrize("top_k", [0, 3])
def test_mixtures_of_many_words_keep_their_differences_under_autocast(top_k: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits_BV = 1e-3 * torch.randn(4, 400, generator=random)
    table = torch.nn.Embedding(400, 8)
    expected_BD = mixture(logits_BV, table, [1, 8], top_k)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixture(logits_BV, table, [1, 8], top_k), expected_BD, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [0, 3])
def test_gradients_equal_finite_differences(top_k: int) -> None:
    random = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(2, 9, generator=random, dtype=torch.float64, requires_grad=True)
    table = torch.nn.Embedding(9, 4, dtype=torch.float64)

    def mixed(logits: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(_Mixed(table, top_k), {"table.weight": weight}, (logits,))

    assert torch.autograd.gradcheck(mixed, (logits_BV, table.weight))


class _Mixed(torch.nn.Module):
    def __init__(self, table: torch.nn.Embedding, top_k: int):
        super().__init__()
        self.table, self.top_k = table, top_k

    def forward(self, logits: Tensor) -> Tensor:
        return mixture(logits, self.table, [1, 8], self.top_k, temperature=0.7)


def test_the_gradient_of_a_loss_equals_finite_differences() -> None:
    lm = build("llama", slot=SLOTS[2])
    batch = batch_for(lm)
    _, found = summed_step(lm, batch)
    random = torch.Generator().manual_seed(2)
    weights = dict(lm.named_parameters())
    pad = lm.special.pad
    toward = {name: torch.randn(weight.shape, generator=random).to(weight) for name, weight in weights.items()}
    toward["base.model.embed_tokens.weight"][pad] = 0  # the row of padding is not trained
    epsilon, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for name, weight in weights.items():
                weight += sign * epsilon * toward[name]
            losses.append(lm(**batch).loss_sum)
    slope = sum((found[name] * toward[name]).sum() for name in found)
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * epsilon), slope, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("projector", [Projector.none, Projector.mlp_ln])
def test_the_ends_of_a_fused_thought_are_coconut_and_the_mixture(projector: Projector, family: str) -> None:
    """Bit for bit; the last layer also by its number."""
    ends = [
        (replace(FUSED, alpha=1.0), THOUGHTS), (replace(FUSED, alpha=1.0, layer=2), THOUGHTS),
        (replace(FUSED, alpha=0.0, layer=1, top_k=4), replace(MIXTURE, top_k=4)),
    ]  # fmt: skip
    batch = mixed_batch(build(family))
    for slots in ends:
        models = [build(family, torch.float32, slot=replace(slot, projector=projector)) for slot in slots]
        (loss, found), (other_loss, others) = (summed_step(lm, batch) for lm in models)
        assert torch.equal(loss, other_loss)
        assert found.keys() == others.keys()
        assert all(torch.equal(gradient, others[name]) for name, gradient in found.items())
    apart = [build(family, slot=slot) for slot in (FUSED, replace(FUSED, alpha=0.6), replace(FUSED, layer=1))]
    losses = [lm(**batch).loss_sum.item() for lm in apart]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("content", [MIXTURE, replace(FUSED, layer=1)])
def test_as_many_iterations_as_thoughts_are_sequential_thoughts(content: Slot) -> None:
    parallel = build("gpt2", slot=replace(content, update=Update.jacobi, iterations=3))
    sequential = build("gpt2", slot=content)
    batch = batch_for(parallel)
    assert same_step(summed_step(parallel, batch), summed_step(sequential, batch))
    fewer = build("gpt2", slot=replace(content, update=Update.jacobi, iterations=1))
    assert not same_step(summed_step(fewer, batch), summed_step(sequential, batch))


@pytest.mark.parametrize("slot", SLOTS)
def test_generation_feeds_the_thoughts_of_the_forward_pass(slot: Slot, family: str) -> None:
    """And a row alone gets the same as in a batch with padding on either side."""
    lm = build(family, slot=slot, num_thoughts=3, max_new_tokens=5)
    expected = [by_recomputation(lm, question, 3, 5) for question in QUESTIONS]
    for right in (False, True):
        out = lm.generate(*padded(QUESTIONS, right))
        assert rows_of(out) == expected
    for question, fed_KD in zip(QUESTIONS, out.thoughts, strict=True):
        ids = torch.tensor([[*question, lm.special.bot, *[lm.latent_id] * 3, lm.special.eot]])
        reads = Reads(thoughts_BK=torch.arange(3)[None] + len(question) + 1)
        thoughts = lm(ids, labels=ids, return_target_logits=True, reads=reads).thoughts
        torch.testing.assert_close(thoughts[0].detach().float(), fed_KD)


@pytest.mark.parametrize("slot", SLOTS[:4])
def test_analyses_and_rewards_make_the_same_thoughts(slot: Slot) -> None:
    lm = build("llama", slot=slot, num_thoughts=3)
    ids_BT, mask_BT = padded([[*question, lm.special.bot] for question in QUESTIONS])
    fed_BKD = lm.generate(*padded(QUESTIONS), max_new_tokens=1).thoughts
    means_BKD = thought_means(lm, QUESTIONS, fed_BKD.double())
    torch.testing.assert_close(means_BKD, fed_BKD)
    with torch.no_grad():
        context, sources_BE = Context.after(lm, ids_BT, mask_BT)
        for k in range(3):
            thought_BD = lm.thought(sources_BE)
            torch.testing.assert_close(thought_BD.float(), fed_BKD[:, k])
            sources_BE = context.extend(lm, thought_BD[:, None])[:, -1]


def test_thoughts_of_one_word_are_the_words_of_greedy_decoding() -> None:
    """Without markers the slot continues the question as text does."""
    lm = build("qwen3", slot=replace(MIXTURE, top_k=1), num_thoughts=4)
    plain = build("qwen3", slot=Slot(Source.none), markers=False)
    for question in QUESTIONS:
        words = by_recomputation(plain, [*question, lm.special.bot], 0, 4)
        fed_KD = lm.generate(torch.tensor([question]), max_new_tokens=1).thoughts[0]
        assert torch.equal(fed_KD[: len(words)], lm.base.get_input_embeddings()(torch.tensor(words)).float())


def test_a_saved_model_makes_the_same_thoughts(tmp_path: Path) -> None:
    lm = build("llama", torch.float32, slot=SLOTS[3], num_thoughts=2)
    lm.save_pretrained(tmp_path)
    again = LatentLM.from_pretrained(tmp_path)
    assert again.feedback.slot == again.reasoning.slot == SLOTS[3]
    fed, others = (model.generate(*padded(QUESTIONS), max_new_tokens=2).thoughts for model in (lm, again))
    assert torch.equal(fed, others)
    assert Slot.from_dict({"source": "thought", "projector": "none"}) == THOUGHTS, "what older versions saved"


def test_methods_are_coconut_with_another_content() -> None:
    curriculum = Curriculum(thoughts_per_step=2)
    coconut = plan("coconut", curriculum)
    for name, number in (("soft_coconut", {"top_k": 3}), ("lt_tuning", {"alpha": 0.9, "layer": 1})):
        stages = plan(name, curriculum, slot=number).stages
        assert {key: getattr(stages[-1].form.slot, key) for key in number} == number
        assert (
            tuple(replace(stage, together=(replace(stage.form, slot=THOUGHTS),)) for stage in stages) == coconut.stages
        )
    changed = plan("coconut", curriculum, slot={"content": Content.mixture, "top_k": 5}).stages[-1].form.slot
    assert changed == replace(MIXTURE, top_k=5)
    taken_away = plan("lt_tuning", curriculum, slot={"content": Content.state}).stages[-1].form.slot
    assert taken_away == THOUGHTS


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = build("gpt2", slot=MIXTURE, num_thoughts=2)
    with pytest.raises(ValueError, match="the head makes mixtures"):
        apply_engine_options(lm, EngineConfig(cuda_graphs=True))
    with pytest.raises(ValueError, match="not states that the head reads"):
        logit_lens(lm, torch.zeros(1, 32))
    lm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not states that the head reads"):
        generate(GenerateConfig(run=str(tmp_path), question="a b", show_thoughts=True))
    assert "2 thoughts" not in "".join(capsys.readouterr()), "it is said before the answer"
    mux = plan("mux", Curriculum(), slot={"projector": Projector.none, "content": Content.mixture})
    with pytest.raises(ValueError, match=r"reads the thoughts with the model's head.*terms\.spans=0"):
        TrainingModel(lm, mux)
    far = build("gpt2", slot=replace(FUSED, layer=3))
    with pytest.raises(ValueError, match=r"layer=3 names a layer.*layers 0 to 2"):
        far(**mixed_batch(far))
    with pytest.raises(ValueError, match=r"top_k=4 is for model\.content=mixture or fused"):
        replace(THOUGHTS, top_k=4)
    with pytest.raises(ValueError, match=r"alpha=0\.1 is for model\.content=fused, and .* content mixture"):
        replace(MIXTURE, alpha=0.1)
    with pytest.raises(ValueError, match=r"alpha is 1\.5; it must be between 0"):
        replace(FUSED, alpha=1.5)
    with pytest.raises(ValueError, match=r"mixture_temperature is 0\.0"):
        replace(MIXTURE, temperature=0.0)
    with pytest.raises(ValueError, match="the slot of this method holds pause"):
        replace(PAUSES, content=Content.mixture)
    assert get_method("soft_coconut").slot.describe() == "mixtures of all words at temperature 1, no projector"
    ModelConfig(base="gpt2", content=Content.fused, alpha=0.1)
