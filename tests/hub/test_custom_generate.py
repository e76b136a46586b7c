"""Exported models think in transformers' generate, with the file that lies beside them, as LatentLM does."""

from __future__ import annotations

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import ROOT
from helpers.family_table import FAMILIES, Family, base_of, new_tokenizer
from helpers.models import QUESTIONS, padded, shift_weights
from helpers.processes import python
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer, pipeline

from coconut import LatentLM
from coconut.config import LoraConfig
from coconut.generation.generate import mode_log_probs
from coconut.hub import custom_generate
from coconut.hub.folder import GENERATE_FILE, write_folder
from coconut.methods import METHODS, NOTHING, THOUGHTS, Curriculum, Projector, Reasoning, Slot, Source, Update, plan
from coconut.methods.table import Content, Pooling
from coconut.utils.files import read_json, write_json

LLAMA = next(family for family in FAMILIES if family.model_type == "llama")
C_MTP = Slot(Source.thought, Projector.multi_token, update=Update.teacher_forced, group=2, pooling=Pooling.mean)
COLAR = replace(C_MTP, projector=Projector.gaussian, pooling=Pooling.sqrt, max_group=3)
FURTHER = [
    Slot(Source.thought, content=Content.mixture, top_k=3, temperature=0.7),
    Slot(Source.thought, Projector.mlp_ln, width=20, content=Content.fused, layer=1, alpha=0.3),
    Slot(Source.thought, content=Content.fused, layer=1, alpha=0.3, update=Update.jacobi, iterations=2),
    Slot(Source.thought, Projector.mlp_ln, update=Update.loop, iterations=1, iterations_per=2),
    replace(C_MTP, pooling=Pooling.sqrt),
]
BOT = len(new_tokenizer())  # the first token that is added
SAVED_MODULES = "transformers.dynamic_module_utils.HF_MODULES_CACHE"


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SAVED_MODULES, str(tmp_path / "modules"))


def latent_lm(family: Family, reasoning: Reasoning, seed: int = 0, says_eot: float = 1.0) -> LatentLM:
    """A small model with large weights. `says_eot`: a factor of the head's row for the token that ends thoughts."""
    torch.manual_seed(seed)
    lm = LatentLM.from_base(base_of(family), new_tokenizer(), "random", reasoning)
    lm.add_rates(reasoning.slot.max_group, "random")
    if reasoning.modes:
        lm.add_modes(reasoning.modes, "random")
    shift_weights(lm, 0.15).eval()
    head: Any = lm.base.get_output_embeddings()
    with torch.no_grad():
        head.weight[lm.special.eot] *= says_eot
    return lm


def thinking(slot: Slot = THOUGHTS, **options: Any) -> Reasoning:
    return Reasoning(slot=slot, num_thoughts=4, max_new_tokens=8, **options)


HYBRID = Reasoning(slot=NOTHING, markers=False, max_new_tokens=8, modes=("short", "think", "latent_2", "latent_4"))


def opened(lm: LatentLM, folder: Path) -> Any:
    """The model of the exported folder, as transformers opens it."""
    write_folder(lm, folder, "")
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def assert_same_answers(lm: LatentLM, model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """The new tokens, their numbers of thoughts and their modes are those of LatentLM."""
    expected = lm.generate(ids, mask, **options)
    output = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options)
    answers = len(expected.tokens) // len(ids)
    assert torch.equal(output.sequences[:, : ids.shape[1]], ids.repeat_interleave(answers, dim=0)), "as it was given"
    new = output.sequences[:, ids.shape[1] :].tolist()
    if lm.reasoning.modes:
        assert [row.pop(0) for row in new] == [lm.special.control[mode] for mode in expected.modes]
    assert new == expected.tokens.tolist()
    assert output.num_thoughts.tolist() == expected.num_thoughts.tolist()
    return expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("reasoning", [thinking(), thinking(C_MTP), HYBRID], ids=["state", "merged", "modes"])
