"""The trainer of policies: it learns, describes itself, goes on exactly, and says what it cannot do."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import MODES, shift_weights
from helpers.processes import killed_and_stopped, together
from helpers.runs import (
    copy_until,
    data_beside,
    graph_files,
    new_policy_trainer,
    rows_of_kind,
    same_end,
    saved_as,
    score,
    small_run,
    trained,
)

from coconut import LatentLM
from coconut.analysis.comparable_runs import ComparableRun, sampled_evaluations
from coconut.analysis.config import AnalyzeConfig, MethodsConfig, Part, TableConfig
from coconut.analysis.interventions import audit_thoughts
from coconut.analysis.probes import Subject
from coconut.analysis.run_comparison import compare as compare_runs
from coconut.analysis.run_comparison import differing
from coconut.analyze import compare_methods
from coconut.analyze import run as analyze
from coconut.analyze import table as compare
from coconut.completions.rollouts import Cost
from coconut.config import AdamWConfig, DataConfig, EngineConfig, EngineKind, Precision, TooLong
from coconut.data.examples import Example, read_examples
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.export import run as export
from coconut.generate import run as run_generate
from coconut.generation.config import GenerateConfig
from coconut.hub.config import ExportConfig
from coconut.methods import Curriculum, Unit
from coconut.reporting.run_table import html
from coconut.rl.config import ObjectiveConfig, RewardConfig, RLConfig
from coconut.rl.trainer import REFERENCE, run
from coconut.rl.training_comparison import training_cost
from coconut.runs.checkpoints import Checkpoints, load_state
from coconut.runs.loading import starting_point, supervised_config
from coconut.runs.record import read_run
from coconut.runs.study import NotApplicable
from coconut.tasks import TASKS
from coconut.training.trainer import run as run_training
from coconut.utils.files import read_json, write_json

pytestmark = pytest.mark.slow

CPU = EngineConfig(device="cpu", threads=1)
Made = tuple[Path, DataConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A briefly warmed-up hybrid model, and its data."""
    curriculum = Curriculum(modes=MODES, length_unit=Unit.updates, total_length=40)
    return trained(tmp_path_factory.mktemp("warm"), method="hybrid_warmup", curriculum=curriculum)


def settings(made: Made, folder: Path, **changes: Any) -> RLConfig:
    warm, data = made
    values: dict[str, Any] = {
        "run": str(folder), "init": str(warm), "data": data, "objective": ObjectiveConfig("degrpo", kl_coef=0.01),
        "reward": RewardConfig({"think": 0.5}), "engine": CPU, "num_steps": 6, "prompts_per_step": 4, "group_size": 4,
        "optimizer": AdamWConfig(lr=1e-3, max_grad_norm=1.0, warmup_steps=3), "validate_every": 3,
        "keep_checkpoints": 100,
    }  # fmt: skip
    return RLConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with several updates a step and a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(settings_with_several_updates(made, folder)) == 0
    return folder


def settings_with_several_updates(made: Made, folder: Path, **changes: Any) -> RLConfig:
    return settings(made, folder, save_every=1, num_minibatches=2, num_iterations=2, micro_batch_size=3, **changes)


def test_policy_run_describes_itself(finished: Path) -> None:
    described = read_json(finished / "run.json")
    assert described["objective"]["control_token_weight"] == 1e-3
    assert described["objective"]["denominator"] == "per_completion"
    assert described["reasoning"]["modes"] == MODES
    assert described["data"]["train"]["used"] == 40
    assert described["init"].endswith(tuple(f"step-{n:07d}" for n in range(41)))
    train, valid = (rows_of_kind(finished, kind) for kind in ("train", "valid"))
    assert [row["step"] for row in train] == list(range(1, 7))
    assert [row["step"] for row in valid] == [0, 3, 6]
    for row in train:
        assert sum(row[f"share_{mode}"] for mode in MODES) == pytest.approx(1)
        assert row["updates"] == 4
        assert row["kl"] > -1e-8
    for row in valid:
        assert sum(row[f"chance_{mode}"] for mode in MODES) == pytest.approx(1)
        assert sum(part["count"] for part in row["by_steps"]) == 12
        means = sum(part["count"] * part["accuracy_think"] for part in row["by_steps"]) / 12
        assert means == pytest.approx(row["accuracy_think"])
    assert load_state(Checkpoints(finished).path(6))["updates"] == 24
    assert len(read_json(finished / "samples" / "step-0000006.json")) == 5
    best, top = load_state(Checkpoints(finished).find("best"))["best"], max(valid, key=lambda row: row["reward"])
    assert (best["step"], best["reward"]) == (top["step"], top["reward"])


