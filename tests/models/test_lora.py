"""LoRA: only the correction and the added tokens are trained and saved; opened again or merged it is the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import ARCHITECTURES, mixed_batch, relative
from helpers.runs import composed, copy_until, graph_files, same_end, small_run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from coconut import LatentLM
from coconut.analysis.node_probabilities import name_probabilities, spell
from coconut.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, Precision, TrainConfig
from coconut.data.examples import read_examples
from coconut.data.tokenization import build_word_tokenizer, encode_questions
from coconut.methods import get_method
from coconut.models.feedback import WEIGHTS_FILE
from coconut.models.lora import ADAPTER_FILE, ROWS_FILE, fingerprint
from coconut.objectives.training_model import TrainingModel
from coconut.runs.checkpoints import Checkpoints
from coconut.training.model_setup import make_model
from coconut.training.trainer import run
from coconut.utils.files import read_json


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 28, 12, 8)


def pretrained(folder: Path, family: str, data: DataConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A small model as it would come from the hub: without the added tokens."""
    torch.manual_seed(seed)
    tokenizer = build_word_tokenizer(read_examples(data.train), data.format)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0, **ARCHITECTURES[family]
    )
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    base.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wrapped(folder: Path) -> LatentLM:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return LatentLM.from_base(base, AutoTokenizer.from_pretrained(folder), init="random").eval()


@pytest.fixture
def place(family: str, tmp_path: Path, data: DataConfig) -> Path:
    return pretrained(tmp_path / "base", family, data)