def test_every_family_answers_as_latent_lm(tmp_path: Path, family: Family, reasoning: Reasoning) -> None:
    """In batches with padding on either side, and each row alone."""
    lm = latent_lm(family, reasoning, 1, says_eot=3.0 if reasoning.slot.merges else 1.0)
    model = opened(lm, tmp_path)
    for right in (False, True):
        assert_same_answers(lm, model, *padded(QUESTIONS, right))
    for question in QUESTIONS:
        assert_same_answers(lm, model, torch.tensor([question]), torch.ones(1, len(question), dtype=torch.long))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_as_latent_lm(tmp_path: Path, name: str) -> None:
    """With as many thoughts as in training, and with other numbers of them; by sampling among one word."""
    planned = plan(name, Curriculum(max_stage=3, num_thoughts=4 if METHODS[name].fixed_length else None,
                                    modes=["short", "latent_3"]))  # fmt: skip
    reasoning = replace(Reasoning.at(planned, planned.stages[-1], max_new_tokens=8), num_thoughts=3)
    lm = latent_lm(LLAMA, reasoning if not reasoning.slot.is_empty else replace(reasoning, num_thoughts=0))
    model, batch = opened(lm, tmp_path), padded(QUESTIONS)
    assert_same_answers(lm, model, *batch)
    if reasoning.slot.is_empty or reasoning.modes:
        with pytest.raises(ValueError, match=rf"num_thoughts=2: {name} (has neither|chooses it)"):
            model.generate(batch[0], attention_mask=batch[1], num_thoughts=2)
    else:
        for num_thoughts in (0, 1, 5):
            assert_same_answers(lm, model, *batch, num_thoughts=num_thoughts)
    if not reasoning.modes:
        assert_same_answers(lm, model, *batch, do_sample=True, top_k=1, num_return_sequences=2)


@pytest.mark.parametrize("slot", FURTHER, ids=lambda slot: slot.describe())
def test_further_slots_answer_as_latent_lm(tmp_path: Path, slot: Slot) -> None:
    lm = latent_lm(LLAMA, thinking(slot))
    assert_same_answers(lm, opened(lm, tmp_path), *padded(QUESTIONS))


@pytest.mark.parametrize("name", ["Cohere", "Granite", "Gemma 2"])
def test_mixtures_are_of_the_logits_of_the_family(tmp_path: Path, name: str) -> None:
    """Which it scales or caps. The thoughts show it, where few words would."""
    lm = latent_lm(next(family for family in FAMILIES if family.name == name), thinking(FURTHER[0]))
    expected = lm.generate(torch.tensor([[5, 6, 7]])).thoughts
    latent = custom_generate.LatentReasoning(opened(lm, tmp_path))
    with torch.no_grad():
        fed, _, _ = latent.think([[5, 6, 7, lm.special.bot]], torch.tensor([4]))
    torch.testing.assert_close(fed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slot", [COLAR, C_MTP], ids=["colar", "c_mtp"])
def test_rows_may_end_their_thoughts_at_different_numbers(tmp_path: Path, slot: Slot) -> None:
    numbers: set[tuple[int, ...]] = set()
    for seed in range(4):
        lm = latent_lm(LLAMA, thinking(slot), seed, says_eot=3.0)
        model = opened(lm, tmp_path / str(seed))
        expected = assert_same_answers(lm, model, *padded(QUESTIONS), do_sample=True, top_k=1, num_return_sequences=2)
        numbers.add(tuple(expected.num_thoughts.tolist()))
    assert max(len({*row}) for row in numbers) > 2, "in one batch"


@pytest.mark.parametrize("slot", [COLAR, C_MTP], ids=["colar", "c_mtp"])
def test_a_fixed_number_of_thoughts_is_kept(tmp_path: Path, slot: Slot) -> None:
    lm = latent_lm(LLAMA, thinking(slot, fixed_count=True), says_eot=3.0)
    assert_same_answers(lm, opened(lm, tmp_path), *padded(QUESTIONS))


def test_gated_words_are_fed_as_latent_lm_feeds_them(tmp_path: Path) -> None:
    """Up to the answer mark, which one of the rows writes."""
    form = replace(Reasoning().format, answer="15 {}")
    lm = latent_lm(LLAMA, Reasoning(slot=NOTHING, markers=False, max_new_tokens=12, format=form))
    ungated = lm.generate(*padded(QUESTIONS)).texts
    lm.add_gates(0.3, 0.6, temperature=0.8)
    words = sorted({word for text in lm.generate(*padded(QUESTIONS)).texts for word in text.split()})
    seen = set()
    for mark in words:
        lm.reasoning = replace(lm.reasoning, format=replace(form, answer=f"{mark} {{}}"))
        model = opened(lm, tmp_path / mark.strip("<>"))
        seen.add(tuple(assert_same_answers(lm, model, *padded(QUESTIONS)).texts))
    assert len(seen) > 1, "the mark makes a difference"
    assert tuple(ungated) not in seen


def test_modes_are_chosen_or_forced(tmp_path: Path) -> None:
    lm = latent_lm(LLAMA, HYBRID)
    model, batch = opened(lm, tmp_path), padded(QUESTIONS)
    assert_same_answers(lm, model, *batch, mode="latent_4")
    assert_same_answers(lm, model, *batch, mode=["latent_4", "short", "latent_2", "think"])
    torch.manual_seed(0)
    many = batch[0].repeat(200, 1), batch[1].repeat(200, 1)
    sampled = model.generate(many[0], attention_mask=many[1], do_sample=True, temperature=2.0, num_return_sequences=2)
    chosen = sampled[:, batch[0].shape[1]].view(200, 4, 2)
    controls = torch.tensor([lm.special.control[mode] for mode in HYBRID.modes])
    shares = (chosen[..., None] == controls).float().mean((0, 2))
    expected = mode_log_probs(lm, batch[0], batch[1].bool(), 2.0).exp()
    assert (shares - expected).abs().max() < 4 * 0.5 / 400**0.5, "four deviations of 400 draws, at most"
    with pytest.raises(ValueError, match=r"mode=other: .* has the modes short, think, latent_2, latent_4\."):
        model.generate(batch[0], attention_mask=batch[1], mode="other")


@pytest.mark.parametrize(
    "options",
    [{"stop_strings": ["14", "32"]}, {"min_new_tokens": 8}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2},
     {"bad_words_ids": [[32]]}, {"suppress_tokens": [32]}, {"generation_config": GenerationConfig(max_new_tokens=3)},
     {"logits_processor": [lambda ids, scores: scores.index_fill(1, torch.arange(20, 40), -torch.inf)]},
     {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 7]}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_options_of_transformers_apply(tmp_path: Path, options: dict[str, Any]) -> None:
    lm = latent_lm(FAMILIES[0], thinking())
    assert_same_answers(lm, opened(lm, tmp_path), *padded(QUESTIONS), **options)


def test_sampling_draws_as_latent_lm_does(tmp_path: Path) -> None:
    """From the same distribution, with the same numbers."""
    lm = latent_lm(LLAMA, thinking())
    model, batch = opened(lm, tmp_path), padded(QUESTIONS)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3}
    torch.manual_seed(0)
    expected = lm.generate(*batch, **options).tokens
    torch.manual_seed(0)
    assert torch.equal(model.generate(batch[0], attention_mask=batch[1], **options)[:, batch[0].shape[1] :], expected)