def test_evaluate_and_generate_accept_a_policy_run(
    finished: Path, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    run_evaluate(EvaluateConfig(run=str(finished), checkpoint="last"))
    assert "modes" in capsys.readouterr().out
    question = read_json(Path(made[1].test))[0]["question"]
    run_generate(GenerateConfig(run=str(finished), question=question, mode="think"))
    assert "[think, 0 thoughts, " in capsys.readouterr().err


# --- resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 5])
def test_resumed_policy_training_equals_uninterrupted(finished: Path, made: Made, tmp_path: Path, step: int) -> None:
    folder = tmp_path / "run"
    copy_until(step, finished, folder)
    assert run(settings_with_several_updates(made, folder)) == 0
    same_end(folder, finished)


def test_killed_policy_training_resumes_exactly(finished: Path, made: Made, tmp_path: Path) -> None:
    """Killed at a step by SIGKILL, then stopped by SIGTERM, then run to its end."""
    folder = tmp_path / "run"
    killed_and_stopped(alone, str(made[0]), str(folder), steps=lambda: Checkpoints(folder).steps(), first=2, then=4)
    assert run(settings_with_several_updates(made, folder)) == 0
    same_end(folder, finished)


def alone(warm: str, folder: str) -> None:
    raise SystemExit(run(settings_with_several_updates((Path(warm), data_beside(warm)), Path(folder))))


# --- processes --------------------------------------------------------------------


def two_steps(made: Made, folder: Path, engine: EngineConfig, world: World | None = None) -> None:
    config = settings(made, folder, engine=engine, num_steps=2, num_minibatches=2, drop_zero_variance_groups=True)
    assert run(config, world=world) == 0


def on_two(warm: str, folder: str) -> None:
    made = Path(warm), data_beside(warm)
    kinds = {
        "local": replace(CPU, timeout=120),
        "zero3": EngineConfig(kind=EngineKind.deepspeed, zero_stage=3, device="cpu", threads=1, timeout=120),
    }
    with init_distributed(kinds["local"]) as world:
        for name, engine in kinds.items():
            two_steps(made, Path(folder) / name, engine, world)


def test_two_processes_learn_as_one_and_zero3_as_the_local_engine(made: Made, tmp_path: Path) -> None:
    """The questions of a step are the same in every minibatch, and the same answers are sampled."""
    together(on_two, str(made[0]), str(tmp_path))
    two_steps(made, tmp_path / "one", CPU)
    one, local, zero = (rows_of_kind(tmp_path / name, "train") for name in ("one", "local", "zero3"))
    assert len(one) == len(local) == len(zero) == 2
    assert one[0]["reward"] == local[0]["reward"] == zero[0]["reward"]
    for key in ("reward", "new_tokens", "loss", "grad_norm", "kl"):
        for its in (local, zero):
            assert [row[key] for row in its] == pytest.approx([row[key] for row in one], rel=1e-3, abs=1e-6), key


# --- learning ---------------------------------------------------------------------------------------


def reward_first_word(example: Example, text: str, mode: str, cost: Cost, /) -> float:
    return float(text.strip().startswith("#"))


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "degrpo"])
def test_rewarded_completions_become_more_frequent(objective: str, tmp_path: Path) -> None:
    """A model without modes learns to begin with the mark of the answer."""
    data, curriculum = graph_files(tmp_path, 16, 4, 4), Curriculum(length_unit=Unit.updates, total_length=2)
    assert run_training(small_run(tmp_path / "warm", data, method="cot", curriculum=curriculum)) == 0
    config = settings(
        (tmp_path / "warm", data), tmp_path / "run", objective=ObjectiveConfig(objective, kl_coef=0.0), num_steps=12,
        reward=RewardConfig(), optimizer=AdamWConfig(lr=2e-2), max_new_tokens=3, group_size=8, validate_every=12,
        prompts_per_step=8,
    )  # fmt: skip
    assert run(config, reward_first_word) == 0
    rewards = [row["reward"] for row in rows_of_kind(tmp_path / "run", "train")]
    assert np.mean(rewards[-3:]) > 0.8 > 0.3 > np.mean(rewards[:2])


