"""Trainings that begin with what people have: GGUF files, sharded bfloat16 folders, instruct models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from helpers.gguf_files import llama_and_tokenizer, small_llama, write_gguf
from helpers.models import byte_level_tokenizer
from helpers.runs import graph_files, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from coconut import LatentLM, answer
from coconut.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, Precision, TaskName
from coconut.data.examples import read_examples
from coconut.data.tokenization import tokenize
from coconut.export import run as run_export
from coconut.hub.config import ExportConfig
from coconut.methods import Curriculum, PromptFormat, Unit
from coconut.runs.loading import starting_point
from coconut.training.model_setup import make_model
from coconut.training.trainer import run as run_train
from coconut.utils.files import read_json, write_json

TEXTS = ["Is Tom a cat?", "How many? 12 + 34 = 46\n### 46", "ünïcode"]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_from_a_gguf_file_is_a_plain_model(lora: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Saved, opened again and exported, it is marked as quantised nowhere."""
    model, tokenizer = llama_and_tokenizer()
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer, GGMLQuantizationType.Q4_1)
    base = ModelConfig(base=str(file), lora=LoraConfig(rank=lora))
    data = replace(graph_files(tmp_path, 32, 8, 8), format=PromptFormat("{} ", "cat {}\n", "{}"))
    assert run_train(small_run(tmp_path / "run", data, model=base)) == 0
    assert "in 32 of the first 32 rows the tokens at their ends are others" in capsys.readouterr().out
    trained = LatentLM.from_pretrained(starting_point(str(tmp_path / "run")))
    assert run_export(ExportConfig(run=str(tmp_path / "run"), output=str(tmp_path / "out"))) == 0
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert not getattr(plain, "is_quantized", False)
    ids = torch.arange(20)[None]
    whole: Any = trained.merged().base if lora else trained.base
    torch.testing.assert_close(plain(ids).logits, whole(ids).logits)
    again: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("lora", [0, 2])
def test_a_sharded_bfloat16_folder(lora: int, tmp_path: Path) -> None:
    """Its weights are trained in float32; under LoRA in bfloat16 they stay as they are."""
    model, tokenizer = llama_and_tokenizer()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("model-*-of-*.safetensors"))) > 2
    data, engine = graph_files(tmp_path, 8, 4, 4), EngineConfig(device="cpu", precision=Precision.bfloat16)
    base = ModelConfig(base=str(tmp_path / "base"), lora=LoraConfig(rank=lora))
    made = make_model(small_run(tmp_path / "run", data, model=base, engine=engine), read_examples(data.train))
    loaded = dict((made.merged() if lora else made).base.named_parameters())
    for name, weight in model.named_parameters():
        own = loaded[name][: len(weight)]  # the tables have rows for the added tokens, too
        assert own.dtype == (torch.bfloat16 if lora else torch.float32)
        assert torch.equal(own, weight.to(own.dtype)), name


SMOLLM2_CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # of SmolLM2-135M-Instruct (Apache-2.0)


@pytest.mark.slow
def test_an_instruct_model_ends_its_turn(tmp_path: Path) -> None:
    """With SmolLM2's chat template a row is a whole conversation, and generation stops at the end of the turn."""
    tokenizer: Any = byte_level_tokenizer()
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        }
    )
    tokenizer.chat_template = SMOLLM2_CHAT
    small_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"question": f"{a} + {a} + 1?", "steps": [f"{a}+{a}={2 * a}"], "answer": str(2 * a + 1)} for a in range(6)]
    write_json(tmp_path / "rows.json", rows)
    form, file = PromptFormat("{}", "{}\n", "### {}", chat=True), str(tmp_path / "rows.json")
    data = DataConfig(TaskName.numbers, train=file, valid=file, format=form)

    tokens = tokenize(read_examples(file), tokenizer, form)
    for i, row in enumerate(rows):
        said = f"{row['steps'][0]}\n### {row['answer']}"
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": said}]
        ids = tokens.tokens[tokens.starts[i] : tokens.starts[i + 1]].tolist()
        assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")

    config = small_run(
        tmp_path / "run", data, model=ModelConfig(base=str(tmp_path / "base")), method="cot", max_new_tokens=30,
        curriculum=Curriculum(length_unit=Unit.updates, total_length=80),
    )  # fmt: skip
    assert run_train(config) == 0
    lm = LatentLM.from_pretrained(starting_point(str(tmp_path / "run")))
    out = answer(lm, [row["question"] for row in rows])
    assert out.texts == [f"{row['steps'][0]}\n### {row['answer']}" for row in rows]
    assert (out.lengths < 30).all()
