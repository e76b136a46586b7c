"""Exporting models: model card, upload to the hub, and checkpoints of the released code."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from helpers import ROOT
from helpers.models import ARCHITECTURES, build, byte_level_tokenizer
from helpers.runs import graph_files, small_run
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.config import DataFiles, TaskName
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.export import run as run_export
from coconut.generate import run as run_generate
from coconut.generation.config import GenerateConfig, StopRule
from coconut.generation.generate import answer
from coconut.hub.config import ExportConfig
from coconut.hub.folder import GENERATE_FILE, write_folder
from coconut.hub.model_card import card
from coconut.hub.released_checkpoints import from_released
from coconut.methods import NOTHING, PAUSES, THOUGHTS, Projector, PromptFormat, Reasoning, Slot, Source, Update
from coconut.runs.description import read_config
from coconut.training.trainer import run as run_train
from coconut.utils.files import read_json


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    run_train(small_run(folder / "run", graph_files(folder, 64, 16, 16)))
    run_evaluate(EvaluateConfig(run=str(folder / "run")))
    return folder / "run"


def test_exported_folder_has_shards_and_a_card(trained_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    run_export(ExportConfig(run=str(trained_run), output=str(folder), max_shard_size="10KB"))
    assert len(list(folder.glob("model-*.safetensors"))) > 1, "weights are split"
    card = (folder / "README.md").read_text()
    result = json.loads((trained_run / "evaluation" / "test.json").read_text())
    assert f"| test | {100 * result['accuracy']:.1f} % |" in card
    assert "2 continuous thoughts" in card
    assert "pypi.org" not in card, "the package is on no index"
    with pytest.raises(ValueError, match="not empty"):
        run_export(ExportConfig(run=str(trained_run), output=str(folder)))


def test_model_card_says_what_the_plain_model_lacks() -> None:
    lm = build("llama", torch.float32, slot=THOUGHTS, num_thoughts=3)
    assert "nothing stands between question and answer" in card(lm)
    lm.reasoning = replace(lm.reasoning, slot=NOTHING, markers=False, num_thoughts=0)
    assert "Without it" not in card(lm)
    lm.add_gates()
    assert "without the gates" in card(lm)


@pytest.mark.slow
def test_model_card_code_gives_the_same_answers(tmp_path: Path) -> None:
    """Where this package cannot be imported; with a chat template and without, and tokens that texts begin with."""
    questions = ["3 7 21", "8 9", "4 1 1 1 30 2", "17"]
    lines, expected, chosen = [], [], set()
    projected = Slot(Source.thought, Projector.mlp_ln, width=20)
    at_once = replace(projected, update=Update.jacobi, iterations=2)
    merging = Slot(Source.thought, Projector.multi_token, update=Update.teacher_forced, group=2)
    cases = [*product((NOTHING, PAUSES, THOUGHTS, projected), ("", "chat", "start")), (NOTHING, "hybrid"),
             (NOTHING, "gated"), (at_once, ""), (merging, "")]  # fmt: skip
    for number, (slot, kind) in enumerate(cases):
        folder, form = tmp_path / str(number), PromptFormat("5 {}", "{} ", "6 {}", chat=kind == "chat")
        lm = build("llama", torch.float32, slot=slot, markers=slot != NOTHING,
                   num_thoughts=3 * (slot != NOTHING), max_new_tokens=8, format=form)  # fmt: skip
        if kind == "hybrid":
            lm.add_modes(["short", "latent_2", "latent_3"], init="random")
        if kind == "gated":
            lm.add_gates(0.3, 0.6)
        if kind == "start":
            begins_and_ends = processors.TemplateProcessing("7 $0 </s>", special_tokens=[("7", 10), ("</s>", 1)])
            lm.tokenizer.backend_tokenizer.post_processor = begins_and_ends
        lm.tokenizer.chat_template = "{{ '0 ' + messages[0].content + ' 1 ' }}" if kind == "chat" else None
        write_folder(lm, folder, card(lm))
        [_, code] = re.findall(r"```python\n(.*?)```", card(lm), flags=re.DOTALL)
        assert len(code.strip().splitlines()) <= 8
        assert ("torch.tensor" in code) == (kind == "start"), "what the tokenizer adds after a question is left out"
        assert "'5 a question'" in code
        for question in questions:
            lines.append(code.replace("THIS FOLDER", str(folder)).replace("'5 a question'", f"'5 {question}'"))
            lines.append("print('<answer>')")
            output = answer(lm, [question])
            new = output.tokens[0, : int(output.lengths[0])]
            expected.append(str(lm.tokenizer.decode(new, skip_special_tokens=True)).strip())
            chosen.add(output.modes[0])
    assert len(set(expected)) > 16, "the answers differ"
    assert len(chosen) > 2, "and several modes are chosen"
    (tmp_path / "alone.py").write_text("\n".join([WITHOUT_PACKAGE, *lines]))
    done = subprocess.run(
        [sys.executable, "-I", "alone.py"], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [text.strip() for text in done.stdout.split("<answer>")[:-1]] == expected


WITHOUT_PACKAGE = """
import os, sys
sys.path = [place for place in sys.path if not os.path.isfile(os.path.join(place, "coconut", "__init__.py"))]
try:
    from coconut import LatentLM