def reward_short_mode(example: Example, text: str, mode: str, cost: Cost, /) -> float:
    return float(mode == "short")


def test_rewarded_mode_is_chosen_more_often(made: Made, tmp_path: Path) -> None:
    objective = ObjectiveConfig("degrpo", control_token_weight=1.0, kl_coef=0.0)
    config = settings(made, tmp_path / "run", objective=objective, num_steps=15, optimizer=AdamWConfig(lr=6e-3))
    assert run(config, reward_short_mode) == 0
    chances = [row["chance_short"] for row in rows_of_kind(tmp_path / "run", "valid")]
    assert chances[0] < 0.5 < 0.75 < chances[-1]


def test_drop_zero_variance_groups_skips_their_updates(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = settings(made, folder, num_steps=2, drop_zero_variance_groups=True)
    before = LatentLM.from_pretrained(starting_point(str(made[0]))).state_dict()
    assert run(config, lambda *_: 1.0) == 0
    for row in rows_of_kind(folder, "train"):
        assert (row["zero_variance_groups"], row["updates"], "loss" in row) == (1, 0, False)
    after = LatentLM.from_pretrained(Checkpoints(folder).find("last")).state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


# --- invalid input ----------------------------------------------------------------------------------


def test_invalid_reward_ends_the_run_with_a_checkpoint(made: Made, tmp_path: Path) -> None:
    """In the third step, and in the validation after it."""
    calls: list[int] = []
    state: dict[str, Any] = {}

    def broken(example: Example, text: str, mode: str, cost: Cost, /) -> Any:
        calls.append(1)
        return state["bad"] if len(calls) > state["after"] else 0.1 * len(calls)

    for name, bad, after, message, saved in (
        ("nan", float("nan"), 12 + 2 * 16, "is nan, which is not finite", 2),
        ("two", [1, 2], 12 + 2 * 16, r"is \[1, 2\]", 2),
        ("valid", float("inf"), 12 + 3 * 16, "is inf, which is not finite", 3),
    ):
        calls.clear()
        state |= {"bad": bad, "after": after}
        folder = tmp_path / name
        with pytest.raises(ValueError, match=f"{message}.*saved at step {saved}"):
            run(settings(made, folder, num_steps=5), broken)
        assert Checkpoints(folder).steps()[-1] == saved
        assert run(settings(made, folder, num_steps=5), reward_short_mode) == 0, "the run resumes"
        assert [row["step"] for row in rows_of_kind(folder, "valid")] == [0, 3, 5]


def test_rl_config_refuses_invalid_values(made: Made, tmp_path: Path) -> None:
    for changes, message in [
        ({"group_size": 1}, "group_size is 1. Advantages compare"),
        ({"init": None}, "Name the model to start from"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"num_minibatches": 5}, "num_minibatches=5 is more than prompts_per_step=4"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0"),
        ({"engine": EngineConfig(cuda_graphs=True)}, r"trained in eval mode.*Set engine.cuda_graphs=false"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings(made, tmp_path / "none", **changes)
    with pytest.raises(ValueError, match=r"There is no objective 'ppo'. The objectives are: grpo"):
        ObjectiveConfig("ppo")
    with pytest.raises(ValueError, match=r"reward.mode_costs.think is nan"):
        RewardConfig({"think": float("nan")})
    for changes, message in [
        ({"reward": RewardConfig({"long": 0.5})}, "costs.long is .* the model does not have: its modes are short"),
        ({"max_new_tokens": 90}, "leave no room for an answer of 90 tokens"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(settings(made, tmp_path / "none", **changes))
        assert not (tmp_path / "none").exists()
    assert run(settings(made, tmp_path / "run", num_steps=1)) == 0
    with pytest.raises(ValueError, match=r"(?s)another configuration:\n  group_size: 4 there, 8 asked for"):
        run(settings(made, tmp_path / "run", num_steps=1, group_size=8))
    assert run(settings(made, tmp_path / "run", num_steps=1, micro_batch_size=1, rollout_batch_size=1)) == 0


def test_too_long_skip_leaves_out_long_questions(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_json(Path(made[1].train))
    long = {**rows[0], "question": " | ".join([rows[0]["question"].split(" ?")[0]] * 2) + " ? 5 or 3 from 0"}
    write_json(tmp_path / "train.json", [*rows, long])
    data = replace(made[1], train=str(tmp_path / "train.json"))
    config = settings((made[0], data), tmp_path / "run", num_steps=1, max_new_tokens=40)
    with pytest.raises(ValueError, match=r"1 of 41 questions leave no room.*: question 41 \(\d+ tokens\)"):
        run(config)
    config.data.too_long = TooLong.skip
    assert run(config) == 0
    assert "Left out 1 of 41 questions of" in capsys.readouterr().out


def test_unreadable_gold_answer_is_refused_in_rl(made: Made, tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", [*read_json(Path(made[1].train)), {"question": "0 1 ?", "answer": "zebra"}])
    data = replace(made[1], train=str(tmp_path / "train.json"))
    with pytest.raises(ValueError, match=r"row 41, answer 'zebra': the tokenizer has no word for zebra"):
        run(settings((made[0], data), tmp_path / "run", num_steps=1))


def test_every_question_is_used_once_an_epoch(made: Made, tmp_path: Path) -> None:
    training = new_policy_trainer(settings(made, tmp_path / "run", prompts_per_step=12))
    asked = np.concatenate([training._prompts(step) for step in range(10)])
    assert [sorted(asked[first : first + 40]) for first in (0, 40, 80)] == [list(range(40))] * 3
    assert (asked[:40] != asked[40:80]).any()
    assert training._prompts(4).tolist() == asked[48:60].tolist()


@pytest.mark.parametrize("kind", ["float32", "in bfloat16", "saved in bfloat16", "lora", "lora in bfloat16"])
def test_untrained_policy_has_zero_divergence(made: Made, tmp_path: Path, kind: str) -> None:
    init = saved_as(kind, starting_point(str(made[0])), tmp_path)
    precision = Precision.bfloat16 if kind.endswith("in bfloat16") and "saved" not in kind else Precision.float32
    changes: dict[str, Any] = {"micro_batch_size": 5, "optimizer": AdamWConfig(lr=0.03)}
    config = settings((init, made[1]), tmp_path / "run", engine=replace(CPU, precision=precision), **changes)
    training = new_policy_trainer(config)
    training.dry_run()
    groups = training.sample(0)
    assert training.learn(groups)["kl"] == 0.0
    rows = training.learn(groups)
    assert rows["kl"] > 0, "it differs after an update"


def test_divergence_equals_that_of_single_completions(made: Made, tmp_path: Path) -> None:
    training = new_policy_trainer(settings(made, tmp_path / "run", micro_batch_size=5))
    groups = training.sample(0)
    for _ in range(3):
        training.learn(groups)
    assert training.reference
    told = []
    for sample in [sample for group in groups for sample in group.completions]:
        ids = torch.tensor([sample.layout.ids.tolist()])
        apart = []
        for lm in (training.lm, training.reference):
            with torch.no_grad():
                logits = lm(ids, return_logits=True, use_cache=False).logits[0].double()
            control, first = sample.layout.control, sample.layout.num_prompt
            controls = list(lm.special.control.values())
            chosen = logits[control - 1, controls].log_softmax(-1)[controls.index(int(ids[0, control]))]
            logits[:, lm.special.added] = -torch.inf
            words = logits[first - 1 : -1].log_softmax(-1).gather(1, ids[0, first:, None])[:, 0]
            apart.append(torch.cat([chosen[None], words]))
        told += [math.exp(gap) - 1 - gap for gap in (apart[1] - apart[0]).tolist()]
    assert training.learn(groups)["kl"] == pytest.approx(np.mean(told), rel=1e-3)


def test_killed_start_leaves_no_stale_reference(made: Made, tmp_path: Path) -> None:
    """A run killed before its first checkpoint starts again when `init` has another best checkpoint."""
    other = LatentLM.from_pretrained(starting_point(str(made[0])))
    shift_weights(other, 0.1).save_pretrained(tmp_path / "run" / REFERENCE)
    training = new_policy_trainer(settings(made, tmp_path / "run", num_steps=1))
    training.snapshot_models()
    kept = LatentLM.from_pretrained(tmp_path / "run" / REFERENCE)
    assert all(torch.equal(a, b) for a, b in zip(training.lm.parameters(), kept.parameters(), strict=True))
    assert training.learn(training.sample(0))["kl"] == 0.0


def test_activation_checkpointing_runs_layers_twice(made: Made, tmp_path: Path) -> None:
    found: list[tuple[float, float]] = []
    calls: list[int] = []
    for checkpointed in (False, True):
        engine, objective = replace(CPU, activation_checkpointing=checkpointed), ObjectiveConfig("degrpo", kl_coef=0.0)
        config = settings(made, tmp_path / str(checkpointed), engine=engine, objective=objective)
        training = new_policy_trainer(config)
        groups = training.sample(0)
        counted = [0]
        layers: Any = training.lm.base.base_model.layers
        layers[0].mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.__setitem__(0, counted[0] + 1))
        row = training.learn(groups)
        found.append((row["loss"], row["grad_norm"]))
        calls.append(counted[0])
    assert found[0] == found[1]
    assert calls[1] == 2 * calls[0]


# --- pages ------------------------------------------------------------------------------------------


def test_policy_report_page_and_comparison(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run-seed0"
    shutil.copytree(finished, folder)
    assert analyze(AnalyzeConfig(run=str(folder), checkpoint="last", engine=CPU)) == 0
    assert "who chooses" in capsys.readouterr().out
    routers, difficulty = (read_json(folder / "analysis" / f"{name}.json") for name in ("routers", "difficulty"))
    assert [row["router"] for row in routers["rows"]] == [
        "the model", "always short", "always think", "always latent_2", "at random, as often", "classifier", "oracle",
    ]  # fmt: skip
    assert routers["facts"]["questions"] == sum(row["count"] for row in difficulty["rows"]) == 8
    page = (folder / "report.html").read_text()
    headings = "How it learned", "What exactly was trained"
    for words in (*headings, "oracle", "&lt;latent_2&gt;: 2 thoughts", "per completion"):
        assert words in page
    assert "<script" not in page
    own = routers["rows"][0]
    run_evaluate(EvaluateConfig(run=str(folder), checkpoint="last"))
    found = read_json(folder / "evaluation" / "test-checkpoint-last.json")
    assert (own["accuracy"], own["low"]) == pytest.approx((found["accuracy"], found["interval"][0]))
    assert own["new_tokens"] == pytest.approx(found["mean_new_tokens"])
    other = tmp_path / "run-seed1"
    shutil.copytree(folder, other)
    assert compare(TableConfig(runs=[str(tmp_path / "run-seed*")])) == 0
    rows = read_json(tmp_path / "policies.json")["rows"]
    assert [row["arm"] for row in rows] == ["run", "run"]
    valid = {row["step"]: row["reward"] for row in rows_of_kind(folder, "valid")}
    assert {(row["step"], row["reward"]) for row in rows} == {(max(valid), valid[max(valid)])}
    write_json(folder / "analysis" / "routers.json", {**routers, "facts": {**routers["facts"], "step": min(valid)}})
    assert compare(TableConfig(runs=[str(folder)], output=str(tmp_path / "first"))) == 0
    [row] = read_json(tmp_path / "first" / "policies.json")["rows"]
    assert (row["step"], row["reward"]) == (min(valid), valid[min(valid)])
    write_json(folder / "analysis" / "routers.json", {**routers, "facts": {**routers["facts"], "step": 99}})
    with pytest.raises(ValueError, match="analyzed at step 99, which has no validation"):
        compare(TableConfig(runs=[str(folder)], output=str(tmp_path / "none")))
    assert "Seeds 0, 0." in (tmp_path / "policies.html").read_text()
    told = capsys.readouterr().out
    assert "latent_2, hard" in told


def test_warmed_up_hybrid_model_has_a_section_on_choices(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "warm"
    shutil.copytree(made[0], folder)
    assert analyze(AnalyzeConfig(run=str(folder), engine=CPU)) == 0
    page, studies = (folder / "report.html").read_text(), read_run(folder).studies
    assert "How it chooses" in page
    assert "Thoughts were measured in the mode latent_2" in page
    assert studies.keys() >= {"routers", "difficulty", "audit_thoughts", "influence", "shortcuts"}
    assert studies["audit_thoughts"].facts["mode"] == "latent_2"
    always = next(row for row in studies["routers"].rows if row["router"] == "always latent_2")
    assert studies["audit_thoughts"].rows[0]["accuracy"] == pytest.approx(always["accuracy"])


def test_policy_without_modes_has_a_report_page(tmp_path: Path) -> None:
    data, curriculum = graph_files(tmp_path, 16, 4, 4), Curriculum(length_unit=Unit.updates, total_length=41)
    assert run_training(small_run(tmp_path / "warm", data, method="coconut", curriculum=curriculum)) == 0
    assert run(settings((tmp_path / "warm", data), tmp_path / "run", num_steps=2, reward=RewardConfig())) == 0
    run_evaluate(EvaluateConfig(run=str(tmp_path / "run")))
    assert analyze(AnalyzeConfig(run=str(tmp_path / "run"), engine=CPU)) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "reinforcement learning" in page
    assert "How it learned" in page
    assert "With the checkpoint of step" in page
    for title in ("What it means", "How many thoughts", "Are the thoughts used?", "Does it rely on shortcuts?"):
        assert title in page
    run_evaluate(EvaluateConfig(run=str(tmp_path / "run"), samples=2, temperature=1.0))
    assert len(sampled_evaluations([str(tmp_path / "run")], "test-samples-2*")) == 1
    assert export(ExportConfig(run=str(tmp_path / "run"), output=str(tmp_path / "out"))) == 0
    assert "of 2 of reinforcement learning" in (tmp_path / "out" / "README.md").read_text()


def test_a_policy_is_measured_like_the_model_that_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curriculum = Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=4, stage_length=4, total_length=20,
                            mixing_probability=0.3)  # fmt: skip
    warm, data = trained(tmp_path / "warm", method="coconut", curriculum=curriculum)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(settings((warm, data), first, num_steps=2, reward=RewardConfig())) == 0
    assert run(settings((first, data), second, num_steps=2, reward=RewardConfig())) == 0
    parts = [Part.audit_thoughts, Part.prefix_values, Part.stopping]
    for folder in (warm, second):
        assert analyze(AnalyzeConfig(run=str(folder), engine=CPU, parts=parts)) == 0
    assert "Analyzing step" in capsys.readouterr().out
    studies = read_run(second).studies
    lm = LatentLM.from_pretrained(Checkpoints(second).find("best")).eval()
    own = Subject(lm, TASKS["prosqa"], read_examples(data.test), trained_with_fewer_thoughts=True, mixed=True)
    assert studies["audit_thoughts"].rows == audit_thoughts(own).rows
    assert studies["prefix_values"].facts["warning"] is None, "its supervised training was with fewer, too"
    assert supervised_config(second) == read_json(warm / "config.json")

    compare_methods(MethodsConfig(runs=[str(warm), str(second)], output=str(tmp_path / "compared")))
    rows = read_json(tmp_path / "compared" / "methods.json")["rows"]
    assert [row["method"] for row in rows] == ["coconut", "coconut + degrpo"]
    assert rows[1]["headline"] in (second / "report.html").read_text()

    shutil.rmtree(warm)
    assert supervised_config(second) is None
    assert analyze(AnalyzeConfig(run=str(second), engine=CPU, parts=[Part.prefix_values])) == 0
    assert "without mixing" in read_run(second).studies["prefix_values"].facts["warning"]
    shutil.rmtree(second / "stopping")
    with pytest.raises(NotApplicable, match=r"from which .* started is gone"):
        analyze(AnalyzeConfig(run=str(second), engine=CPU, parts=[Part.stopping]))


def test_policies_and_the_models_they_began_from_share_a_table(tmp_path: Path) -> None:
    """Numbers of the table and its page against those read off the runs' files by hand."""
    data = graph_files(tmp_path, 16, 8, 12)
    curriculum = Curriculum(length_unit=Unit.updates, total_length=41)
    began, runs = {"cot": ["cot-seed0", "cot-seed1"], "coconut": ["coconut-seed0"]}, []
    for method, names in began.items():
        for seed, name in enumerate(names):
            start = small_run(tmp_path / name, data, method=method, curriculum=curriculum, seed=seed)
            assert run_training(start) == 0
            policies = {"words": {}} if method == "cot" else {"thoughts": {}, "noisy": {"thought_noise": 0.5}}
            for policy, changes in policies.items():
                folder = tmp_path / f"{policy}-seed{seed}"
                config = settings((tmp_path / name, data), folder, num_steps=2, reward=RewardConfig(), **changes)
                assert run(replace(config, seed=seed, num_minibatches=2)) == 0
                runs.append(folder)
            runs.append(tmp_path / name)
    right = {
        "cot-seed0": [0, 1, 2], "cot-seed1": [1, 2], "words-seed0": [0, 1, 2, 3, 4], "words-seed1": [*range(9)],
        "coconut-seed0": [7], "thoughts-seed0": [7, 8], "noisy-seed0": [1, 3, 5, 7, 9, 11],
    }  # fmt: skip
    for folder in runs:
        run_evaluate(EvaluateConfig(run=str(folder)))
        score(folder, "test", right[folder.name])
    assert compare(TableConfig(runs=[*map(str, runs)])) == 0
    found = read_json(tmp_path / "table.json")
    rows = {row["method"]: row for row in found["rows"]}
    noisy, exact = (f"coconut + degrpo (thought_noise={noise})" for noise in (0.5, 0.0))
    assert list(rows) == ["coconut", exact, noisy, "cot", "cot + degrpo"]
    assert [row["seeds"] for row in rows.values()] == ["0", "0", "0", "0, 1", "0, 1"]
    assert [row["accuracy"] for row in rows.values()] == pytest.approx([1 / 12, 2 / 12, 6 / 12, 5 / 24, 14 / 24])
    pairs = {(pair["a"], pair["b"]): pair["difference"] for pair in found["facts"]["pairs"]}
    assert len(pairs) == 10
    assert pairs["cot + degrpo", "cot"] == pytest.approx(9 / 24)
    assert pairs["cot + degrpo", noisy] == pytest.approx(-1 / 12), "on seed 0, which both have"
    steps = [read_json(tmp_path / f"words-seed{seed}" / "run.json")["init"][-7:] for seed in (0, 1)]
    assert rows["cot + degrpo"]["updates"] == sum(map(int, steps)) / 2 + 4
    train, valid = (rows_of_kind(tmp_path / "noisy-seed0", kind) for kind in ("train", "valid"))
    completions, passes, updates, seconds, first, best = training_cost(read_run(tmp_path / "noisy-seed0"))
    assert (completions, updates, first) == (2 * 4 * 4, 4, valid[0]["reward"])
    assert (passes, seconds) == (16 * sum(row["passes"] for row in train), sum(row["seconds"] for row in train))
    assert best == max(row["reward"] for row in valid)
    page = (tmp_path / "table.html").read_text()
    for words in ("How the policies were trained", "reward at first", f"{passes:,.0f}", noisy):
        assert words in page
    assert "How the policies" not in html(compare_runs(TableConfig(runs=[str(tmp_path / "cot-seed*")])), tmp_path)


def test_what_a_policy_began_from_identifies_it(tmp_path: Path) -> None:
    """The objective of an earlier policy is a setting, and each of its steps may have several updates."""
    warm, data = trained(
        tmp_path / "warm", method="cot", curriculum=Curriculum(length_unit=Unit.updates, total_length=8)
    )
    made: list[ComparableRun] = []
    for name in ("grpo", "dr_grpo"):
        keys: dict[str, Any] = {"reward": RewardConfig(), "objective": ObjectiveConfig(name)}
        first, second = tmp_path / f"{name}-first", tmp_path / f"{name}-second"
        assert run(settings((warm, data), first, num_steps=3, num_minibatches=2, **keys)) == 0
        begin = first / "checkpoints" / "step-0000003"
        assert run(settings((begin, data), second, num_steps=1, **keys | {"objective": ObjectiveConfig("grpo")})) == 0
        made.append(ComparableRun(read_run(second), "test", {}, [], np.array([])))
    assert made[0].settings != made[1].settings
    assert differing([each.settings for each in made]) == ["init"]
    for each, name in zip(made, ("grpo", "dr_grpo"), strict=True):
        began = int(read_json(tmp_path / f"{name}-first" / "run.json")["init"][-7:])
        assert each.updates_before == began + sum(
            row["updates"] for row in rows_of_kind(tmp_path / f"{name}-first", "train")
        )
        assert each.updates_before == began + 6


def test_policy_table_refuses_unanalyzed_and_unevaluated_runs(finished: Path, made: Made) -> None:
    with pytest.raises(ValueError, match="2 runs are without the evaluation 'test'"):
        compare(TableConfig(runs=[str(finished), str(made[0])]))
    with pytest.raises(ValueError, match="was not analyzed"):
        compare(TableConfig(runs=[str(finished)]))
