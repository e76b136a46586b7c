"""CUDA graphs: what can be tested without a GPU, and with one that replays equal the passes."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_table import FAMILIES, base_of, new_tokenizer
from helpers.models import assert_same, build, gradients, mixed_batch, relative, step, token_batch
from helpers.runs import graph_files, small_run
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines import Size, make_batch, make_data, make_model
from coconut import LatentLM
from coconut.acceleration.cuda_graphs import CudaGraphs, detached_leaf_parameters
from coconut.config import AdamWConfig, DataConfig, EngineConfig, EngineKind, TaskName, TrainConfig
from coconut.engine.base import Loss, set_up_device
from coconut.engine.local import LocalEngine
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Projector, Slot, Source
from coconut.models import latent_lm as model
from coconut.models.passes import bucket_down, bucket_up
from coconut.runs.description import read_metrics
from coconut.training.model_setup import apply_engine_options
from coconut.training.trainer import run, summed_loss

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@given(st.integers(1, 10_000))
def test_bucketed_widths_grow_by_less_than_an_eighth(width: int) -> None:
    assert width <= bucket_up(width) < width + max(8, width / 8)
    assert bucket_up(bucket_up(width)) == bucket_up(width)
    assert width - max(8, width / 2) < bucket_down(width) <= width


@given(st.integers(64, 1000))
def test_there_are_few_buckets(width: int) -> None:
    assert len({bucket_up(w) for w in range(width, 2 * width)}) <= 17


def test_wider_passes_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(family)
    batch = mixed_batch(lm)
    found = []
    for bucketed in (False, True):
        monkeypatch.setattr(model, "plan_passes", partial(model.plan_passes, bucket_widths=bucketed))
        found.append(step(lm, batch))
    assert_same(*found)


def test_cuda_graphs_have_no_effect_without_a_gpu(family: str) -> None:
    lm = build(family).train()
    before = lm(**mixed_batch(lm)).loss_sum
    lm.acceleration.cuda_graphs = True
    assert torch.equal(lm(**mixed_batch(lm)).loss_sum, before)
    assert lm.acceleration.cuda_graphs
    assert recorded(lm) == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families_whose_work_depends_on_more_than_shapes_are_refused(family: Any) -> None:
    lm = LatentLM.from_base(base_of(family), new_tokenizer())
    if "experts" in family.special or "window" in family.special:
        with pytest.raises(ValueError, match="cannot be CUDA graphs"):
            lm.acceleration.cuda_graphs = True
        assert not lm.acceleration.cuda_graphs
    else:
        lm.acceleration.cuda_graphs = True


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"device": "cpu"}, "engine.device is cpu"),
        ({"activation_checkpointing": True}, "engine.activation_checkpointing=false"),
        ({"kind": EngineKind.deepspeed, "zero_stage": 2}, "engine=local"),
    ],
)
def test_options_that_exclude_cuda_graphs_are_named(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(cuda_graphs=True, **other)


def test_what_graphs_do_not_record_is_named() -> None:
    lm = build("gpt2", slot=Slot(Source.thought, Projector.mlp_ln))
    with pytest.raises(ValueError, match=r"the projector mlp_ln stands between its passes.*cuda_graphs=false"):
        apply_engine_options(lm, EngineConfig(cuda_graphs=True))
    data = DataConfig(TaskName.prosqa, train="train.json", valid="valid.json")
    for method, terms in (("codi", "states"), ("sim_cot", "steps")):
        with pytest.raises(ValueError, match=f"the terms {terms} of {method} need more of a pass"):
            TrainConfig(method=method, data=data, engine=EngineConfig(cuda_graphs=True))


def test_cuda_graphs_on_another_device_give_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    set_up_device(EngineConfig(cuda_graphs=True, threads=1))
    assert capsys.readouterr().out.startswith("warning: engine.cuda_graphs=true has no effect: the device is ")


def test_detached_leaf_parameters_are_the_same_weights(family: str) -> None:
    lm = build(family)
    before = dict(lm.base.named_parameters())
    batch = mixed_batch(lm)
    weights = CudaGraphs(lm.base)._trained_weights()
    loss = lm(**batch).loss_sum
    expected = torch.autograd.grad(loss, weights)
    with detached_leaf_parameters(lm.base, weights) as leaves:
        inside = lm(**batch).loss_sum
        assert torch.equal(inside, loss)
        found = torch.autograd.grad(inside, leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    after = dict(lm.base.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_copied_model_has_graphs_of_its_own(family: str) -> None:
    lm = build(family)
    lm.acceleration.cuda_graphs = True
    other = deepcopy(lm)
    assert other.acceleration._graphs is not None
    assert other.acceleration._graphs is not lm.acceleration._graphs
    assert other.acceleration._graphs._model is other.base


# --- on a GPU ---------------------------------------------------------------------------------------


def on_gpu(lm: LatentLM, seed: int = 0) -> dict[str, Any]:
    """`mixed_batch` with other tokens for each seed, in the same places."""
    batch = mixed_batch(lm)
    random = torch.Generator().manual_seed(seed)
    others = torch.randint(3, 35, batch["input_ids"].shape, generator=random)
    ids = torch.where(batch["input_ids"] == lm.latent_id, lm.latent_id, others)
    labels = torch.where(batch["labels"] == -100, -100, ids)
    return {name: value.cuda() for name, value in {**batch, "input_ids": ids, "labels": labels}.items()}


def done(lm: LatentLM, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    lm.zero_grad()
    loss = lm(**batch).loss_sum
    loss.backward()
    return gradients(lm) | {"loss": loss.detach()}


def recorded(lm: LatentLM) -> int:
    assert lm.acceleration._graphs is not None
    return len(lm.acceleration._graphs._graphs)


@needs_gpu
def test_replays_equal_the_passes(family: str) -> None:
    lm = build(family).cuda().train()
    batches = [on_gpu(lm, seed) for seed in range(4)]
    expected = [done(lm, batch) for batch in batches]
    lm.acceleration.cuda_graphs = True
    found = [done(lm, batch) for batch in batches]
    assert recorded(lm) == 1, "at the second batch; the third and fourth are replays alone"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-9, atol=0)
        assert relative(ours, theirs) < 1e-8


@needs_gpu
def test_graphs_use_changed_weights_and_notice_moved_ones(family: str) -> None:
    lm = build(family).cuda().train()
    lm.acceleration.cuda_graphs = True
    batch = on_gpu(lm)
    for _ in range(3):
        done(lm, batch)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(1.1)
    ours = done(lm, batch)
    assert recorded(lm) == 1
    plain = deepcopy(lm)
    plain.acceleration.cuda_graphs = False
    assert relative(ours, done(plain, batch)) < 1e-8
    for weight in lm.parameters():
        weight.data = weight.data * 1.1
    for _ in range(3):
        ours = done(lm, batch)
    for weight in plain.parameters():
        weight.data = weight.data * 1.1
    assert recorded(lm) == 2
    assert relative(ours, done(plain, batch)) < 1e-8


@needs_gpu
def test_gradients_accumulate_and_overlapping_passes_run_without_a_graph(family: str) -> None:
    lm = build(family).cuda().train()
    one, other = on_gpu(lm, 0), on_gpu(lm, 1)
    a, b = done(lm, one), done(lm, other)
    both = {name: a[name] + b[name] for name in a if name != "loss"}
    lm.acceleration.cuda_graphs = True
    for _ in range(3):
        done(lm, one)
    lm.zero_grad()
    for batch in (one, other):
        lm(**batch).loss_sum.backward()
    assert relative(gradients(lm), both) < 1e-8
    lm.zero_grad()
    losses = [lm(**batch).loss_sum for batch in (one, other)]
    sum(losses).backward()  # pyright: ignore
    assert relative(gradients(lm), both) < 1e-8
    for batch in (one, other):  # as in a loop whose last loss lives on
        loss = lm(**{name: value[:4] for name, value in batch.items()}).loss_sum
        loss.backward()
    kept = lm(**one).loss_sum
    kept.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        kept.backward()


@needs_gpu
def test_replayed_dropout_draws_new_numbers_from_the_generator() -> None:
    lm = build("gpt2", torch.float32).cuda().train()
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    lm.acceleration.cuda_graphs = True
    batch = on_gpu(lm)
    for _ in range(3):
        done(lm, batch)
    torch.cuda.manual_seed(5)
    first, second = done(lm, batch)["loss"], done(lm, batch)["loss"]
    torch.cuda.manual_seed(5)
    assert torch.equal(done(lm, batch)["loss"], first)
    assert not torch.equal(first, second)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_losses_are_the_same_with_cuda_graphs(family: str, precision: str) -> None:
    losses = {}
    for graphs in (False, True):
        lm = build(family, torch.float32).train()
        lm.acceleration.cuda_graphs = graphs
        config = EngineConfig(device="cuda", precision=precision)  # pyright: ignore[reportArgumentType]
        engine = LocalEngine(lm, Loss(summed_loss), config, AdamWConfig(lr=1e-3, max_grad_norm=1.0))
        batches = [token_batch(*(value.cpu() for value in on_gpu(lm, seed).values())) for seed in range(8)]
        losses[graphs] = [engine.update([batch, batch], 1e-3).loss for batch in batches]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3 if precision == "float32" else 0.05, atol=0)


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_padding_at_the_head_of_a_row_gives_finite_gradients(graphs: bool) -> None:
    """With heads of 64 in bfloat16, for which torch has special kernels on Hopper."""
    lm = make_model(Size(2, 128, 2, 4)).cuda().train()
    lm.acceleration.cuda_graphs = graphs
    batch = make_batch(lm, make_data(64), 3, 4).to("cuda")
    assert not batch.attention_mask[:, 0].all()
    whole = summed_loss(lm, batch).detach()
    for _ in range(3):
        lm.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = summed_loss(lm, batch)
        loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(lm).values())
        assert float((loss - whole).abs() / whole) < 0.01


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_on_a_gpu_trains_validates_and_is_evaluated(graphs: bool, tmp_path: Path) -> None:
    data = graph_files(tmp_path, 64, 12, 8)
    config = small_run(tmp_path / "run", data, engine=EngineConfig(device="cuda", cuda_graphs=graphs))
    assert run(config) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "valid"]
    assert {row["stage"] for row in rows} == {0, 1, 2}
    assert run_evaluate(EvaluateConfig(run=str(tmp_path / "run"), engine=EngineConfig(device="cuda"))) == 0