except ImportError:
    pass
else:
    raise AssertionError(LatentLM)
"""


def test_failed_upload_keeps_the_export(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in the error message uploads with the same visibility."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for private in (True, False):
        folder = tmp_path / f"a model {private}"
        message = r"someone/thing was not uploaded: http://127\.0\.0\.1:9 does not"
        with pytest.raises(ValueError, match=message) as caught:
            run_export(ExportConfig(run=str(trained_run), output=str(folder), push="someone/thing", private=private))
        assert (folder / "model.safetensors").is_file()
        python, flag, code = shlex.split(str(caught.value).partition("This uploads it: ")[2])
        assert (python, flag) == ("python", "-c")
        sent: dict[str, Any] = {}
        recorded = "import push as real; push = lambda *a, **k: sent.update(a=a, **k)"
        exec(code.replace("import push", recorded), {"sent": sent})
        assert sent == {"a": (str(folder), "someone/thing"), "private": private}


class Hub(BaseHTTPRequestHandler):
    """A local server for the requests of an upload; `kept` holds the files by name."""

    kept: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict[str, Any]]] = []
    private: ClassVar[bool] = True

    def do_GET(self) -> None:
        self.answer({"id": "someone/thing", "private": self.private})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            answer = {"url": "https://huggingface.co/someone/thing"}
        elif "/preupload/" in self.path:
            answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for file in json.loads(body)["files"]]}  # fmt: skip
        elif "/commit/" in self.path:
            parts = [json.loads(line) for line in body.splitlines()]
            self.kept.update({part["value"]["path"]: base64.b64decode(part["value"]["content"])
                              for part in parts if part["key"] == "file"})  # fmt: skip
            answer = {"commitUrl": "https://huggingface.co/someone/thing/commit/1", "commitOid": "1", "success": True}
        self.answer(answer)

    def answer(self, answer: dict[str, Any]) -> None:
        output = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(output)))
        self.end_headers()
        self.wfile.write(output)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def test_uploaded_files_load_as_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a local server with the hub's protocol. A private upload to a public repository is refused."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        lm = build("gpt2", torch.float32, num_thoughts=2)
        try:
            monkeypatch.setattr(Hub, "private", False)
            with pytest.raises(ValueError, match=r"someone/thing exists on the hub and is public.*private=false"):
                lm.push_to_hub("someone/thing")
            assert not Hub.kept
            monkeypatch.setattr(Hub, "private", True)
            lm.push_to_hub("someone/thing")
        finally:
            server.shutdown()
    [made] = Hub.made[1:]
    assert (made["name"], made["organization"]) == ("thing", "someone")
    assert made.get("visibility") == "private" or made["private"], "the key of older and of newer versions"
    for name, content in Hub.kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / GENERATE_FILE).read_text() == (ROOT / "coconut" / "hub" / "custom_generate.py").read_text()
    assert (tmp_path / "README.md").read_text() == card(lm, name="someone/thing")
    reloaded = LatentLM.from_pretrained(tmp_path)
    assert reloaded.reasoning == lm.reasoning
    assert answer(reloaded, ["3 7 21"]).texts == answer(lm, ["3 7 21"]).texts


# --- the released code's checkpoints ----------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with the config and tokenizer of a small GPT-2."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **ARCHITECTURES["gpt2"]
    )
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_released(base: Path, file: Path, prefix: str = "base_causallm.", more: int = 3) -> Any:
    """Save a state dict in the form of the released code; returns its model."""
    config = AutoConfig.from_pretrained(base)
    config.vocab_size += more
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    if prefix:
        state["embedding.weight"] = model.get_input_embeddings().weight.data
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # as older versions of transformers saved it
    torch.save(state, file)
    return model.eval()


@pytest.mark.parametrize("prefix", ["base_causallm.", "module.base_causallm.", "_fsdp_wrapped_module.base_causallm."])
def test_released_checkpoint_gives_the_same_answer(base: Path, tmp_path: Path, prefix: str) -> None:
    model = save_released(base, tmp_path / "checkpoint_6", prefix)
    output = tmp_path / "model"
    run_export(ExportConfig(released=str(tmp_path / "checkpoint_6"), base=str(base), stage=2, output=str(output)))
    lm = LatentLM.from_pretrained(output)
    assert (lm.reasoning.num_thoughts, lm.reasoning.stage, lm.reasoning.slot) == (2, 2, THOUGHTS)
    assert lm.new_tokens["tokens"] == ["<pause>"], "the other three are as they were trained"
    first = model.config.vocab_size - 3
    assert [lm.special.bot, lm.special.eot, lm.special.latent] == [first, first + 1, first + 2]

    question = lm.tokenizer("Is Tom a cat?\n")["input_ids"]
    embeds = model.get_input_embeddings()(torch.tensor([[*question, first]]))
    for _ in range(2):
        thought = model.transformer(inputs_embeds=embeds).last_hidden_state[:, -1:]
        embeds = torch.cat([embeds, thought], dim=1)
    embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[first + 1]]))], dim=1)
    logits = model(inputs_embeds=embeds).logits[0, -1, :first]
    assert answer(lm, ["Is Tom a cat?"], max_new_tokens=1).tokens.tolist() == [[int(logits.argmax())]]


def test_released_baseline_without_markers(base: Path, tmp_path: Path) -> None:
    save_released(base, tmp_path / "cot", prefix="", more=0)
    lm = from_released(tmp_path / "cot", str(base), Reasoning(method="cot", slot=NOTHING, markers=False))
    assert lm.reasoning.method == "cot"
    with pytest.raises(ValueError, match="without the markers that coconut needs"):
        from_released(tmp_path / "cot", str(base), Reasoning(num_thoughts=2))


def test_wrong_released_files_are_refused(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    thinking = Reasoning(num_thoughts=2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        from_released(file, str(base), thinking)
    for content, message in (
        ([1, 2], "no state dict"),
        (Reasoning(), "must contain tensors only"),
        ({"base_causallm.other": torch.zeros(3)}, r"no transformer\.wte\.weight"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=message):
            from_released(file, str(base), thinking)
    save_released(base, file, more=7)
    with pytest.raises(ValueError, match="the released code adds 3"):
        from_released(file, str(base), thinking)
    save_released(base, file)
    state, name = torch.load(file, weights_only=True), "base_causallm.transformer.h.0.mlp.c_fc.weight"
    broken: list[tuple[dict[Any, torch.Tensor], str]] = [
        ({"base_causallm.transformer.h.9.ln_1.weight": torch.zeros(32)}, "1 is too many"),
        ({name: state[name][:, :-1]}, r"h\.0\.mlp\.c_fc\.weight is \(32, 127\) there and \(32, 128\) here"),
        ({5: torch.zeros(1)}, "no state dict"),
    ]
    for changes, message in broken:
        torch.save({**state, **changes}, file)
        with pytest.raises(ValueError, match=message):
            from_released(file, str(base), thinking)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="must contain tensors only"):
        from_released(file, str(base), thinking)


@pytest.mark.parametrize("tied", [True, False])
def test_released_head_may_be_missing_only_if_tied(base: Path, tmp_path: Path, tied: bool) -> None:
    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = tied
    config.save_pretrained(base)
    save_released(base, tmp_path / "all")
    state = torch.load(tmp_path / "all", weights_only=True)
    del state["base_causallm.lm_head.weight"]
    torch.save(state, tmp_path / "file")
    if tied:
        assert from_released(tmp_path / "file", str(base), Reasoning(num_thoughts=2)).latent_id
    else:
        with pytest.raises(ValueError, match=r"1 is missing \(base_causallm\.lm_head\.weight\)"):
            from_released(tmp_path / "file", str(base), Reasoning(num_thoughts=2))


@pytest.mark.parametrize("name", ["justname", "a/b/c", "-a/b", "a/b c"])
def test_invalid_hub_name_is_refused_before_exporting(trained_run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"push={name} is not a valid OWNER/NAME"):
        run_export(ExportConfig(run=str(trained_run), output=str(tmp_path / "model"), push=name))
    assert not (tmp_path / "model").exists()


def test_saved_model_answers_by_folder_or_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = build("gpt2", torch.float32, num_thoughts=2)
    cached = tmp_path / "models--someone--thing"
    lm.save_pretrained(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    expected = answer(lm, ["3 7 21"], max_new_tokens=5).texts[0].strip()
    for place in (str(cached / "snapshots" / "1"), "someone/thing"):
        run_generate(GenerateConfig(run=place, question="3 7 21", max_new_tokens=5))
        assert capsys.readouterr().out.strip() == expected
    with pytest.raises(FileNotFoundError, match=r"someone/other is not a local folder, .* as OWNER/NAME"):
        run_generate(GenerateConfig(run="someone/other", question="3 7 21"))
    message = r"is a saved model and not a run.*coconut generate run=.*coconut evaluate run="
    with pytest.raises(ValueError, match=message):
        read_config(cached / "snapshots" / "1")


def test_saved_model_evaluates_like_its_run(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_export(ExportConfig(run=str(trained_run), output="model"))
    file = str(trained_run.parent / "test.json")
    config_of_model = EvaluateConfig(run="model", data=DataFiles(test=file), judge=TaskName.prosqa)
    run_evaluate(config_of_model)
    run_evaluate(replace(config_of_model, output="elsewhere"))
    expected = read_json(trained_run / "evaluation" / "test.json")
    for folder in (tmp_path / "evaluation" / "model", tmp_path / "elsewhere"):
        [result] = [read_json(path) for path in folder.glob("*.json")]
        assert {key for key in result if result[key] != expected[key]} <= {
            "file", "seconds_per_item", "step", "checkpoint", "seen"
        }  # fmt: skip
        assert result["step"] is result["seen"] is None
        [answers] = folder.glob("*.predictions.jsonl")
        assert answers.read_text() == (trained_run / "evaluation" / "test.predictions.jsonl").read_text()
    for config, message in (
        (EvaluateConfig(run="model"), r"model is a saved model.*record its task.*judge=NAME .*prosqa.*data\.test="),
        (replace(config_of_model, checkpoint="last"), "checkpoint=last is for runs only"),
        (replace(config_of_model, stop=StopRule.classifier), "stop=classifier is for runs only"),
        (replace(config_of_model, run="nowhere", judge=None), "nowhere is not a run: there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            run_evaluate(config)
    with pytest.raises(OSError, match=r"test\.json cannot be written to: .*output="):
        run_evaluate(replace(config_of_model, output=file))


@pytest.mark.parametrize(
    ("values", "message"),
    [({}, "either run=DIR"), ({"run": "a", "released": "b"}, "either run=DIR"), ({"run": "a"}, "output=FOLDER"),
     ({"released": "a", "output": "b"}, "base=NAME"),
     ({"released": "a", "output": "b", "base": "c", "method": "coconut"}, "stage=K: coconut has thoughts"),
     ({"run": "a", "output": "b", "method": "x"}, "'?x'?")],
)  # fmt: skip
def test_missing_export_keys_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig(**values)
