"""The feedback loop: two implementations with equal results, which equal the plain model without thoughts."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import WORDS, build, byte_level_tokenizer, gradients, mixed_batch, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from coconut import LatentLM
from coconut.data.tokenization import ADDED_TOKENS, add_special_tokens, build_word_tokenizer, encode_texts, token_ids
from coconut.methods import PAUSES, REASONING_FILE
from coconut.models.passes import plan_passes


def both_paths(lm: LatentLM, batch: dict[str, Tensor]) -> list[tuple[Any, dict[str, Tensor]]]:
    results = []
    for use_cache in (True, False):
        lm.zero_grad()
        out = lm(**batch, return_logits=True, use_cache=use_cache)
        out.loss.backward()
        results.append((out, gradients(lm)))
    return results


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_cached_equals_recomputed(family: str, dtype: torch.dtype, tolerance: float) -> None:
    lm = build(family, dtype)
    batch = mixed_batch(lm)
    (cached, cached_grads), (plain, plain_grads) = both_paths(lm, batch)
    assert cached.num_targets == plain.num_targets > 30
    torch.testing.assert_close(cached.loss, plain.loss, rtol=tolerance, atol=0)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(cached.logits[real], plain.logits[real], rtol=0, atol=100 * tolerance)
    assert relative(cached_grads, plain_grads) < tolerance


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    kind = st.sampled_from([0, 1, 1, 1, 2, 2])  # padding, token, thought
    table = draw(st.lists(st.lists(kind, min_size=width, max_size=width), min_size=rows, max_size=rows))
    for row in table:
        real = [t for t, k in enumerate(row) if k]
        if not real:
            row[0] = 1
        elif row[real[0]] == 2:
            row[real[0]] = 1
    return [[int(k == 2) for k in row] for row in table], [[bool(k) for k in row] for row in table]


@given(layouts())
def test_any_layout_is_cut_into_as_few_passes_as_thoughts_allow(layout: tuple[Any, Any]) -> None:
    latent, token = torch.tensor(layout[0]).bool(), torch.tensor(layout[1])
    plan = plan_passes(latent, token)
    deepest = int(latent.sum(1).max())
    assert len(plan.pass_bounds) == deepest + 2
    for row in range(len(token)):
        columns = plan.column_BT[row][token[row]].tolist()
        assert columns == sorted(set(columns)), "the order of the tokens is kept"
        assert plan.source_BS[row][columns].tolist() == token[row].nonzero()[:, 0].tolist()
        assert (plan.source_BS[row] >= 0).sum() == token[row].sum()
        for column in plan.column_BT[row][latent[row]].tolist():
            block = max(b for b in plan.pass_bounds[:-1] if b <= column)
            assert (plan.source_BS[row][block:column] < 0).all(), "a thought is the first of its pass"
            before = plan.source_BS[row][:block]
            previous = [b for b in plan.pass_bounds if b <= block and (before[:b] >= 0).any()]
            assert previous
            ends = [b - 1 for b in plan.pass_bounds[1:] if b <= block and plan.source_BS[row][b - 1] >= 0]
            assert plan.source_BS[row][ends[-1]] == before.max(), "what precedes it ends a pass"


LLAMA = cache(partial(build, "llama"))


@pytest.mark.slow
@settings(max_examples=50)
@given(layouts())
def test_any_layout_gives_equal_losses(layout: tuple[Any, Any]) -> None:
    lm = LLAMA()
    latent, token = torch.tensor(layout[0]).bool(), torch.tensor(layout[1])
    ids = torch.where(latent, lm.latent_id, torch.arange(token.numel()).view_as(latent) % 30 + 3)
    labels = torch.where(latent, -100, ids)
    cached, plain = (lm(ids, token.long(), labels=labels, use_cache=c) for c in (True, False))
    assert cached.num_targets == plain.num_targets
    torch.testing.assert_close(cached.loss_sum, plain.loss_sum, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("min_passes", [2, 4, 7, 30])
def test_more_passes_than_needed_change_nothing(family: str, min_passes: int) -> None:
    lm = build(family)
    batch = mixed_batch(lm)
    found = []
    for passes in (1, min_passes):
        calls: list[int] = []
        hook = lm.base.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        lm.zero_grad()
        out = lm(**batch, min_passes=passes)
        out.loss_sum.backward()
        hook.remove()
        found.append((out.loss_sum.item(), gradients(lm), len(calls)))
    (loss, grads, few), (more_loss, more_grads, many) = found
    assert many == max(few, min_passes)
    assert more_loss == pytest.approx(loss, rel=1e-9)
    assert relative(more_grads, grads) < 1e-9


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_thoughts_it_is_the_plain_model(family: str, use_cache: bool) -> None:
    lm = build(family)
    ids = torch.randint(3, 35, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    ours = lm(ids, mask, labels=labels, return_logits=True, use_cache=use_cache)
    lm.zero_grad()
    ours.loss.backward()
    our_grads = gradients(lm)
    lm.zero_grad()
    theirs = lm.base(input_ids=ids, attention_mask=mask, labels=labels)
    theirs.loss.backward()
    # transformers takes the loss in float32, so its own value is good to 1e-6 only
    torch.testing.assert_close(ours.loss, theirs.loss.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.logits[mask.bool()], theirs.logits[mask.bool()], rtol=0, atol=1e-12)
    assert relative(our_grads, gradients(lm)) < 1e-5


def test_padding_on_either_side_changes_nothing(family: str) -> None:
    lm = build(family)
    row = [5, 6, 7, lm.latent_id, lm.latent_id, 8, 9, 10]
    labels = [-100] * 6 + [9, 10]
    alone = lm(torch.tensor([row]), labels=torch.tensor([labels])).loss
    for left, right in [(4, 0), (0, 5), (3, 2)]:
        ids = torch.tensor([[0] * left + row + [0] * right])
        mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
        padded = lm(ids, mask, labels=torch.tensor([[-100] * left + labels + [-100] * right])).loss
        torch.testing.assert_close(padded, alone, rtol=1e-12, atol=0)


def test_a_thought_is_the_state_after_the_final_norm_of_the_token_before() -> None:
    lm = build("gpt2")
    ids = torch.tensor([[5, 6, lm.latent_id, 7]])
    embeds = lm.base.get_input_embeddings()(ids)
    first = lm.base.base_model(inputs_embeds=embeds[:, :2]).last_hidden_state[:, -1:]
    embeds = torch.cat([embeds[:, :2], first, embeds[:, 3:]], dim=1)
    expected = lm.base(inputs_embeds=embeds).logits
    torch.testing.assert_close(lm(ids, return_logits=True).logits, expected, rtol=0, atol=1e-12)


def test_gradients_flow_through_the_thoughts() -> None:
    """The thoughts' own gradient equals a difference quotient along a random direction."""
    lm = build("llama")
    batch = mixed_batch(lm)
    lm(**batch).loss.backward()
    weight = lm.get_parameter("base.model.layers.0.self_attn.v_proj.weight")
    direction = torch.randn_like(weight)
    assert weight.grad is not None
    slope = float((weight.grad * direction).sum())
    with torch.no_grad():
        weight.add_(1e-6 * direction)
        above = lm(**batch).loss
        weight.sub_(2e-6 * direction)
        below = lm(**batch).loss
    assert float((above - below) / 2e-6) == pytest.approx(slope, rel=1e-6)


