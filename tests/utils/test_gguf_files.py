"""GGUF files: the weights that are loaded from them, and their tokenizers."""

from __future__ import annotations

import sys
from pathlib import Path
from struct import unpack
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from helpers.gguf_files import llama_and_tokenizer, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coconut.utils.pretrained import load_pretrained

TEXTS = ["Is Tom a cat?", "How many? 12 + 34 = 46\n### 46", "ünïcode"]


def stored(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A matrix as the file holds it, read byte by byte in blocks of 32 numbers.

    Q8_0: a scale d and 32 int8 q, for q d. Q4_1: d, an offset m and 32 half bytes q, for q d + m.
    """
    if kind in ("F32", "F16"):
        return weight.to(torch.float16 if kind == "F16" else torch.float32).float()
    written = quantize(weight.numpy(), GGMLQuantizationType[kind]).tobytes()
    size, found = {"Q8_0": 2 + 32, "Q4_1": 2 + 2 + 16}[kind], []
    for start in range(0, len(written), size):
        block = written[start : start + size]
        if kind == "Q8_0":
            found += [q * unpack("<e", block[:2])[0] for q in unpack("<32b", block[2:])]
        else:
            scale, offset = unpack("<ee", block[:4])
            found += [
                q * scale + offset for q in (*(byte % 16 for byte in block[4:]), *(byte // 16 for byte in block[4:]))
            ]
    return torch.tensor(found).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_tokenizer_of_a_gguf_file(
    kind: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = llama_and_tokenizer(tie_word_embeddings=tied)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    file = write_gguf(tmp_path / "small.gguf", model, tokenizer, GGMLQuantizationType[kind])
    loaded: Any = load_pretrained(AutoModelForCausalLM, file, dtype=torch.float32)
    count = sum(weight.numel() for weight in model.parameters())
    assert f"small.gguf: {count:,} parameters, dequantised from {kind} to float32" in capsys.readouterr().out
    expected = {
        name: weight if weight.ndim == 1 else stored(weight, kind) for name, weight in model.state_dict().items()
    }
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    model.load_state_dict(expected)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)

    read: Any = load_pretrained(AutoTokenizer, str(file))
    assert [read(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert len(read) == len(tokenizer)
    assert (read.eos_token_id, read.chat_template) == (tokenizer.eos_token_id, tokenizer.chat_template)
    assert load_pretrained(AutoConfig, file).hidden_size == 32


def test_errors_of_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "small.gguf"
    with pytest.raises(ValueError, match=r"small\.gguf does not exist"):
        load_pretrained(AutoModelForCausalLM, file)
    write_gguf(file, *llama_and_tokenizer())
    with pytest.raises(ValueError, match=r"no config\.json, but GGUF files: small\.gguf\. Name one: .*/small\.gguf"):
        load_pretrained(AutoModelForCausalLM, tmp_path)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not this"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged, or no GGUF file"):
            load_pretrained(AutoModelForCausalLM, file)
    file.write_bytes(whole.replace(b"llama", b"lamma"))
    with pytest.raises(ValueError, match=r"transformers cannot read .*small\.gguf .*lamma.*config\.json"):
        load_pretrained(AutoModelForCausalLM, file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install gguf accelerate, or 'coconut-latent\[gguf\]'"):
        load_pretrained(AutoTokenizer, file)
