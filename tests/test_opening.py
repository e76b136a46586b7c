"""Code that a model's folder brings along is run only if it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import build
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.files import read_json, write_json
from coconut.opening import opened

CODE = """
from pathlib import Path

from transformers import GPT2Config, GPT2LMHeadModel

Path({trace!r}).touch()


class OddConfig(GPT2Config):
    model_type = "odd"


class OddModel(GPT2LMHeadModel):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a LatentLM whose model is of a class of its own, and what its code leaves behind when it runs."""
    folder, trace = tmp_path / "odd", tmp_path / "it_ran"
    build("gpt2").save_pretrained(folder)
    auto = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "odd", "auto_map": auto})
    (folder / "odd.py").write_text(CODE.format(trace=str(trace)))
    return folder, trace


@pytest.mark.parametrize("kind", [AutoConfig, AutoModelForCausalLM])
def test_it_is_not_run_unasked(odd: tuple[Path, Path], kind: type) -> None:
    folder, trace = odd
    with pytest.raises(ValueError, match=r"odd needs code that it brings along.* COCONUT_REMOTE_CODE=1"):
        opened(kind, folder)
    with pytest.raises(ValueError, match="COCONUT_REMOTE_CODE=1"):
        LatentLM.from_pretrained(folder)
    assert not trace.exists()


def test_it_is_run_when_asked_for(odd: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, trace = odd
    monkeypatch.setenv("COCONUT_REMOTE_CODE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert type(LatentLM.from_pretrained(folder).base).__name__ == "OddModel"
    assert trace.exists()
    assert os.listdir(tmp_path / "modules")