def corrected(place: Path, **settings: Any) -> LatentLM:
    """A model with LoRA that has been trained a little."""
    lm = wrapped(place)
    lm.add_lora(LoraConfig(**{"rank": 4, **settings}), str(place))
    batch = small_batch(lm)
    optimizer = torch.optim.AdamW([weight for weight in lm.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(4):
        lm(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm


def small_batch(lm: LatentLM) -> dict[str, Any]:
    """Every added token is seen, and <eot> is learnt."""
    batch = mixed_batch(lm)
    ids, labels = batch["input_ids"], batch["labels"]
    batch["input_ids"] = torch.where((ids >= 3) & (ids < 35), ids % 5 + 3, ids)
    batch["labels"] = torch.where((labels >= 3) & (labels < 35), labels % 5 + 3, labels)
    for row, token in enumerate([lm.special.bot, lm.special.pause, lm.special.eot]):
        batch["input_ids"][row, 1] = batch["labels"][row, 1] = token
    return batch


@pytest.mark.parametrize("least", [2**19, 1])
def test_it_begins_as_the_model_and_trains_nothing_else(
    place: Path, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", least)
    whole, lm = wrapped(place), wrapped(place)
    lm.load_state_dict(whole.state_dict())
    batch = small_batch(lm)
    before = whole(**batch, return_logits=True)
    lm.add_lora(LoraConfig(rank=4), str(place))
    frozen = {name: w.clone() for name, w in lm.named_parameters() if not w.requires_grad}
    after = lm(**batch, return_logits=True)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.loss, before.loss)

    optimizer = torch.optim.AdamW([w for w in lm.parameters() if w.requires_grad], lr=1e-2)
    table: Any = lm.base.get_input_embeddings()
    before_table = table.weight.detach().clone()
    after.loss.backward()
    optimizer.step()
    assert all(w.grad is None for w in lm.parameters() if not w.requires_grad)
    assert all(torch.equal(dict(lm.named_parameters())[name], w) for name, w in frozen.items())
    trained = {name for name, w in lm.named_parameters() if w.requires_grad}
    assert all("lora_" in name or ".added." in name for name in trained)
    moved = (table.weight != before_table).any(1).nonzero()[:, 0].tolist()
    assert moved == sorted(lm.special.added)
    assert lm(**batch).loss < after.loss


def test_the_added_tokens_get_the_gradient_that_they_get_in_the_whole_model(place: Path) -> None:
    whole = wrapped(place).double()
    lm = wrapped(place).double()
    lm.load_state_dict(whole.state_dict())
    lm.add_lora(LoraConfig(rank=4), str(place))
    batch = small_batch(lm)
    for one in (whole, lm):
        one(**batch).loss.backward()
    ids = lm.special.added
    pairs = [(m.base.get_input_embeddings(), m.base.get_output_embeddings()) for m in (whole, lm)]
    for theirs, ours in zip(*pairs, strict=True):
        name = type(ours).__name__
        assert relative({name: ours.added.weight.grad}, {name: theirs.weight.grad[ids]}) < 1e-5
        assert (ours.added.weight.grad != 0).any(1).sum() >= 3, "all but <latent>, whose embedding is never used"


def test_saved_it_is_small_and_loaded_it_is_the_same(place: Path, tmp_path: Path) -> None:
    lm = corrected(place)
    lm.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {ADAPTER_FILE, ROWS_FILE, "adapter_config.json", "coconut.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    saved = [w for name in (ADAPTER_FILE, ROWS_FILE) for w in load_file(tmp_path / "adapter" / name).values()]
    assert sum(w.numel() for w in saved) == sum(w.numel() for w in lm.parameters() if w.requires_grad)

    again = LatentLM.from_pretrained(tmp_path / "adapter").eval()
    assert again.adapter == lm.adapter
    batch = small_batch(lm)
    assert torch.equal(again(**batch, return_logits=True).logits, lm(**batch, return_logits=True).logits)
    trained, there = ([n for n, w in m.named_parameters() if w.requires_grad] for m in (again, lm))
    assert trained == there


def test_merged_it_is_a_plain_model_that_computes_the_same(place: Path, tmp_path: Path) -> None:
    lm = corrected(place)
    batch = small_batch(lm)
    expected = lm(**batch, return_logits=True).logits
    merged = lm.merged()
    torch.testing.assert_close(merged(**batch, return_logits=True).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(lm(**batch, return_logits=True).logits, expected), "the model itself stays as it is"
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in wrapped(place).named_parameters()]
    assert all(w.requires_grad for w in merged.parameters())
    merged.save_pretrained(tmp_path / "merged")
    again = LatentLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(**batch, return_logits=True).logits, merged(**batch, return_logits=True).logits)
    ids = batch["input_ids"][:1, :5]
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(ids).logits, lm.base(ids).logits, rtol=0, atol=1e-5)
    asked = (ids[:, :3], None, 5)
    assert torch.equal(again.generate(*asked, num_thoughts=2).tokens, lm.generate(*asked, num_thoughts=2).tokens)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merged.merged()
    with pytest.raises(ValueError, match="has LoRA already"):
        lm.add_lora(LoraConfig(rank=4), str(place))


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_target_that_matches_nothing_is_named_with_those_that_are_there(place: Path) -> None:
    lm = wrapped(place)
    with pytest.raises(ValueError, match=r"names q_proj.*gpt2.*There are: c_attn, c_fc, c_proj\."):
        lm.add_lora(LoraConfig(rank=4, targets=["c_attn", "q_proj"]), str(place))
    assert lm.adapter is None
    assert all(weight.requires_grad for weight in lm.parameters()), "nothing was begun"
    lm.add_lora(LoraConfig(rank=4, targets=["attn.c_proj"]), str(place))
    corrections = {name.split(".lora_")[0] for name, _ in lm.named_parameters() if ".lora_" in name}
    assert corrections == {f"base.transformer.h.{layer}.attn.c_proj" for layer in range(2)}


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_base_that_is_gone_has_moved_or_is_another(place: Path, tmp_path: Path, data: DataConfig) -> None:
    lm = corrected(place)
    lm.save_pretrained(tmp_path / "adapter")
    place.rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=rf"need the model {place}, .*: there is no such folder\n.*ln -s PLACE {place}"
    ):
        LatentLM.from_pretrained(tmp_path / "adapter")
    again = LatentLM.from_pretrained(tmp_path / "adapter", base=str(tmp_path / "moved")).eval()
    batch = small_batch(lm)
    assert torch.equal(again(**batch).loss, lm(**batch).loss)
    pretrained(place, "gpt2", data, seed=1)
    with pytest.raises(ValueError, match="is not the one that the LoRA weights were trained on"):
        LatentLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama"])
def test_a_fingerprint_is_that_of_the_weights_alone(place: Path, tmp_path: Path, data: DataConfig) -> None:
    plain = AutoModelForCausalLM.from_pretrained(place)
    known = fingerprint(plain)
    assert fingerprint(wrapped(place).base) == known, "with tokens added"
    assert fingerprint(plain.bfloat16()) == known, "in another precision"
    assert fingerprint(AutoModelForCausalLM.from_pretrained(pretrained(tmp_path / "b", "llama", data, seed=1))) != known


def test_what_is_trained_beside_a_model_in_bfloat16_is_float32(tmp_path: Path, data: DataConfig) -> None:
    place = pretrained(tmp_path / "base", "llama", data, dtype=torch.bfloat16)
    lm = corrected(place)
    assert {w.dtype for w in lm.parameters() if w.requires_grad} == {torch.float32}
    assert lm.base.dtype == torch.bfloat16
    lm.save_pretrained(tmp_path / "adapter")
    batch = small_batch(lm)
    again = LatentLM.from_pretrained(tmp_path / "adapter").eval()
    assert again.base.dtype == torch.bfloat16
    assert torch.equal(again(**batch).loss, lm(**batch).loss)


def test_what_only_training_needs_is_float32_beside_a_model_in_bfloat16(tmp_path: Path, data: DataConfig) -> None:
    """A projector and a step decoder, of a model that has learned to think with a projector."""
    place, examples = pretrained(tmp_path / "base", "llama", data), read_examples(data.train)
    codi = make_model(small_run(tmp_path / "a", data, method="codi", model=ModelConfig(base=str(place))), examples)
    codi.save_pretrained(tmp_path / "codi")
    lowered = EngineConfig(device="cpu", threads=1, precision=Precision.bfloat16)
    config = lora_run(tmp_path / "b", place, data, init=str(tmp_path / "codi"), method="sim_cot_codi", engine=lowered)
    lm = make_model(config, examples).eval()
    assert lm.base.dtype == torch.bfloat16
    trained = [w for w in TrainingModel(lm, config.plan()).parameters() if w.requires_grad]
    assert {w.dtype for w in trained} == {torch.float32}
    assert {id(w) for w in lm.feedback.parameters()} <= {id(w) for w in trained}
    assert all(torch.equal(w, its) for w, its in zip(lm.feedback.parameters(), codi.feedback.parameters(), strict=True))
    prompt = encode_questions(lm.tokenizer, [examples[0].question], lm.reasoning.format)
    values = name_probabilities(lm, prompt, [list(spell(lm, ["0", "1"], symbolic=True).values())], range(3), 1)
    assert all(0 < share < 1 for shares in values.values() for share in shares)


# --- runs -------------------------------------------------------------------------------------------


def lora_run(folder: Path, place: Path, data: DataConfig, **changes: Any) -> TrainConfig:
    model = ModelConfig(base=str(place), new_token_init="random", lora=LoraConfig(rank=4, dropout=0.1))
    return small_run(folder, data, **{"model": model, "save_every": 1, "keep_checkpoints": 100, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("coconut", Precision.float32), ("coconut", Precision.bfloat16), ("lt_tuning", Precision.bfloat16),
        ("colar", Precision.float32), ("colar", Precision.bfloat16), ("c_mtp", Precision.bfloat16),
    ],
)  # fmt: skip
def test_a_run_resumed_equals_one_uninterrupted(
    place: Path, tmp_path: Path, data: DataConfig, method: str, precision: Precision
) -> None:
    finished, folder = tmp_path / "finished", tmp_path / "resumed"
    engine = EngineConfig(device="cpu", threads=1, precision=precision)
    options: dict[str, Any] = {"method": method, "engine": engine}
    assert run(lora_run(finished, place, data, **options)) == 0
    assert run(lora_run(copy_until(3, finished, folder), place, data, **options)) == 0
    same_end(folder, finished)
    first, end = (Checkpoints(finished).path(step) for step in (1, Checkpoints(finished).steps()[-1]))
    head = {WEIGHTS_FILE} if get_method(method).slot.merges else set()
    assert {file.name for file in end.glob("*.safetensors")} == {ADAPTER_FILE, ROWS_FILE} | head
    for name in (ADAPTER_FILE, ROWS_FILE, *head):
        before, after = (load_file(checkpoint / name) for checkpoint in (first, end))
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert moved == after.keys() - {"projector.scale"}, "all that is saved is trained"
        assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert read_json(end / "coconut.json")["lora"]["base"] == str(place)


@pytest.mark.parametrize("family", ["gpt2"])
def test_what_a_run_begins_with(place: Path, tmp_path: Path, data: DataConfig) -> None:
    examples = read_examples(data.train)
    first = make_model(lora_run(tmp_path / "a", place, data), examples)
    assert first.adapter is not None
    assert (first.adapter.base, first.adapter.settings.rank) == (str(place), 4)
    first.save_pretrained(tmp_path / "adapter")
    first.merged().save_pretrained(tmp_path / "whole")

    on_whole = make_model(lora_run(tmp_path / "b", place, data, init=str(tmp_path / "whole")), examples)
    assert on_whole.adapter is not None
    assert on_whole.adapter.base == str(tmp_path / "whole")
    again = make_model(lora_run(tmp_path / "c", place, data, init=str(tmp_path / "adapter")), examples)
    assert again.adapter == first.adapter
    lowered = EngineConfig(device="cpu", threads=1, precision=Precision.bfloat16)
    in_bfloat16 = make_model(lora_run(tmp_path / "f", place, data, engine=lowered), examples)
    assert {w.dtype for w in in_bfloat16.parameters() if w.requires_grad} == {torch.float32}
    assert {w.dtype for w in in_bfloat16.parameters() if not w.requires_grad} == {torch.bfloat16}
    other = lora_run(tmp_path / "d", place, data, init=str(tmp_path / "adapter"))
    other.model.lora = LoraConfig(rank=8)
    with pytest.raises(ValueError, match=r"has LoRA already.*merged"):
        make_model(other, examples)
    with pytest.raises(ValueError, match=r"holds LoRA weights.*merged"):
        make_model(lora_run(tmp_path / "e", tmp_path / "adapter", data), examples)


def test_it_is_asked_for_from_the_command_line() -> None:
    config = composed("train", TrainConfig, ["model.lora.rank=8", "model.lora.targets=[q_proj,mlp.c_fc]"])
    assert config.model.lora == LoraConfig(rank=8, targets=["q_proj", "mlp.c_fc"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "rank is -1; it must be at least 0"),
        ({"alpha": 8.0}, r"alpha=8\.0 needs LoRA"),
        ({"targets": ["q_proj"]}, "needs LoRA"),
        ({"rank": 4, "alpha": 0.0}, "it must be above 0"),
        ({"rank": 4, "dropout": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**wrong)


def test_a_new_model_is_refused(tmp_path: Path, data: DataConfig) -> None:
    model = replace(small_run(tmp_path, data).model, lora=LoraConfig(rank=4))
    with pytest.raises(ValueError, match=r"rank=4 needs a pretrained model.*init=RUN"):
        small_run(tmp_path, data, model=model)
