"""Dense rewards: what they make of advantages, what the reward model learns, and that a run goes on exactly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import together
from helpers.runs import (
    copy_until,
    data_beside,
    graph_files,
    new_policy_trainer,
    rows_of_kind,
    same_end,
    saved_as,
    small_run,
    trained,
)
from safetensors.torch import load_file

from coconut import LatentLM
from coconut.completions.config import RolloutConfig
from coconut.completions.rollouts import Group
from coconut.config import AdamWConfig, DataConfig, EngineConfig, EngineKind, Precision
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.methods import Curriculum, Unit
from coconut.rewards.config import RewardModelConfig
from coconut.rewards.trainer import run as run_reward
from coconut.rl.config import ObjectiveConfig, ProcessRewardConfig, RewardConfig, RLConfig
from coconut.rl.process_reward import (
    REWARD_MODEL,
    REWARD_REFERENCE,
    OnlineProcessReward,
    TokenRewards,
    token_advantages,
)
from coconut.rl.trainer import REFERENCE, run
from coconut.rollout import run as roll
from coconut.runs.checkpoints import Checkpoints, load_state, load_trainer
from coconut.runs.loading import starting_point
from coconut.training.trainer import run as run_training
from coconut.utils.files import read_json, write_json

pytestmark = pytest.mark.slow

CPU = EngineConfig(device="cpu", threads=1)
COMPARED = ("loss", "grad_norm", "process_reward_loss", "process_reward_grad_norm")
LEARNS = AdamWConfig(lr=3e-3, max_grad_norm=1.0, warmup_steps=2)

Made = tuple[Path, DataConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model that is sometimes right, and its data."""
    return trained(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="module")
