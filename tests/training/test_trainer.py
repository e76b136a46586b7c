"""Runs: what they write, how they go on, and how they stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import Forked, forked_command
from helpers.runs import copy_until, graph_files, rows_of_kind, same_end, small_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    Reset,
    Resume,
    TaskName,
    TooLong,
    TrainConfig,
    make_paths_absolute,
)
from coconut.data.datasets import data_files
from coconut.data.examples import read_examples
from coconut.data.tokenization import build_word_tokenizer
from coconut.engine.base import Loss, NonFiniteUpdate
from coconut.engine.local import LocalEngine
from coconut.engine.world import World
from coconut.evaluation.evaluator import evaluate
from coconut.methods import METHODS, Curriculum, Projector, PromptFormat, Reasoning, Unit, plan
from coconut.rl.config import ObjectiveConfig, ProcessRewardConfig, RLConfig
from coconut.runs.checkpoints import Checkpoints, load_state, load_trainer
from coconut.runs.description import read_metrics
from coconut.runs.folder import differences
from coconut.training.divergence import NonFiniteLossError
from coconut.training.model_setup import make_model
from coconut.training.schedule import Schedule, updates_since_reset
from coconut.training.trainer import Trainer, run
from coconut.utils.files import read_json, write_json

CURRICULUM = Curriculum(
    max_stage=2, length_unit=Unit.updates, stage0_length=5, stage_length=4, total_length=14, mixing_probability=0.3
)
ARCHITECTURE = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}  # dropout is on
CALM = ModelConfig(architecture={**ARCHITECTURE, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
                   tokenizer="words", new_token_init="random")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 28, 12, 8)


def settings(data: DataConfig, folder: Path, **changes: Any) -> TrainConfig:
    """A run of 14 updates, 4 in an epoch, with everything random switched on."""
    random: dict[str, Any] = {
        "curriculum": CURRICULUM,
        "model": ModelConfig(architecture=dict(ARCHITECTURE), tokenizer="words", new_token_init="random"),
        "optimizer": OptimizerConfig(lr=1e-2, max_grad_norm=1.0, warmup_steps=2),
        "batch_size": 8,
        "micro_batch_size": 3,
        "keep_checkpoints": 100,
    }
    return small_run(folder, data, **random | changes)


@pytest.fixture(scope="module")
def finished(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, with a checkpoint after every update."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(settings(data, folder, save_every=1)) == 0
    return folder


# --- a run describes itself -----------------------------------------------------------------------


def test_a_run_describes_itself(finished: Path, data: DataConfig) -> None:
    described = read_json(finished / "run.json")
    assert [s["together"][0]["slot_length"] for s in described["plan"]["stages"]] == [0, 1, 2]
    assert described["updates"] == 14
    assert described["data"]["train"]["used"] == 28
    assert len(described["data"]["train"]["sha256"]) == 64
    assert described["sessions"][0]["versions"]["torch"] == torch.__version__
    assert read_json(finished / "config.json")["curriculum"]["max_stage"] == 2
    rows = rows_of_kind(finished, "train")
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert [row["stage"] for row in rows] == [0] * 5 + [1] * 4 + [2] * 5
    # every epoch of 4 updates, every stage's end
    assert [row["step"] for row in rows_of_kind(finished, "valid")] == [4, 5, 9, 13, 14]
    samples = read_json(finished / "samples" / "step-0000014.json")
    assert [sample["question"] for sample in samples] == [example.question for example in read_examples(data.valid)[:5]]


def test_a_leak_is_said_aloud_and_test_data_is_never_opened(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaking = replace(data, valid=data.train, test=str(tmp_path / "not there.json"))
    assert run(settings(leaking, tmp_path / "run")) == 0
    assert "28 questions of the validation data are in the training data too" in capsys.readouterr().out


def test_the_best_checkpoint_is_of_the_last_stage(finished: Path) -> None:
    best = load_state(Checkpoints(finished).find("best"))["best"]
    rows = [row for row in rows_of_kind(finished, "valid") if row["stage"] == 2]
    top = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    assert (best["step"], best["accuracy"]) == (top["step"], top["accuracy"])
    assert load_state(Checkpoints(finished).path(8))["best"] is None


def test_each_checkpoint_knows_how_it_is_asked(finished: Path) -> None:
    for step, stage, thoughts in [(5, 0, 0), (6, 1, 1), (9, 1, 1), (14, 2, 2)]:
        lm = LatentLM.from_pretrained(Checkpoints(finished).path(step))
        assert (lm.reasoning.stage, lm.reasoning.num_thoughts) == (stage, thoughts)
        assert lm.reasoning.format == PromptFormat("{}", "{} ", "### {}")


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 5, 6, 9, 13])
def test_resumed_equals_uninterrupted(finished: Path, data: DataConfig, tmp_path: Path, step: int) -> None:
    """In the middle of a stage (2, 6), at an epoch's end (4, 13) and at a stage's border (5, 9)."""
    folder = copy_until(step, finished, tmp_path / "run")
    assert run(settings(data, folder, save_every=1)) == 0
    same_end(folder, finished)
    assert [s["from_step"] for s in read_json(folder / "run.json")["sessions"]] == [0, step]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_resumed_equals_uninterrupted_from_pretrained_weights(
    data: DataConfig, tmp_path: Path, micro_batch_size: int
) -> None:
    """With passes of one row: one row at a time, or three, of batches of nine and of a last one of one."""
    words = build_word_tokenizer(read_examples(data.train), data.format)
    architecture = {**ARCHITECTURE, "n_embd": 24, "vocab_size": len(words)}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.pop("model_type"), **architecture))
    for part in (base, words):
        part.save_pretrained(tmp_path / "pretrained")

    def ours(folder: Path) -> TrainConfig:
        curriculum = replace(CURRICULUM, stage0_length=1, stage_length=2, total_length=5)
        return settings(
            data, folder, model=ModelConfig(base=str(tmp_path / "pretrained")), curriculum=curriculum, batch_size=9,
            micro_batch_size=micro_batch_size, save_every=1,
        )  # fmt: skip

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(ours(whole)) == 0
    assert run(ours(copy_until(1, whole, resumed))) == 0
    same_end(resumed, whole)


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_with_a_step_decoder_resumed_equals_uninterrupted(data: DataConfig, tmp_path: Path, step: int) -> None:
    """In the middle of an epoch and at its end, with a projector, a teacher, and dropout."""
    curriculum = replace(CURRICULUM, num_thoughts=3, total_length=6)

    def ours(folder: Path) -> TrainConfig:
        return settings(data, folder, method="sim_cot_codi", curriculum=curriculum, save_every=1)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(ours(whole)) == 0
    end = Checkpoints(whole).path(6)
    assert (end / "feedback.safetensors").is_file()
    files = (end / "training_modules" / "steps.safetensors", end / "model.safetensors")
    assert len({file.stat().st_mode for file in files}) == 1, "who may read the model may read the decoder"
    copy_until(step, whole, resumed)
    assert run(ours(resumed)) == 0
    same_end(resumed, whole)


def arguments(config: TrainConfig) -> list[str]:
    """The same run from the command line."""

    def flat(prefix: str, value: Any) -> list[str]:
        if isinstance(value, dict) and prefix != "model.architecture":
            return [part for key, inner in value.items() for part in flat(f"{prefix}.{key}" if prefix else key, inner)]
        if isinstance(value, dict):
            prefix, value = f"+{prefix}", "{" + ",".join(f"{key}:{inner}" for key, inner in value.items()) + "}"
        else:
            value = json.dumps(value)
        return [f"{prefix}={value}"]

    return flat("", asdict(config))


@pytest.mark.slow
def test_a_validation_left_for_a_signal_is_made_up_for(
    finished: Path, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the training, and at its very end."""
    folder = tmp_path / "run"
    for left_at in (9, 14):  # the third validation of a session
        validations: list[int] = []

        def evaluated(*args: Any, begun: list[int] = validations, **kwargs: Any) -> Any:
            begun.append(1)
            if len(begun) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*args, **kwargs)

        monkeypatch.setattr("coconut.training.trainer.evaluate", evaluated)
        assert run(settings(data, folder, save_every=1)) == 128 + signal.SIGTERM
        assert load_state(Checkpoints(folder).path(left_at))["pending"]
        assert not Checkpoints(folder).path(left_at + 1).exists()
    assert run(settings(data, folder, save_every=1)) == 0
    same_end(folder, finished)