def test_pauses_fed_one_by_one_equal_pauses_fed_at_once(family: str) -> None:
    """In a causal model: so passing over pauses several times adds nothing to passing over them once."""
    lm = build(family, slot=PAUSES, num_thoughts=3)
    question, special = [5, 6, 7, 8], lm.special
    row = torch.tensor([[*question, special.bot, *[special.pause] * 3, special.eot, 9, 10]])
    labels = torch.where(torch.arange(row.shape[1]) > 8, row, -100)
    at_once = lm(row, labels=labels)
    at_once.loss_sum.backward()
    expected = gradients(lm)
    lm.zero_grad()

    embeds = lm.base.get_input_embeddings()(row)
    positions = torch.arange(row.shape[1])[None]
    cache = DynamicCache(config=lm.base.config)
    states = []
    for start, stop in pairwise([0, 5, 6, 7, 8, row.shape[1]]):
        mask = torch.ones_like(row[:, :stop])
        states.append(lm.hidden_states(embeds[:, start:stop], mask, positions[:, start:stop], cache))
    logits = lm.logits(torch.cat(states, dim=1))[0, 8:-1]
    loss = torch.nn.functional.cross_entropy(logits, row[0, 9:], reduction="sum")
    torch.testing.assert_close(loss, at_once.loss_sum, rtol=1e-9, atol=1e-9)
    loss.backward()
    for name, gradient in gradients(lm).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-9, msg=name)