def reward_model(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of coconut.reward on its answers."""
    for split in ("train", "valid"):
        assert roll(RolloutConfig(run=str(made[0]), split=split, samples=6, engine=CPU)) == 0
    train, valid = (str(made[0] / "rollouts" / f"{split}.jsonl") for split in ("train", "valid"))
    folder = tmp_path_factory.mktemp("rewards") / "run"
    config = RewardModelConfig(
        run=str(folder), init=str(made[0]), data=DataConfig(train=train, valid=valid), beta=0.5, engine=CPU,
        optimizer=LEARNS, batch_size=16, epochs=3,
    )  # fmt: skip
    assert run_reward(config) == 0
    return folder


def settings(made: Made, folder: Path, dense: ProcessRewardConfig | None = None, **changes: Any) -> RLConfig:
    values: dict[str, Any] = {
        "run": str(folder), "init": str(made[0]), "data": made[1], "reward": RewardConfig(incorrect_reward=0.0),
        "objective": ObjectiveConfig("dr_grpo", kl_coef=0.0),
        "process_reward": dense or ProcessRewardConfig(weight=1.0, beta=0.5, optimizer=LEARNS),
        "optimizer": AdamWConfig(lr=1e-3, max_grad_norm=1.0), "engine": CPU, "num_steps": 4, "prompts_per_step": 4,
        "group_size": 6, "max_new_tokens": 8, "micro_batch_size": 5, "validate_every": 2, "keep_checkpoints": 100,
    }  # fmt: skip
    return RLConfig(**{**values, **changes})


def reward_first_batch(config: RLConfig) -> tuple[OnlineProcessReward, list[Group], list[TokenRewards]]:
    training = new_policy_trainer(config)
    assert training.process_reward
    groups = training.sample(0)
    return training.process_reward, groups, training.process_reward.rewards(groups)


# --- advantages -------------------------------------------------------------------------------------


def test_token_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0])
    tokens = [torch.tensor([0.2, -0.1, 0.5]), torch.tensor([0.4]), torch.tensor([-0.3, 0.1])]
    found = token_advantages(rewards, tokens, weight=2.0)
    means = [0.2, 0.4, -0.1]
    for i, row in enumerate(tokens):
        others = [j for j in range(3) if j != i]
        outcome = float(rewards[i]) - sum(float(rewards[j]) for j in others) / 2
        baseline = sum(means[j] for j in others) / 2
        expected = [outcome + 2.0 * sum(float(row[s]) - baseline for s in range(t, len(row))) for t in range(len(row))]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[0].tolist() == pytest.approx([1 + 2 * (0.6 - 0.45), 1 + 2 * (0.4 - 0.3), 1 + 2 * (0.5 - 0.15)])


@pytest.mark.parametrize("kind", ["float32", "in bfloat16", "saved in bfloat16"])
def test_untrained_process_reward_gives_outcome_advantages(made: Made, tmp_path: Path, kind: str) -> None:
    init = str(saved_as(kind, starting_point(str(made[0])), tmp_path))
    engine = replace(CPU, precision=Precision("bfloat16" if kind == "in bfloat16" else "float32"))
    _, groups, judged = reward_first_batch(settings(made, tmp_path / "run", init=init, engine=engine))
    assert any(group.rewards.any() for group in groups)
    for group, its in zip(groups, judged, strict=True):
        for i, row in enumerate(its.advantages(1.0)):
            others = torch.cat([group.rewards[:i], group.rewards[i + 1 :]])
            assert len(row) == len(group.completions[i].log_probs)
            assert torch.equal(row, (group.rewards[i] - others.mean()).expand(len(row)))
    assert all(not row.any() for its in judged for row in its.tokens)


def test_token_rewards_of_a_trained_reward_model(made: Made, reward_model: Path, tmp_path: Path) -> None:
    """Against the probabilities of the two models themselves, one answer at a time."""
    dense = ProcessRewardConfig(weight=1.0, init=str(reward_model), beta=0.5, online=False)
    its, groups, judged = reward_first_batch(settings(made, tmp_path / "run", dense))
    mine, reference = (LatentLM.from_pretrained(starting_point(str(place))).eval() for place in (reward_model, made[0]))
    sample, row = groups[0].completions[2], judged[0].tokens[2]
    scored = [its.distribution.score(lm, [sample], 1)[0] for lm in (mine, reference)]
    torch.testing.assert_close(row, 0.5 * (scored[0] - scored[1]), rtol=1e-4, atol=1e-5)
    assert row.abs().max() > 1e-3


# --- what the reward model learns -------------------------------------------------------------------


def test_online_update_lowers_the_cross_entropy_of_its_batch(made: Made, tmp_path: Path) -> None:
    dense, groups, judged = reward_first_batch(settings(made, tmp_path / "run"))
    before = dense.statistics(judged)
    assert before["process_reward_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert before["process_reward_pairs"] == 0.5
    assert before["process_reward_right"] == before["process_reward_wrong"] == 0
    for _ in range(8):
        assert dense.update(dense.rewards(groups))["process_reward_grad_norm"] > 0
    after = dense.statistics(dense.rewards(groups))
    assert after["process_reward_loss"] < before["process_reward_loss"] - 0.01
    assert after["process_reward_pairs"] > 0.5
    assert after["process_reward_right"] > after["process_reward_wrong"]


def test_process_reward_labels_ignore_mode_costs(made: Made, tmp_path: Path) -> None:
    dense, groups, _ = reward_first_batch(settings(made, tmp_path / "run"))
    costly = [replace(group, rewards=-torch.ones(len(group.completions))) for group in groups]
    right = torch.cat([its.right for its in dense.rewards(costly)])
    assert right.any()
    assert torch.equal(right, torch.cat([group.rewards for group in groups]) == 1)


def test_process_reward_does_not_depend_on_the_micro_batch(made: Made, tmp_path: Path) -> None:
    found = []
    for size in (None, 5, 1):
        assert run(settings(made, tmp_path / str(size), num_steps=2, micro_batch_size=size)) == 0
        found.append([row[key] for row in rows_of_kind(tmp_path / str(size), "train") for key in COMPARED])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-3, abs=1e-6)


def test_control_token_has_the_advantage_of_all_tokens(tmp_path: Path) -> None:
    curriculum = Curriculum(modes=["short", "think"], length_unit=Unit.updates, total_length=20)
    made = trained(tmp_path / "warm", method="hybrid_warmup", curriculum=curriculum)
    config = settings(made, tmp_path / "run", objective=ObjectiveConfig("degrpo", kl_coef=0.01))
    dense, groups, judged = reward_first_batch(config)
    dense.update([replace(judged[0], right=torch.arange(6) < 3)])
    its = dense.rewards(groups)[0]
    for sample, rewards, gains in zip(its.group.completions, its.tokens, its.advantages(1.0), strict=True):
        assert sample.layout.control >= 0
        assert len(rewards) == len(gains) == len(sample.completion_ids) + 1
    one = its.advantages(1.0)[0]
    means = torch.stack([row.mean() for row in its.tokens[1:]])
    outcome = its.group.rewards[0] - its.group.rewards[1:].mean()
    torch.testing.assert_close(one[0], outcome + (its.tokens[0] - means.mean()).sum())
    assert run(replace(config, run=str(tmp_path / "whole"), num_steps=2)) == 0
    assert all({"kl", "process_reward_loss"} <= row.keys() for row in rows_of_kind(tmp_path / "whole", "train"))


# --- runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(settings(made, folder, save_every=1)) == 0
    return folder


def test_metrics_have_the_reward_model(finished: Path) -> None:
    rows = rows_of_kind(finished, "train")
    for row in rows:
        assert {f"process_reward_{name}" for name in ("loss", "wrong", "grad_norm", "lr")} <= row.keys()
        assert "kl" not in row, "the policy is not held to the reference of the reward model"
    assert any("process_reward_pairs" in row for row in rows)
    assert rows[0]["process_reward_lr"] < rows[1]["process_reward_lr"] == LEARNS.lr
    assert load_state(Checkpoints(finished).path(4))["process_reward_updates"] == 4
    lm = LatentLM.from_pretrained(Checkpoints(finished).path(4) / REWARD_MODEL)
    assert any(not torch.equal(a, b) for a, b in zip(lm.parameters(), policy_of(finished).parameters(), strict=True))


def policy_of(folder: Path) -> LatentLM:
    return LatentLM.from_pretrained(Checkpoints(folder).find("last"))


def same_reward_model(folder: Path, other: Path) -> None:
    ours, theirs = (Checkpoints(run).find("last") / REWARD_MODEL for run in (folder, other))
    a, b = (load_file(place / "model.safetensors") for place in (ours, theirs))
    assert all(torch.equal(a[name], weight) for name, weight in b.items())
    mine, its = (load_trainer(place)["optimizer"]["state"] for place in (ours, theirs))
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[index][key], value) for index, state in its.items() for key, value in state.items())


@pytest.mark.parametrize("step", [0, 2, 3])
def test_resumed_process_reward_equals_uninterrupted(finished: Path, made: Made, tmp_path: Path, step: int) -> None:
    folder = tmp_path / "run"
    copy_until(step, finished, folder)
    assert run(settings(made, folder, save_every=1)) == 0
    same_end(folder, finished)
    same_reward_model(folder, finished)


def test_damaged_reward_model_is_a_damaged_checkpoint(
    finished: Path, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (Checkpoints(folder).path(4) / REWARD_MODEL / "trainer.pt").write_bytes(b"")
    assert run(settings(made, folder, save_every=1)) == 0
    assert f"{REWARD_MODEL}/trainer.pt has 0 of" in capsys.readouterr().err
    same_reward_model(folder, finished)


@pytest.mark.parametrize("kind", ["own", "trained", "frozen"])
def test_process_reward_resumes_without_its_init_folder(
    made: Made, reward_model: Path, tmp_path: Path, kind: str
) -> None:
    warm, rewards = tmp_path / "warm", tmp_path / "rewards"
    shutil.copytree(made[0], warm)
    shutil.copytree(reward_model, rewards)
    changes = {"own": {}, "trained": {"init": str(rewards)}, "frozen": {"init": str(rewards), "online": False}}[kind]
    dense = ProcessRewardConfig(weight=0.5, beta=0.5, optimizer=LEARNS, **changes)
    folder = tmp_path / "run"
    config = settings((warm, made[1]), folder, dense)
    assert run(config) == 0
    assert (folder / REFERENCE).is_dir() == (kind == "own")
    assert (folder / REWARD_REFERENCE).is_dir() == (kind != "own")
    assert (folder / REWARD_MODEL).is_dir() == (kind == "frozen")
    shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(Checkpoints(folder).path(4))
    shutil.rmtree(warm)
    shutil.rmtree(rewards)
    assert run(config) == 0
    same_end(folder, tmp_path / "whole")


def test_frozen_reward_model_does_not_change(made: Made, reward_model: Path, tmp_path: Path) -> None:
    dense = ProcessRewardConfig(weight=1.0, init=str(reward_model), beta=0.5, online=False)
    its, _, judged = reward_first_batch(settings(made, tmp_path / "run", dense))
    assert its.update(judged) == {}
    before = LatentLM.from_pretrained(starting_point(str(reward_model)))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), its.lm.parameters(), strict=True))
    assert run(settings(made, tmp_path / "whole", dense)) == 0
    assert not (Checkpoints(tmp_path / "whole").path(4) / REWARD_MODEL).exists()
    after = LatentLM.from_pretrained(tmp_path / "whole" / REWARD_MODEL)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_questions_outside_the_accuracy_range_are_not_learned_from(made: Made, tmp_path: Path, weight: float) -> None:
    """Neither the policy nor the reward model; a batch without any makes no update."""
    dense = ProcessRewardConfig(weight=weight, accuracy_range=[0.999, 1.0], optimizer=LEARNS)
    assert run(settings(made, tmp_path / "run", dense, num_steps=2)) == 0
    for row in rows_of_kind(tmp_path / "run", "train"):
        assert row["learned_from"] == row["updates"] == 0
        assert not {"loss", "process_reward_grad_norm"} & row.keys()
    before, end = LatentLM.from_pretrained(starting_point(str(made[0]))), Checkpoints(tmp_path / "run").find("last")
    for after in map(LatentLM.from_pretrained, (end, end / REWARD_MODEL) if weight else (end,)):
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_accuracy_range_selects_groups(made: Made, tmp_path: Path) -> None:
    dense = ProcessRewardConfig(weight=1.0, accuracy_range=[0.0, 0.5])
    config = settings(made, tmp_path / "run", dense)
    (_, groups, judged), training = reward_first_batch(config), new_policy_trainer(config)
    shares = [float(its.right.float().mean()) for its in judged]
    assert [training._teaches(group) for group in groups] == [0 < share < 0.5 for share in shares]
    group, its = next(pair for pair in zip(groups, judged, strict=True) if pair[1].right.any())
    right = group.completions[int(its.right.int().argmax())]
    wrong = replace(right, text="")
    for count, teaches in ((0, False), (1, True), (3, False), (6, False)):
        mixed = replace(group, completions=(*[right] * count, *[wrong] * (6 - count)))
        assert training._teaches(mixed) == teaches


# --- several processes ------------------------------------------------------------------------------


def updated(made: Made, folder: Path, world: World) -> list[float]:
    """Two updates of the reward model, on the same answers however many processes there are."""
    config = settings(made, folder, engine=replace(CPU, timeout=120), micro_batch_size=7)
    with torch.random.fork_rng():
        alone = new_policy_trainer(replace(config, run=f"{folder}-alone-{world.rank}"))
        groups = alone.sample(0)[:3]
    training = new_policy_trainer(config, world)
    assert training.process_reward
    found = []
    for _ in range(2):
        judged = training.process_reward.rewards(groups)
        found += training.process_reward.update(judged).values()
        found += training.process_reward.statistics(judged).values()
    last = training.process_reward.rewards(groups)
    return found + [float(row.sum()) for its in last for row in its.advantages(1.0)]


def on_two(warm: str, folder: str) -> None:
    made, place = (Path(warm), data_beside(warm)), Path(folder)
    kinds = {
        "run": replace(CPU, timeout=120),
        "zero3": EngineConfig(kind=EngineKind.deepspeed, zero_stage=3, device="cpu", threads=1, timeout=120),
    }
    with init_distributed(kinds["run"]) as world:
        for name, engine in kinds.items():
            config = settings(made, place / name, engine=engine, num_steps=2, save_every=1)
            assert run(config, world=world) == 0
            world.on_main_process(lambda ended=place / name: one_back(ended))
            assert run(config, world=world) == 0
        found = updated(made, place / "together", world)
        alone = updated(made, place / f"alone-{world.rank}", World())
        assert found == pytest.approx(alone, rel=1e-3, abs=1e-5)
        assert max(map(abs, found)) > 1e-2


def one_back(folder: Path) -> None:
    """Keep what a run of two batches made, and set it back by one."""
    shutil.copytree(folder, folder.with_name(f"{folder.name}-whole"))
    shutil.rmtree(Checkpoints(folder).path(2))


def test_process_reward_does_not_depend_on_processes_and_engine(made: Made, tmp_path: Path) -> None:
    together(on_two, str(made[0]), str(tmp_path))
    for name in ("run", "zero3"):
        same_end(tmp_path / name, tmp_path / f"{name}-whole")
        same_reward_model(tmp_path / name, tmp_path / f"{name}-whole")
    local, zero = (rows_of_kind(tmp_path / name, "train") for name in ("run", "zero3"))
    assert [row["updates"] for row in local] == [1, 1]
    for key in COMPARED:
        assert local[0][key] == pytest.approx(zero[0][key], rel=1e-3, abs=1e-6)


# --- what cannot be ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 1.0, "online": False}, "equals its reference, so all its rewards are 0. Name a trained one"),
        ({"weight": -1.0}, "process_reward.weight is -1.0; it must be at least 0"),
        ({"weight": 1.0, "beta": 0.0}, "process_reward.beta is 0.0"),
        ({"online": False}, "process_reward.online=false has no effect, since process_reward.weight is 0"),
        ({"init": "runs/rewards"}, "process_reward.init=runs/rewards has no effect"),
        ({"accuracy_range": [0.8, 0.2]}, r"process_reward.accuracy_range is \[0.8, 0.2\]; it must be two shares"),
        ({"accuracy_range": [0.5]}, "it must be two shares"),
        ({"accuracy_range": [0.0, 1.5]}, "it must be two shares"),
    ],
)
def test_process_reward_config_refuses_invalid_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProcessRewardConfig(**changes)


def test_process_reward_refuses_models_that_do_not_fit(made: Made, reward_model: Path, tmp_path: Path) -> None:
    message = r"objective.name=grpo divides advantages.*Set objective.normalize_advantages=false"
    with pytest.raises(ValueError, match=message):
        settings(made, tmp_path / "run", objective=ObjectiveConfig("grpo"))
    other = tmp_path / "other"
    data = graph_files(tmp_path, 6, 4, 4)
    curriculum = Curriculum(length_unit=Unit.updates, total_length=1)
    assert run_training(small_run(other, data, method="cot", curriculum=curriculum, seed=1)) == 0
    valued = tmp_path / "valued"
    shutil.copytree(reward_model, valued)
    config = read_json(valued / "config.json")
    write_json(valued / "config.json", {**config, "loss": "value"})
    for dense, policy, message in [
        (ProcessRewardConfig(1.0, str(reward_model)), made, "process_reward.beta is 0.05, and .* was trained with 0.5"),
        (ProcessRewardConfig(1.0, str(valued)), made, "was trained with loss=value: it says what prefixes are worth"),
        (ProcessRewardConfig(1.0, str(made[0])), made, "is neither a run of coconut reward nor a checkpoint of one"),
        (ProcessRewardConfig(1.0, str(reward_model), 0.5), (other, data), "has other tokens than the policy"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(settings(policy, tmp_path / "run", dense))
        assert not (tmp_path / "run").exists()