@pytest.mark.slow
def test_killed_and_then_stopped_by_sigterm_it_ends_as_uninterrupted(
    finished: Path, data: DataConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = settings(data, folder)
    with forked_command("train", *arguments(config)) as killed:
        killed.wait_until(lambda: Checkpoints(folder).steps()[-1:] >= [4])
    with forked_command("train", *arguments(config)) as process:
        process.wait_until(lambda: any(row["step"] >= 6 for row in read_metrics(folder)))
        process.send(signal.SIGTERM)
        status, said = process.wait(60), process.printed
    assert status == 128 + signal.SIGTERM, "if 0, the run ended before the signal came: make it longer"
    step = Checkpoints(folder).steps()[-1]
    assert f"Stopped by SIGTERM; saved at update {step}" in said
    assert read_metrics(folder)[-1]["step"] == step
    assert run(config) == 0
    same_end(folder, finished)


def test_a_complete_run_says_so(finished: Path, data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings(data, finished)) == 0
    assert "This run is complete: 14 updates" in capsys.readouterr().out


def test_a_folder_with_another_run_is_refused(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    other = settings(data, finished, seed=7, optimizer=OptimizerConfig(lr=2e-2, max_grad_norm=1.0, warmup_steps=2))
    (tmp_path / "notes.txt").write_text("mine")
    for config, message in (
        (other, "(?s)another configuration:\n  optimizer.lr: 0.01 there, 0.02 asked for\n  seed"),
        (settings(data, finished, resume=Resume.never), "resume=never"),
        (settings(data, tmp_path), "is not empty and is not a run"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config)


def test_a_run_goes_on_with_less_memory(
    finished: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What says how it is carried out is no part of its name, and may change while it is stopped."""
    folder, elsewhere = copy_until(13, finished, tmp_path / "run"), tmp_path / "elsewhere.json"
    shutil.copy(data.test, elsewhere)
    smaller: dict[str, Any] = {"micro_batch_size": 1, "eval_batch_size": 4, "engine": EngineConfig(device="auto")}
    config = settings(replace(data, test=str(elsewhere)), folder, save_every=1, **smaller)
    assert replace(config, run=None).folder() == replace(settings(data, folder), run=None).folder()
    assert run(config) == 0
    assert "micro_batch_size: 3 before, 1 now" in capsys.readouterr().out
    assert read_json(folder / "config.json")["data"]["test"] == str(elsewhere)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"curriculum": replace(CURRICULUM, total_length=20)},
         "curriculum.total_length: 14 there, 20 asked for\n.*its plan"),
        ({"max_new_tokens": 9}, "max_new_tokens: 6 there, 9 asked for\n.*max_new_tokens: validation chooses"),
        ({"valid_limit": 3, "validate_every": 2}, "\nvalid_limit, validate_every: validation chooses"),
    ],
)  # fmt: skip
def test_a_refusal_says_why_and_what_would_help(
    finished: Path, data: DataConfig, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){why}") as refused:
        run(settings(data, finished, **changes))
    assert f"start a new run from its weights: init={finished} run=DIR" in str(refused.value)


def test_a_run_that_cannot_begin_takes_nothing_with_it(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("mine")
    away = ModelConfig(base="nobody/no-such-model")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match="could not be loaded"):
            run(settings(data, folder, model=away))
    assert [path.name for path in tmp_path.iterdir()] == [".git"]
    assert (tmp_path / ".git" / "HEAD").read_text() == "mine"


def test_changed_data_is_noticed(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "train.json"
    shutil.copy(data.train, file)
    config = settings(replace(data, train=str(file)), folder)
    run(config)
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    with pytest.raises(ValueError, match=r"train.json has changed since the run"):
        run(config)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    finished: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_until(7, finished, tmp_path / "run")
    torn = Checkpoints(folder).path(7) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:1000])
    flipped = Checkpoints(folder).path(6) / "trainer.pt"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (Checkpoints(folder).path(5) / "manifest.json").unlink()
    assert run(settings(data, folder, save_every=1)) == 0
    said = capsys.readouterr().err
    assert "model.safetensors has 1,000 of" in said
    assert "the checksum of trainer.pt does not match" in said
    assert "manifest.json cannot be read" in said
    assert read_json(folder / "run.json")["sessions"][-1]["from_step"] == 4
    same_end(folder, finished)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    """A limit on the size of files makes real writes fail in the middle."""
    folder = copy_until(7, finished, tmp_path / "run")
    for rest in range(1, 7):
        shutil.rmtree(Checkpoints(folder).path(rest))
    config = settings(data, folder)
    size = (Checkpoints(folder).path(7) / "model.safetensors").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))"
    with Forked(f"{limit}; from coconut.train import main; main()", *arguments(config)) as process:
        status, said = process.wait(120), process.printed
    assert status == 2, said
    assert "could not be written" in said
    assert "The checkpoint of step 7 is intact" in said
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-0000007"]
    assert run(config) == 0
    same_end(folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keeping", "kept"),
    [({"save_every": 1, "keep_checkpoints": 2}, {13, 14}), ({"keep_checkpoints": 1, "keep_every": 5}, {5, 10, 14})],
)
def test_old_checkpoints_go_but_the_best_and_those_at_multiples_stay(
    data: DataConfig, tmp_path: Path, keeping: dict[str, Any], kept: set[int]
) -> None:
    run(settings(data, tmp_path / "run", **keeping))
    checkpoints = Checkpoints(tmp_path / "run")
    best = load_state(checkpoints.path(14))["best"]["step"]
    assert checkpoints.steps() == sorted({best, *kept})
    assert checkpoints.find("best") == checkpoints.path(best)
    assert checkpoints.find("last") == checkpoints.find("14") == checkpoints.path(14)
    for which, message in (("3", "no checkpoint of step 3"), ("newest", "'newest'; it must be best, last")):
        with pytest.raises(ValueError, match=message):
            checkpoints.find(which)
    with pytest.raises(ValueError, match="has no valid checkpoint"):
        Checkpoints(tmp_path).find("last")


def test_what_the_thoughts_look_like_is_logged(finished: Path) -> None:
    rows = rows_of_kind(finished, "valid")
    assert {row["stage"] for row in rows if "thought_norm" in row} == {1, 2}
    last = rows[-1]
    assert all(last[f"thought_{name}"] > 0 for name in ("norm", "across", "within", "to_table"))
    assert 1 <= last["thought_rank"] <= ARCHITECTURE["n_embd"]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_cost_the_new_ones(
    finished: Path, data: DataConfig, tmp_path: Path, keep: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_until(14, finished, tmp_path / "run")
    checkpoints = Checkpoints(folder)
    for step in (12, 13, 14):
        (checkpoints.path(step) / "trainer.pt").unlink()
    assert run(settings(data, folder, save_every=1, keep_checkpoints=keep)) == 0
    capsys.readouterr()
    assert checkpoints.newest_valid() == checkpoints.path(14)
    assert "damaged" not in capsys.readouterr().err
    assert len(list(checkpoints.folder.glob("damaged-step-*"))) == 3
    same_end(folder, finished)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    folder = copy_until(14, finished, tmp_path / "run")
    for step in Checkpoints(folder).steps():
        (Checkpoints(folder).path(step) / "state.json").write_text("{}")
    before = read_metrics(folder)
    with pytest.raises(ValueError, match=r"Every checkpoint in .* is damaged"):
        run(settings(data, folder, save_every=1))
    assert read_metrics(folder) == before
    shutil.copytree(Checkpoints(finished).path(9), Checkpoints(folder).path(15))
    with pytest.raises(ValueError, match=r"step-0000008 is damaged: state.json has"):
        Checkpoints(folder).find("8")


def test_a_resumed_run_keeps_its_attention(data: DataConfig, tmp_path: Path) -> None:
    model = ModelConfig(architecture=dict(ARCHITECTURE), tokenizer="words", attention="eager")
    config = settings(data, tmp_path / "run", model=model)
    run(config)
    again = Trainer(config, tmp_path / "run", data_files(asdict(data)), World())
    assert again.lm.base.config._attn_implementation == "eager"


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(data: DataConfig, tmp_path: Path, method: str) -> None:
    curriculum = replace(CURRICULUM, icot_limit=2, icot_tokens=1, icot_stage_length=2)
    config = settings(data, tmp_path, method=method, curriculum=curriculum)
    run(config)
    rows = rows_of_kind(tmp_path, "train")
    losses = [row.get("term_tokens", row["loss"]) for row in rows]  # the other terms begin with the first thoughts
    assert len(losses) == 14
    terms = config.plan().terms
    assert all(row["loss"] == pytest.approx(sum(term.weight * row[f"term_{term.name}"] for term in terms))
               for row in rows if len(terms) > 1)  # fmt: skip
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_split_into_micro_batches_changes_nothing(data: DataConfig, tmp_path: Path) -> None:
    losses = []
    for size in (1, 3, 8):
        folder = tmp_path / str(size)
        run(settings(data, folder, model=CALM, micro_batch_size=size, optimizer=OptimizerConfig(lr=1e-3)))
        losses.append([row["loss"] for row in rows_of_kind(folder, "train")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reset", "resets"), [(Reset.stage, [0, 5, 9]), (Reset.epoch, [0, 4, 5, 9, 13]), (Reset.never, [0])]
)
def test_the_optimizer_is_made_anew_when_asked(
    data: DataConfig, tmp_path: Path, reset: Reset, resets: list[int]
) -> None:
    optimizer = OptimizerConfig(lr=1e-2, reset_every=reset)
    run(settings(data, tmp_path, optimizer=optimizer, save_every=1))
    states = [load_trainer(Checkpoints(tmp_path).path(step))["optimizer"]["state"] for step in range(1, 15)]
    assert [i for i, state in enumerate(states) if {int(v["step"]) for v in state.values()} == {1}] == resets


@pytest.mark.slow
def test_a_fresh_optimizer_steps_as_a_new_one(data: DataConfig, tmp_path: Path) -> None:
    """The first update of stage 1 equals the one of a new run that starts there from the same weights."""
    still = replace(CURRICULUM, mixing_probability=0.0)
    whole = tmp_path / "whole"
    run(settings(data, whole, model=CALM, curriculum=still, save_every=1, validate_every=100))
    later = tmp_path / "later"
    run(settings(data, later, model=CALM, curriculum=replace(still, start_stage=1, total_length=9), save_every=1,
                 init=str(Checkpoints(whole).path(5))))  # fmt: skip
    assert rows_of_kind(later, "train")[0]["stage"] == 1
    assert read_json(later / "run.json")["init"] == str(Checkpoints(whole).path(5))
    for checkpoint in (Checkpoints(later).path(1), Checkpoints(whole).path(6)):
        assert {int(v["step"]) for v in load_trainer(checkpoint)["optimizer"]["state"].values()} == {1}


def test_init_takes_a_runs_best_checkpoint_or_else_its_last(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = settings(data, folder, init=str(finished), curriculum=replace(CURRICULUM, start_stage=2, total_length=3))
    run(config)
    assert read_json(folder / "run.json")["init"] == str(Checkpoints(finished).find("best"))
    fresh = settings(data, tmp_path / "fresh", init=str(finished))
    lm = Trainer(fresh, tmp_path / "fresh", data_files(asdict(data)), World()).lm
    loaded = LatentLM.from_pretrained(Checkpoints(finished).find("best"))
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), loaded.parameters(), strict=True))


def test_a_model_that_thinks_keeps_its_projector(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    examples = read_examples(data.train)

    def begun(method: str, init: Path | str, **changes: Any) -> LatentLM:
        curriculum = replace(
            CURRICULUM, num_thoughts=3 if METHODS[method].fixed_length else None, modes=["short", "latent_3"]
        )
        config = settings(data, tmp_path / "run", method=method, curriculum=curriculum, init=str(init), **changes)
        lm = make_model(config, examples)
        lm.reasoning = Reasoning.at(config.plan(), config.plan().stages[-1])
        return lm

    early = begun("codi", Checkpoints(finished).path(3))
    assert early.feedback.slot.projector is Projector.mlp_ln, "stage 0 has no thoughts yet"
    early.save_pretrained(tmp_path / "codi")
    hybrid = begun("hybrid_warmup", tmp_path / "codi")
    assert all(torch.equal(w, hybrid.feedback.state_dict()[name]) for name, w in early.feedback.state_dict().items())
    begun("hybrid_warmup", finished).save_pretrained(tmp_path / "hybrid")
    for init in (finished, tmp_path / "hybrid"):
        with pytest.raises(ValueError, match="learned to think with no projector, and codi has the projector mlp_ln"):
            begun("codi", init)
    begun("pccot", Checkpoints(finished).path(3)).save_pretrained(tmp_path / "pccot")
    with pytest.raises(ValueError, match="computes its thoughts all at once"):
        begun("hybrid_warmup", tmp_path / "pccot")


def test_a_run_goes_on_when_what_it_began_from_is_gone(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    start, folder = tmp_path / "start", tmp_path / "run"
    shutil.copytree(finished, start)
    config = settings(
        data, folder, init=str(start), save_every=1, curriculum=replace(CURRICULUM, start_stage=2, total_length=3)
    )
    run(config)
    began_from = read_json(folder / "run.json")["init"]
    shutil.rmtree(Checkpoints(folder).path(3))
    for checkpoint in (start / "checkpoints").iterdir():
        shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    assert run(config) == 0
    described = read_json(folder / "run.json")
    assert described["init"] == began_from
    assert [session["from_step"] for session in described["sessions"]] == [0, 2]


def test_bfloat16_is_autocast_over_float32_weights(data: DataConfig, tmp_path: Path) -> None:
    run(settings(data, tmp_path, engine=EngineConfig(device="cpu", threads=1, precision="bfloat16")))  # pyright: ignore
    checkpoint = Checkpoints(tmp_path).path(14)
    assert {w.dtype for w in load_file(checkpoint / "model.safetensors").values()} == {torch.float32}
    state = load_trainer(checkpoint)["optimizer"]["state"]
    assert {v["exp_avg"].dtype for v in state.values()} == {torch.float32}


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"(?s)The loss of update \d+ \(stage 0\) is (nan|inf).*lower optimizer.lr"
    ):
        run(settings(data, tmp_path, optimizer=OptimizerConfig(lr=1e20), save_every=1))
    found = read_json(tmp_path / "diverged.json")
    assert found["examples"]
    last = Checkpoints(tmp_path).newest_valid()
    assert last is not None
    assert load_state(last)["step"] == found["step"] - 1


def test_a_gradient_that_is_not_finite_is_named_alone() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module.get_parameter("1.bias").register_hook(lambda gradient: gradient * torch.nan)
    clipped = OptimizerConfig(max_grad_norm=1.0)
    engine = LocalEngine(module, Loss(lambda m, batch: m(batch).sum()), EngineConfig(device="cpu"), clipped)

    class Rows(torch.Tensor):
        denominators = (2,)

    before = [p.clone() for p in module.parameters()]
    with pytest.raises(NonFiniteUpdate) as caught:
        engine.update([torch.ones(1, 2).as_subclass(Rows)], lr=1.0)
    assert caught.value.non_finite_names == ["gradient of 1.bias"]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_broken_weight_is_named(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    lm = LatentLM.from_pretrained(Checkpoints(finished).path(14))
    lm.save_pretrained(tmp_path / "start")
    file = tmp_path / "start" / "model.safetensors"
    broken = load_file(file)
    broken["transformer.ln_f.weight"][3] = torch.nan
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteLossError, match=r"not finite in: weight lm.base.transformer.ln_f.weight \(1 in all\)"):
        run(settings(data, tmp_path / "run", init=str(tmp_path / "start")))


def test_examples_longer_than_the_context(data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ModelConfig(architecture={**ARCHITECTURE, "n_positions": 34}, tokenizer="words", new_token_init="random")
    with pytest.raises(ValueError, match=r"train.json: \d+ of 28 examples are longer than the model's context of 34"):
        run(settings(data, tmp_path / "a", model=short))
    assert not (tmp_path / "a").exists()
    run(settings(replace(data, too_long=TooLong.skip), tmp_path / "b", model=short, max_new_tokens=1))
    assert "of 28 train examples, longer than the model's context" in capsys.readouterr().out


def test_a_step_longer_than_the_decoders_context_is_refused_or_skipped(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last thoughts stand for all further steps, so that with few thoughts their steps are long."""
    rows = [{"question": "0 1 ? 1 or 2 from 0", "steps": ["0 1"] * count, "answer": "1"} for count in (20, 2)]
    write_json(tmp_path / "train.json", rows)
    short = ModelConfig(architecture={**ARCHITECTURE, "n_positions": 36}, tokenizer="words", new_token_init="random")

    def ours(thoughts: int) -> TrainConfig:
        return settings(
            replace(data, train=str(tmp_path / "train.json"), valid=str(tmp_path / "train.json")),
            tmp_path / str(thoughts), method="sim_cot_codi", terms={"teacher": 0, "states": 0}, model=short,
            curriculum=replace(CURRICULUM, num_thoughts=thoughts, total_length=2), batch_size=2, max_new_tokens=1,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"in 1 of 2 examples, a step .* context of 36 .*: example 1 \(39 tokens\)"):
        run(ours(2))
    assert not (tmp_path / "2").exists()
    capsys.readouterr()
    skipping = ours(2)
    skipping.data.too_long = TooLong.skip
    assert run(skipping) == 0
    assert "Left out 1 of 2 examples" in capsys.readouterr().out
    description = read_json(tmp_path / "2" / "run.json")
    assert description["data"]["train"]["used"] == 1
    assert description["training_only_parameters"] > 0
    assert run(ours(4)) == 0


def test_terms_that_need_chains_name_data_without_them(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ours(method: str, steps: list[str]) -> TrainConfig:
        row = {"question": "0 1 | 1 2 ? 1 or 2 from 0", "steps": steps, "answer": "1"}
        write_json(tmp_path / "train.json", [row] * 2)
        fixed = METHODS[method].fixed_length
        curriculum = replace(
            CURRICULUM, num_thoughts=4 if fixed else None, max_stage=1, stage0_length=1, total_length=2,
            teacher_steps_cut=0,
        )  # fmt: skip
        return settings(
            replace(data, train=str(tmp_path / "train.json"), valid=str(tmp_path / "train.json")), tmp_path / method,
            method=method, curriculum=curriculum, batch_size=2, max_new_tokens=1,
        )  # fmt: skip

    for method in ("mux", "lotus", "sim_cot", "kava"):
        expected = "no chain has more than 0 steps" if method == "kava" else "no steps that thoughts stand for"
        with pytest.raises(ValueError, match=expected):
            run(ours(method, []))
        assert not (tmp_path / method).exists()
    assert run(ours("mux", ["1"])) == 0
    assert "75% of the thoughts stand for no part of a chain" in capsys.readouterr().out
    assert run(ours("lotus", ["1 2 0"])) == 0
    assert "of the steps that are not written have no thought of their own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "neither is given"),
        ({"base": "gpt2", "architecture": {"model_type": "gpt2"}}, "both are given"),
        ({"architecture": {"n_layer": 1}, "tokenizer": "words"}, "has no model_type"),
        ({"architecture": {"model_type": "gpt2"}}, "needs model.tokenizer"),
    ],
)
def test_models_that_cannot_be(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**model)


def test_a_model_out_of_reach_says_what_to_set(data: DataConfig, tmp_path: Path) -> None:
    away = ModelConfig(base="nobody/no-such-model")
    typo = ModelConfig(architecture={"model_type": "gpt2", "n_layers": 5}, tokenizer="words")
    odd = ModelConfig(architecture={"model_type": "no-such-type"}, tokenizer="words")
    for model, message in (
        (away, "(?s)nobody/no-such-model could not be loaded.*model.base=FOLDER.*HF_ENDPOINT"),
        (typo, "gpt2 has no n_layers; did you mean n_layer"),
        (odd, r"No model can be made from model\.architecture"),
    ):
        with pytest.raises(ValueError, match=message):
            run(settings(data, tmp_path / "run", model=model))
        assert not (tmp_path / "run").exists()


# --- schedules are pure functions -----------------------------------------------------------------


@given(st.integers(1, 7), st.sampled_from(list(Unit)), st.integers(1, 4), st.integers(0, 3))
def test_a_schedule_walks_through_its_stages(per_epoch: int, unit: Unit, each: int, deepest: int) -> None:
    curriculum = Curriculum(
        max_stage=deepest, length_unit=unit, stage0_length=2, stage_length=each, total_length=2 + each * deepest + 1
    )
    schedule = Schedule(plan("coconut", curriculum), per_epoch)
    places = [schedule.at(step) for step in range(schedule.total)]
    for stage in schedule.plan.stages:
        own = [p for p in places if p.stage is stage]
        assert len(own) == schedule.updates(stage)
        assert [p.stage_step for p in own] == list(range(len(own)))
        assert [p.ends_stage for p in own] == [False] * (len(own) - 1) + [True]
        assert own[0].batch == 0, "a stage begins with an epoch of its own"
    for before, after in pairwise(places):
        assert (after.batch == 0) == before.ends_epoch
        assert after.epoch - before.epoch == int(before.ends_epoch)
    assert places[-1].ends_stage
    assert all(updates_since_reset(p, Reset.never) == p.step for p in places)
    with pytest.raises(IndexError):
        schedule.at(schedule.total)


def test_the_learning_rate_warms_up_and_stays() -> None:
    optimizer = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [optimizer.learning_rate(n) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert OptimizerConfig(lr=1.0).learning_rate(0) == 1.0
    later = OptimizerConfig(lr=1.0, later_stage_lr=0.2, warmup_steps=2)
    assert [later.learning_rate(n, stage) for stage in (0, 1, 2) for n in (0, 1)] == [0.5, 1.0, 0.1, 0.2, 0.1, 0.2]
    with pytest.raises(ValueError, match="later_stage_lr is 0"):
        OptimizerConfig(later_stage_lr=0.0)


def test_relative_paths_are_kept_as_they_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a/m", "a/words", "b"):
        (tmp_path / folder).mkdir(parents=True)

    def asked(folder: str, up: str) -> list[dict[str, Any]]:
        monkeypatch.chdir(tmp_path / folder)
        data = DataConfig(task=TaskName.prosqa, train=f"{up}t", valid=f"{up}v", cache_dir=f"{up}c")
        model = ModelConfig(base=f"{up}m", tokenizer="words")
        dense = ProcessRewardConfig(weight=1, init=f"{up}m")
        found = [
            TrainConfig(run="r", init=f"{up}m", model=model, data=data),
            RLConfig(init="owner/name", process_reward=dense, data=data, objective=ObjectiveConfig("dr_grpo")),
        ]
        for config in found:
            make_paths_absolute(config)
        return [asdict(config) for config in found]

    begun, rl = asked("a", "")
    place = str(tmp_path / "a")
    assert (begun["run"], begun["init"], begun["data"]["train"]) == ("r", f"{place}/m", f"{place}/t")
    assert (begun["model"]["base"], begun["model"]["tokenizer"]) == (f"{place}/m", "words")
    assert (rl["init"], rl["process_reward"]["init"]) == ("owner/name", f"{place}/m")
    assert rl["data"]["cache_dir"] == f"{place}/c"
    assert asked("b", "../a/") == [begun, rl]
    (tmp_path / "a" / "m").rmdir()  # and it need not be there any more
    assert not differences(begun, asked("a", "")[0])
    assert differences(begun, asked("b", "")[0])


def test_a_run_begun_before_a_key_was_there_goes_on(finished: Path, data: DataConfig, tmp_path: Path) -> None:
    folder = copy_until(14, finished, tmp_path / "run")
    config = read_json(folder / "config.json")
    del config["model"]["lora"], config["launch"], config["engine"]["zero_stage"]
    write_json(folder / "config.json", config)
    assert run(settings(data, folder, save_every=1)) == 0
    config["model"]["attention"] = "eager"
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match=r"model.attention: eager there, None asked for\nName"):
        run(settings(data, folder, save_every=1))