def test_a_batch_equals_its_parts() -> None:
    lm = build("gpt2")
    batch = mixed_batch(lm)
    lm(**batch).loss_sum.backward()
    whole = gradients(lm)
    lm.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        lm(**{key: value[rows] for key, value in batch.items()}).loss_sum.backward()
    assert relative(gradients(lm), whole) < 1e-9


def test_logits_only_where_asked() -> None:
    lm = build("llama")
    batch = mixed_batch(lm)
    seen: list[tuple[int, ...]] = []
    head: Any = lm.base.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    out = lm(**batch)
    handle.remove()
    assert out.logits is None
    assert seen == [(out.num_targets, len(lm.tokenizer))]


def test_log_probs_are_those_of_the_logits() -> None:
    lm = build("qwen3", torch.bfloat16)
    batch = mixed_batch(lm)
    scores = lm.log_probs(**batch)
    assert scores.dtype is torch.float32
    out = lm(**batch)
    assert scores.shape == (out.num_targets,)
    torch.testing.assert_close(-scores.sum(), out.loss_sum)
    with pytest.raises(ValueError, match="needs labels"):
        lm.log_probs(batch["input_ids"])


def test_a_label_on_the_first_token_is_not_counted() -> None:
    lm = build("llama")
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert lm(ids, mask, labels=torch.where(mask.bool(), ids, -100)).num_targets == 3
    assert lm(ids, mask, labels=torch.full_like(ids, -100)).loss == 0