def test_plain_model_thinks_when_the_folder_is_named(tmp_path: Path) -> None:
    """The weights stay those of the plain model, which answers otherwise; a streamer and a pipeline get the words."""
    lm = latent_lm(LLAMA, thinking())
    write_folder(lm, tmp_path / "model", "")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    names = set(model.state_dict())
    ids, options = torch.tensor([[5, 6, 7]]), {"custom_generate": str(tmp_path / "model"), "trust_remote_code": True}
    [expected] = lm.generate(ids).tokens.tolist()
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True)  # pyright: ignore[reportArgumentType]
    assert model.generate(ids, streamer=streamer, **options)[0, 3:].tolist() == expected
    text = lm.tokenizer.decode(expected)
    assert "".join(streamer).strip() == str(text).strip()
    assert model.generate(ids)[0, 3:].tolist() != expected
    assert set(model.state_dict()) == names
    pipe: Any = pipeline("text-generation", model=str(tmp_path / "model"), trust_remote_code=True)
    [answer] = pipe(lm.tokenizer.decode([5, 6, 7]), return_full_text=False)
    assert answer["generated_text"].strip() == lm.tokenizer.decode(expected, skip_special_tokens=True)


def test_answers_end_with_the_context(tmp_path: Path) -> None:
    """Each row of a batch gets what there is room for, as it does alone; and longrope ends at its original length."""
    lm = latent_lm(FAMILIES[0], thinking())
    model, batch = opened(lm, tmp_path / "gpt2"), padded([[5] * 83, [6] * 3, [7] * 88])
    expected = lm.generate(*batch)
    new = model.generate(batch[0], attention_mask=batch[1])[:, batch[0].shape[1] :]
    assert new.tolist() == expected.tokens.tolist()
    assert len({*expected.lengths.tolist()}) == 3
    with pytest.raises(ValueError, match="end of the model's context after different numbers"):
        model.generate(batch[0], attention_mask=batch[1], return_dict_in_generate=True)
    with pytest.raises(ValueError, match=r"Prompt 1 has 4 tokens with its markers, and 92 thoughts.* of 96 tokens"):
        model.generate(torch.tensor([[5, 6], [3, 4]]), attention_mask=torch.ones(2, 2), num_thoughts=92)
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors}
    phi = next(family for family in FAMILIES if family.model_type == "phi3")
    lm = latent_lm(
        replace(phi, sizes={**phi.sizes, "rope_parameters": rope, "original_max_position_embeddings": 24}), thinking()
    )
    expected = assert_same_answers(lm, opened(lm, tmp_path / "phi"), *padded([[5] * 14]), max_new_tokens=20)
    assert expected.lengths.tolist() == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds cannot be given: .*Give input_ids"),
        ({"num_beams": 2}, "beam_search cannot be combined with thoughts"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "beam_search cannot be combined"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation cannot be combined"),
        ({"assistant_model": "any"}, "assistant_model would draft words without the thoughts"),
        ({"max_length": 30}, "max_length would count the thoughts. Set max_new_tokens"),
        ({"use_cache": False}, "use_cache cannot be switched off"),
        ({"guidance_scale": 2.0}, "guidance_scale compares with words"),
        ({"thought_noise": 0.1}, "thought_noise is an option of LatentLM.generate"),
        ({"num_thoughts": -1}, "num_thoughts is -1"),
        ({"num_thoughts": 1.5}, "num_thoughts is 1.5"),
        ({"num_thoughts": 99}, "leave no room for an answer in the model's context of 96 tokens"),
        ({"mode": "short"}, "mode=short: coconut has no modes"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"input_ids": torch.tensor([[5, BOT]])}, rf"Prompt 1 holds the tokens \[{BOT}\], which mark the thoughts"),
        ({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.zeros(1, 2)}, "Prompt 1 is empty"),
        ({"input_ids": torch.tensor([[0, 6], [5, 6]]), "attention_mask": None}, "Several prompts need the .*attention"),
        ({"input_ids": None}, "There is no prompt"),
    ],
)
def test_what_cannot_be_combined_with_thoughts_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    lm = latent_lm(LLAMA, thinking())
    model = opened(lm, tmp_path)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2), **options})


