"""Small real models and data, shared by the tests."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import MethodType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import coconut

if not Path(coconut.__file__).with_name("methods").is_dir():
    raise ImportError(f"Another package named coconut shadows this one: {coconut.__file__}")

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from coconut.config import DataConfig, EngineConfig, ModelConfig, OptimizerConfig, Task, TrainConfig
from coconut.data.examples import Example
from coconut.data.tokenization import build_word_tokenizer
from coconut.methods import Curriculum, PromptFormat, Reasoning, Unit
from coconut.models.latent_lm import LatentLM
from coconut.runs.checkpoints import Checkpoints, load_state, load_trainer
from coconut.runs.description import read_metrics
from coconut.utils.files import write_json
from data_builders.prosqa import Form, Preset, ProsqaBuild, draw_row

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and in all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [Example(" ".join(map(str, range(40))), ("a b",), "c")]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "max_position_embeddings": 96},
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 96},
}  # fmt: skip


def graph_rows(seed: int, count: int, nodes: int = 8) -> list[dict[str, Any]]:
    """Small graphs in symbols, with questions."""
    dials = ProsqaBuild(preset=Preset.graphs, nodes=nodes).graph_dials()
    drawn = (draw_row(random.Random(f"{seed} {i}"), lambda key: True, dials, Form.symbols) for i in range(count))
    return [found[0] for found in drawn if found]


def graph_files(folder: Path, train: int, valid: int, test: int) -> DataConfig:
    """Files of so many graphs in a folder."""
    rows = iter(graph_rows(seed=0, count=train + valid + test))
    files: dict[str, Any] = {}
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        write_json(folder / f"{split}.json", list(islice(rows, count)))
        files[split] = str(folder / f"{split}.json")
    return DataConfig(Task.prosqa, **files, format=PromptFormat("{}", "{} ", "### {}"))


def small_run(folder: Path, data: DataConfig, **changes: Any) -> TrainConfig:
    """A run of seconds, of three stages."""
    architecture = {"model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "intermediate_size": 32, "max_position_embeddings": 96}  # fmt: skip
    values: dict[str, Any] = {
        "run": str(folder),
        "curriculum": Curriculum(
            max_stage=2, length_unit=Unit.updates, stage0_length=2, stage_length=2, total_length=6
        ),
        "model": ModelConfig(architecture=architecture, tokenizer="words", new_token_init="random"),
        "data": data,
        "optimizer": OptimizerConfig(lr=1e-2),
        "engine": EngineConfig(device="cpu", threads=1),
        "batch_size": 16,
        "max_new_tokens": 6,
    }
    return TrainConfig(**{**values, **changes})


def same_end(folder: Path, other: Path) -> None:
    """Bit for bit: weights, optimizer, random states, best so far, and every number in metrics.jsonl."""
    ends = [Checkpoints(run).last() for run in (folder, other)]
    assert ends[0]
    assert ends[1]
    assert ends[0].name == ends[1].name
    ours, theirs = (load_file(end / "model.safetensors") for end in ends if end)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    a, b = (load_trainer(end) for end in ends if end)
    for mine, its in zip(a["random"], b["random"], strict=True):
        assert torch.equal(mine["cpu"], its["cpu"])
    for index, state in b["optimizer"]["state"].items():
        assert all(torch.equal(value, a["optimizer"]["state"][index][key]) for key, value in state.items())
    assert load_state(ends[0]) == load_state(ends[1])
    rows, its_rows = (
        [{key: value for key, value in row.items() if key not in ("seconds", "memory")} for row in read_metrics(run)]
        for run in (folder, other)
    )
    assert rows == its_rows


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("COCONUT_CACHE")
    os.environ["COCONUT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["COCONUT_CACHE"]
    else:
        os.environ["COCONUT_CACHE"] = before


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **reasoning: Any) -> LatentLM:
    """A small model with weights large enough that every path through it matters."""
    torch.manual_seed(seed)
    tokenizer = build_word_tokenizer(WORDS)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, pad_token_id=0, **ARCHITECTURES[family]
    )
    base = AutoModelForCausalLM.from_config(config)
    lm = LatentLM.from_base(base, tokenizer, init="random", reasoning=Reasoning(**reasoning))
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    lm.to(dtype).eval()
    return in_float64(lm) if dtype is torch.float64 else lm


def in_float64(lm: LatentLM) -> LatentLM:
    """The RMS norms of transformers go through float32 whatever the model is in; here they keep float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        small = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        scale = 1 + self.weight if "Gemma" in type(self).__name__ else self.weight
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + small))

    for module in lm.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return lm


@pytest.fixture(params=list(ARCHITECTURES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(lm: LatentLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def in_graph(loss: torch.Tensor, function: type[torch.autograd.Function]) -> int:
    """How often the function is in the graph of a loss."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [next_node for next_node, _ in node.next_functions]
    return sum(type(node).__name__ == f"{function.__name__}Backward" for node in seen)


def byte_level_tokenizer(start: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, trained on next to nothing; with or without a token at the start."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["Is Tom a cat? Every dog is a cat. How many?"], trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $0 </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