def test_a_row_cannot_begin_with_a_thought() -> None:
    lm = build("llama")
    ids = torch.tensor([[5, 6, 7], [0, lm.latent_id, 6]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="Row 1 begins with a thought"):
            lm(ids, mask, use_cache=use_cache)


def test_gradient_checkpointing_never_loses_the_context(family: str) -> None:
    lm = build(family)
    batch = mixed_batch(lm)
    before = lm(**batch).loss
    switch = "activation" if hasattr(lm.base, "activation_checkpointing_enable") else "gradient"  # its newer name
    getattr(lm.base, f"{switch}_checkpointing_enable")()
    lm.train()
    with pytest.raises(ValueError, match="Gradient checkpointing switches the cache off"):
        lm(**batch)
    torch.testing.assert_close(lm(**batch, use_cache=False).loss, before, rtol=1e-12, atol=0)
    getattr(lm.base, f"{switch}_checkpointing_disable")()
    torch.testing.assert_close(lm(**batch).loss, before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["mean", "random", "7"])
def test_new_embeddings_start_as_asked(init: str, tied: bool) -> None:
    tokenizer = build_word_tokenizer(WORDS)
    old = len(tokenizer)
    config = AutoConfig.for_model("gpt2", vocab_size=old, n_embd=16, n_layer=1, n_head=2, eos_token_id=1,
                                  bos_token_id=None, tie_word_embeddings=tied)  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    known = base.get_input_embeddings().weight.detach().clone()
    lm = LatentLM.from_base(base, tokenizer, init=init)
    weight = base.get_input_embeddings().weight
    assert weight.shape[0] == old + 4
    torch.testing.assert_close(weight[:old], known, rtol=0, atol=0)
    if init == "mean":
        torch.testing.assert_close(weight[old], known.mean(0))
    elif init == "7":
        torch.testing.assert_close(weight[old + 3], known[tokenizer.convert_tokens_to_ids("7")])
    else:
        assert 0.5 * known.std() < weight[old:].std() < 2 * known.std()
    assert lm.new_tokens == {"init": init, "tokens": list(ADDED_TOKENS)}
    again = LatentLM.from_base(base, tokenizer, init=init)
    assert len(again.tokenizer) == old + 4, "tokens are added once"


def test_what_does_not_belong_together_is_refused() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    small = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=10, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=None)
    )
    with pytest.raises(ValueError, match="do not belong together"):
        LatentLM.from_base(small, tokenizer)
    base = build("gpt2").base
    with pytest.raises(ValueError, match="neither"):
        LatentLM.from_base(base, build_word_tokenizer(WORDS), init="<<")
    silent = PreTrainedTokenizerFast(tokenizer_object=build_word_tokenizer(WORDS).backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        LatentLM.from_base(base, silent)


def test_saved_and_loaded_it_is_the_same_and_opens_as_a_plain_model(tmp_path: Path, family: str) -> None:
    lm = build(family, torch.float32, num_thoughts=2, stage=2)
    lm.save_pretrained(tmp_path)
    again = LatentLM.from_pretrained(tmp_path)
    assert again.reasoning == lm.reasoning
    assert again.special == lm.special
    assert again.new_tokens == lm.new_tokens
    batch = mixed_batch(lm)
    torch.testing.assert_close(again.eval()(**batch).loss, lm(**batch).loss, rtol=0, atol=0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<latent>") == lm.latent_id
    ids = torch.randint(3, 35, (2, 6))
    torch.testing.assert_close(plain(ids).logits, lm.base(ids).logits, rtol=1e-5, atol=1e-6)  # GPT-2's GELU is fused


def test_loaded_weights_lie_where_new_ones_would(tmp_path: Path) -> None:
    """Some processors compute other last digits at other addresses: a resumed run would not be the unbroken one."""
    build("llama", torch.float32).save_pretrained(tmp_path)
    assert {weight.data_ptr() % 64 for weight in LatentLM.from_pretrained(tmp_path).parameters()} == {0}


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no saved LatentLM"):
        LatentLM.from_pretrained(tmp_path)
    build("gpt2", torch.float32).save_pretrained(tmp_path)
    record = tmp_path / REASONING_FILE
    text = record.read_text()
    record.write_text(text.replace('"format_version": 5', '"format_version": 99'))
    with pytest.raises(ValueError, match="format version 99"):
        LatentLM.from_pretrained(tmp_path)
    for damaged in (text[:50], "[]", "{}", text.replace('"slot"', '"slit"'), text.replace('"bot"', '"boot"')):
        record.write_text(damaged)
        with pytest.raises(ValueError, match=r"coconut\.json is damaged"):
            LatentLM.from_pretrained(tmp_path)
    record.write_text(text)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights in .* are damaged"):
        LatentLM.from_pretrained(tmp_path)


def test_markers_that_a_tokenizer_has_as_words_become_special() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<bot>", "<latent>"])
    before = token_ids(tokenizer, ["<bot>", "<latent>"])
    special = add_special_tokens(tokenizer)
    assert [special.bot, special.latent] == before
    assert special.latent not in encode_texts(tokenizer, ["a <latent> that somebody wrote"])[0]
