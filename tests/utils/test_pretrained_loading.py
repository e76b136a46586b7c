"""Loading pretrained models: code in a model folder needs an opt-in, and an unreachable hub is reported at once."""

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
from coconut.utils.pretrained import explain_load_errors, hub_unreachable, load_pretrained, resolve_local_path

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
def custom_model(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a LatentLM with a custom model class, and a file that its code creates when it runs."""
    folder, trace = tmp_path / "odd", tmp_path / "it_ran"
    build("gpt2").save_pretrained(folder)
    auto = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "model_type": "odd", "auto_map": auto})
    (folder / "odd.py").write_text(CODE.format(trace=str(trace)))
    return folder, trace


@pytest.mark.parametrize("kind", [AutoConfig, AutoModelForCausalLM])
def test_remote_code_requires_opt_in(custom_model: tuple[Path, Path], kind: type) -> None:
    folder, trace = custom_model
    with pytest.raises(ValueError, match=r"odd needs its own code.* COCONUT_REMOTE_CODE=1"):
        load_pretrained(kind, folder)
    with pytest.raises(ValueError, match="COCONUT_REMOTE_CODE=1"):
        LatentLM.from_pretrained(folder)
    assert not trace.exists()


def test_remote_code_runs_after_opt_in(
    custom_model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, trace = custom_model
    monkeypatch.setenv("COCONUT_REMOTE_CODE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert type(LatentLM.from_pretrained(folder).base).__name__ == "OddModel"
    assert trace.exists()
    assert os.listdir(tmp_path / "modules")


class BusyHub(BaseHTTPRequestHandler):
    """A hub that answers every request with 503 and counts the requests."""

    num_requests = 0

    def do_HEAD(self) -> None:
        type(self).num_requests += 1
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
def test_unreachable_hub_is_reported_without_retries(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with (
        pytest.raises(
            ValueError, match=r"one/model could not be loaded.*: http://127\.0\.0\.1:9 does not answer \(.*, and"
        ),
        explain_load_errors("one/model", "base"),
    ):
        load_pretrained(AutoConfig, "one/model")
    with pytest.raises(FileNotFoundError, match=r"one/model is not a local folder.*9 does not answer"):
        resolve_local_path("one/model")
    assert time.monotonic() - began < 8, "the library's retries take 23 seconds for each file"
    assert "Retry" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("online")
def test_cached_models_load_without_the_hub(tmp_path: Path, online: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--one--model"
    build("gpt2").save_pretrained(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    online.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_pretrained(AutoConfig, "one/model", cache_dir=tmp_path).model_type == "gpt2"
    assert resolve_local_path("one/model") == cached / "snapshots" / "1"


def test_hub_counts_as_reachable_after_any_answer(online: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BusyHub) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        online.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            assert [hub_unreachable(), hub_unreachable()] == ["", ""]
        finally:
            server.shutdown()
    assert BusyHub.num_requests == 1
    online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub_unreachable() == "HF_HUB_OFFLINE is set"