def test_unfit_folders_are_named(tmp_path: Path) -> None:
    lm = latent_lm(LLAMA, thinking())
    write_folder(lm, tmp_path, "")
    generate = partial(custom_generate.generate, torch.tensor([[5, 6]]))
    record = read_json(tmp_path / "coconut.json")
    for changes, message in (
        ({"format_version": 99}, "has the format 99, and its generate.py knows 5. Export the model again"),
        ({"feedback": {**record["feedback"], "update": "spiral"}}, "update=spiral of thoughts is not supported"),
    ):
        write_json(tmp_path / "coconut.json", {**record, **changes})
        with pytest.raises(ValueError, match=message):
            generate(model=AutoModelForCausalLM.from_pretrained(tmp_path))
    (tmp_path / "coconut.json").unlink()
    with pytest.raises(ValueError, match=r"There is no coconut\.json in .*, where this model was opened"):
        generate(model=AutoModelForCausalLM.from_pretrained(tmp_path))


def test_merged_lora_thinks_and_an_adapter_alone_has_no_generation(tmp_path: Path) -> None:
    base = base_of(LLAMA)
    base.save_pretrained(tmp_path / "base")
    new_tokenizer().save_pretrained(tmp_path / "base")
    lm = LatentLM.from_base(base, new_tokenizer(), "random", thinking())
    lm.add_lora(LoraConfig(rank=4), str(tmp_path / "base"))
    shift_weights(lm, 0.15).eval()
    write_folder(lm, tmp_path / "adapter", "")
    assert not (tmp_path / "adapter" / GENERATE_FILE).exists()
    whole = lm.merged().eval()
    assert_same_answers(whole, opened(whole, tmp_path / "whole"), *padded(QUESTIONS))


def test_another_version_of_transformers_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "transformers==" in line)
    assert pinned.split("==")[1].rsplit(".", 1)[0] == custom_generate.TESTED
    assert custom_generate.__file__
    monkeypatch.setattr(transformers, "__version__", "5.99.1")
    with pytest.warns(UserWarning, match=r"tested with transformers .*; 5\.99\.1 is installed") as caught:
        runpy.run_path(custom_generate.__file__)
    assert len(caught) == 1


@pytest.mark.slow
def test_on_the_hub_each_revision_thinks_as_it_says(tmp_path: Path) -> None:
    place, revisions = tmp_path / "models--someone--thing", {"0" * 40: 3, "1" * 40: 2}
    for revision, num_thoughts in revisions.items():
        lm = latent_lm(LLAMA, replace(thinking(), num_thoughts=num_thoughts))
        write_folder(lm, place / "snapshots" / revision, "")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
for revision in ("main", *sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained("someone/thing", revision=revision, trust_remote_code=True)
    print(int(model.generate(torch.tensor([[5, 6]]), return_dict_in_generate=True).num_thoughts))
"""
    folders: dict[str, Any] = {
        "HF_HUB_CACHE": str(tmp_path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = python("-I", "-c", code, *revisions, **folders)
    assert done.stdout.split() == ["3", "3", "2"], done.stderr
