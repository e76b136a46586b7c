"""Code that a model's folder brings along is run only if it is asked for; a hub that does not answer is asked once."""

from __future__ import annotations

import os
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from helpers.models import build
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.utils.files import read_json, write_json
from coconut.utils.pretrained import explain_load_errors, load_pretrained, out_of_reach, resolve_local_path

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
        load_pretrained(kind, folder)
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


class Busy(BaseHTTPRequestHandler):
    """A hub that answers with an error, and as often as it is asked counts."""

    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return monkeypatch


@pytest.mark.usefixtures("online")
def test_a_hub_that_does_not_answer_is_told_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with (
        pytest.raises(
            ValueError, match=r"one/model could not be loaded.*: http://127\.0\.0\.1:9 does not answer \(.*, and"
        ),
        explain_load_errors("one/model", "base"),
    ):
        load_pretrained(AutoConfig, "one/model")
    with pytest.raises(FileNotFoundError, match=r"one/model is no folder here.*9 does not answer"):
        resolve_local_path("one/model")
    assert time.monotonic() - began < 8, "the library's retries take 23 seconds for each file"
    assert "Retry" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("online")
def test_a_copy_in_the_cache_needs_no_hub(tmp_path: Path, online: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--one--model"
    build("gpt2").save_pretrained(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    online.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_pretrained(AutoConfig, "one/model", cache_dir=tmp_path).model_type == "gpt2"
    assert resolve_local_path("one/model") == cached / "snapshots" / "1"


def test_a_hub_is_there_whatever_it_answers(online: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        online.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            assert [out_of_reach(), out_of_reach()] == ["", ""]
        finally:
            server.shutdown()
    assert Busy.asked == 1
    online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert out_of_reach() == "HF_HUB_OFFLINE is set"
