"""Gated words (HRPO): the formula, sampling with them, what the policy learns from them, and what refuses them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import QUESTIONS, build, byte_level_tokenizer, gradients, padded, relative
from helpers.processes import together
from helpers.runs import (
    composed,
    copy_until,
    data_beside,
    new_policy_trainer,
    rows_of_kind,
    same_end,
    saved_as,
    small_run,
    trained,
)
from safetensors.torch import load_file

from coconut import LatentLM
from coconut.analysis.config import AnalyzeConfig
from coconut.analyze import run as analyze
from coconut.completions.completion import Completion, completions_of
from coconut.completions.scoring import CompletionBatch, SamplingDistribution
from coconut.config import AdamWConfig, DataConfig, EngineConfig, EngineKind, OptimizerConfig, Precision
from coconut.engine.base import Loss, adamw, set_learning_rate
from coconut.engine.factory import make_engine
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.generation.gated_words import GatedDecoding
from coconut.hub.model_card import card
from coconut.methods import NOTHING, GatedWords, PromptFormat, Reasoning
from coconut.models.gates import WEIGHTS_FILE, Gates, expected_embedding
from coconut.models.lora import ADAPTER_FILE, ROWS_FILE
from coconut.rewards.config import RewardModelConfig
from coconut.rewards.trainer import RewardTrainer
from coconut.rl.config import GatesConfig, ObjectiveConfig, ProcessRewardConfig, RLConfig
from coconut.rl.gate_statistics import gate_statistics
from coconut.rl.loss import PolicyLoss, broadcast_to_tokens, policy_batch, totals_of
from coconut.rl.objectives import OBJECTIVES
from coconut.rl.report import report
from coconut.rl.trainer import run
from coconut.runs.checkpoints import Checkpoints, load_trainer
from coconut.runs.loading import starting_point
from coconut.runs.record import read_run
from coconut.training.model_setup import apply_engine_options
from coconut.training.trainer import run as run_training

TEMPERATURE = 0.7
MARK = "17"  # a word of the vocabulary, which these models write now and then
CPU = EngineConfig(device="cpu", threads=1)


def gated(family: str = "llama", dtype: torch.dtype = torch.float64) -> LatentLM:
    """A model with gates that are wide open."""
    form = PromptFormat(answer=f"{MARK} {{}}")
    lm = build(family, dtype, slot=NOTHING, markers=False, method="cot", format=form)
    torch.manual_seed(5)
    lm.add_gates(0.3, 0.7, TEMPERATURE)
    lm.gates.to(dtype)  # pyright: ignore
    return lm.eval()


def close(lm: LatentLM) -> LatentLM:
    with torch.no_grad():
        lm.gates.Lambda.fill_(math.inf)  # pyright: ignore
    return lm


def sampled(lm: LatentLM, rows: list[list[int]] = QUESTIONS, limit: int = 12, group: int = 1) -> list[Completion]:
    keys = [(3, len(row), row[0], n) for row in rows for n in range(group)]
    out = lm.generate(
        *padded(rows), max_new_tokens=limit, do_sample=True, temperature=TEMPERATURE, log_probs=True,
        random_keys=keys, num_return_sequences=group,
    )  # fmt: skip
    return [s for i, row in enumerate(rows) for s in completions_of(lm, row, out, range(i * group, (i + 1) * group))]


# --- the formula ------------------------------------------------------------------------------------


def by_formula(gates: Gates, word: list[float], expected: list[float]) -> list[float]:
    """The input of one word, component by component."""
    weights: dict[str, Any] = {name: weight.tolist() for name, weight in gates.state_dict().items()}

    def sigmoid(name: str, d: int) -> float:
        row, bias = weights[f"{name}.weight"][d], weights[f"{name}.bias"][d]
        return 1 / (1 + math.exp(-sum(w * e for w, e in zip(row, word, strict=True)) - bias))

    result = []
    for d, (e, h) in enumerate(zip(word, expected, strict=True)):
        a = math.exp(-8 * math.log(1 + math.exp(-weights["Lambda"][d])) * sigmoid("recurrence", d))
        result.append(a * e + math.sqrt(1 - a * a) * sigmoid("input", d) * h)
    return result


def test_gates_equal_the_formula() -> None:
    torch.manual_seed(0)
    gates = Gates(6, 0.3, 0.9).double()
    words, expected = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    told = [by_formula(gates, w, h) for w, h in zip(words.tolist(), expected.tolist(), strict=True)]
    torch.testing.assert_close(gates(words, expected), torch.tensor(told, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    of_word, of_expected = gates.parts(words, expected)
    torch.testing.assert_close(of_word, gates.a(words) * words)
    torch.testing.assert_close(of_word + of_expected, gates(words, expected))


def test_gates_start_between_their_bounds() -> None:
    torch.manual_seed(0)
    gates = Gates(4000, 0.98, 0.999).double()
    with torch.no_grad():
        gates.recurrence.weight.zero_()
        gates.recurrence.bias.fill_(50.0)  # r = 1
        a_D = gates.a(torch.zeros(4000).double())
    assert 0.98 <= float(a_D.min()) < 0.981
    assert 0.998 < float(a_D.max()) <= 0.999
    assert float(a_D.mean()) == pytest.approx(0.9895, abs=5e-4)


def test_expected_embedding_equals_the_sum_over_words() -> None:
    torch.manual_seed(0)
    logits, table = torch.randn(2, 5).double(), torch.randn(5, 4).double()
    logits[0, 3] = -math.inf
    for row, found in zip(logits, expected_embedding(logits, table, 0.5), strict=True):
        weights = [math.exp(value / 0.5) for value in row.tolist()]
        probs = [value / sum(weights) for value in weights]
        length = math.sqrt(sum(p * p for p in probs))
        told = [sum(p * e for p, e in zip(probs, column, strict=True)) / length for column in table.T.tolist()]
        torch.testing.assert_close(found, torch.tensor(told, dtype=torch.float64))
    one_word = torch.full((1, 5), -math.inf).double()
    one_word[0, 2] = 0.0
    assert torch.equal(expected_embedding(one_word, table, 1.0)[0], table[2])


def test_closed_gates_have_finite_gradients() -> None:
    gates = Gates(4)
    with torch.no_grad():
        gates.Lambda.fill_(math.inf)
    words = torch.randn(3, 4, requires_grad=True)
    fed = gates(words, torch.randn(3, 4))
    assert torch.equal(fed, words)
    fed.sum().backward()
    assert words.grad is not None
    assert torch.equal(words.grad, torch.ones(3, 4))
    assert all(torch.isfinite(weight.grad).all() for weight in gates.parameters() if weight.grad is not None)


# --- sampling ---------------------------------------------------------------------------------------


def by_recomputation(lm: LatentLM, sample: Completion) -> tuple[list[torch.Tensor], list[float]]:
    """What was mixed into each word, and the log-probabilities of all: one word at a time, without a cache.

    The rows that are run again for each word are input embeddings, not ids.
    """
    assert lm.gates
    table: Any = lm.base.get_input_embeddings()
    prompt = sample.layout.ids[: sample.layout.num_prompt].tolist()
    embeds, mixed, log_probs, begun = [table.weight[i] for i in prompt], [], [], False
    for place, word in enumerate(sample.completion_ids):
        logits = lm.base(inputs_embeds=torch.stack(embeds)[None]).logits[0, -1].double() / TEMPERATURE
        logits[lm.special.added] = -torch.inf
        probs = logits.softmax(-1)
        log_probs.append(float(probs[word].log()))
        text = str(lm.tokenizer.decode(sample.completion_ids[: place + 1]))
        begun = begun or MARK in text.split()
        embed = table.weight[word]
        if not begun:
            mixed.append((probs[:, None] * table.weight).sum(0) / probs.pow(2).sum().sqrt())
            embed = torch.tensor(by_formula(lm.gates, embed.tolist(), mixed[-1].tolist()), dtype=embed.dtype)
        embeds.append(embed)
    return mixed[: len(sample.completion_ids) - 1], log_probs


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampling_equals_recomputation_word_by_word(family: str) -> None:
    lm = gated(family)
    samples = sampled(lm)
    marked = 0
    for sample in samples:
        mixed, log_probs = by_recomputation(lm, sample)
        assert sample.expected is not None
        assert len(sample.expected) == len(mixed)
        marked += len(mixed) < len(sample.completion_ids) - 1
        torch.testing.assert_close(sample.expected, torch.stack(mixed), rtol=1e-5, atol=1e-6)
        assert sample.log_probs.tolist() == pytest.approx(log_probs, abs=1e-5)
    assert 0 < marked < len(samples), "some come to the answer mark and some do not"


@pytest.mark.parametrize("greedy", [False, True])
def test_gated_row_alone_equals_the_row_in_a_batch(greedy: bool) -> None:
    lm = gated()
    sampling: dict[str, Any] = {} if greedy else {"do_sample": True, "temperature": TEMPERATURE}

    def answers(rows: list[list[int]], right: bool = False) -> Any:
        keys = None if greedy else [(1, row[0]) for row in rows]
        return lm.generate(*padded(rows, right), max_new_tokens=10, log_probs=True, random_keys=keys, **sampling)

    together, on_the_right = answers(QUESTIONS), answers(QUESTIONS, right=True)
    for row, question in enumerate(QUESTIONS):
        alone = answers([question])
        for out in (together, on_the_right):
            assert out.texts[row] == alone.texts[0]
            torch.testing.assert_close(out.log_probs[row], alone.log_probs[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out.expected[row], alone.expected[0], rtol=1e-5, atol=1e-6)


def test_closed_gates_generate_as_the_plain_model_does() -> None:
    lm = gated(dtype=torch.float32)
    open_texts = lm.generate(*padded(QUESTIONS), max_new_tokens=10).texts
    closed = close(lm).generate(*padded(QUESTIONS), max_new_tokens=10, log_probs=True)
    lm.gates, lm.reasoning = None, replace(lm.reasoning, gated=None)
    plain = lm.generate(*padded(QUESTIONS), max_new_tokens=10, log_probs=True)
    assert closed.texts == plain.texts != open_texts
    assert closed.log_probs
    assert plain.log_probs
    assert all(torch.equal(a, b) for a, b in zip(closed.log_probs, plain.log_probs, strict=True))


def test_hook_is_removed_after_decoding() -> None:
    lm = gated()
    table: Any = lm.base.get_input_embeddings()
    ids = torch.tensor([[5, 6, 7]])
    before = table(ids)
    sampled(lm)
    assert not table._forward_hooks
    assert torch.equal(table(ids), before)


def test_answer_mark_is_found_where_it_ends_whatever_the_tokens() -> None:
    """Random bytes as tokens, in which a mark of two of them comes up; half of a letter before it does no harm."""
    lm = gated(dtype=torch.float32)
    lm.tokenizer = byte_level_tokenizer()
    lm.reasoning = replace(lm.reasoning, format=PromptFormat(answer="ab {}"))
    ids = torch.tensor(lm.tokenizer.convert_tokens_to_ids(["a", "b", "Ã", "Ġ"]))
    words_BN = ids[torch.randint(4, (30, 12), generator=torch.Generator().manual_seed(0))]
    decoding, ended = GatedDecoding(lm, 30), torch.zeros(30, dtype=torch.bool)
    for n in range(12):
        decoding.words.append(words_BN[:, n])
        ended |= decoding._has_mark()
        assert ended.tolist() == ["ab" in str(lm.tokenizer.decode(row)) for row in words_BN[:, : n + 1].tolist()]
    assert 0 < int(ended.sum()) < 30


def test_saved_gates_are_read_back(tmp_path: Path) -> None:
    lm = gated(dtype=torch.float32)
    lm.save_pretrained(tmp_path / "model")
    again = LatentLM.from_pretrained(tmp_path / "model")
    assert again.reasoning.gated == GatedWords(TEMPERATURE)
    assert again.gates
    assert lm.gates
    for name, weight in lm.gates.state_dict().items():
        assert torch.equal(again.gates.state_dict()[name], weight)
    assert again.generate(*padded(QUESTIONS)).texts == lm.generate(*padded(QUESTIONS)).texts
    assert "without the gates of `gates.safetensors`" in card(again)
    (tmp_path / "model" / "gates.safetensors").unlink()
    with pytest.raises(ValueError, match=r"gates.safetensors, the weights of the gates of its words, cannot be read"):
        LatentLM.from_pretrained(tmp_path / "model")


def test_gates_are_refused_where_they_cannot_work() -> None:
    with pytest.raises(ValueError, match="has gates already"):
        gated().add_gates()
    with pytest.raises(ValueError, match="a slot that holds thoughts"):
        build("llama", num_thoughts=2).add_gates()
    with pytest.raises(ValueError, match=r"no text before \{\} to know it by"):
        build("llama", slot=NOTHING, markers=False, format=PromptFormat(answer="{}")).add_gates()
    with pytest.raises(ValueError, match=r"Leave prefix_ids out"):
        gated().generate(*padded(QUESTIONS), prefix_ids=torch.ones(4, 1).long())
    assert Reasoning.from_dict(gated().reasoning.as_dict()) == gated().reasoning


# --- what is learned --------------------------------------------------------------------------------


def test_teacher_forced_log_probs_equal_those_at_sampling() -> None:
    lm = gated(dtype=torch.float32)
    samples = sampled(lm, group=3)
    assert sum(len(s.expected) for s in samples if s.expected is not None) > 40
    distribution = SamplingDistribution.of(lm.special, TEMPERATURE)
    batch = CompletionBatch.of(samples, lm.special, 1)
    torch.testing.assert_close(
        distribution.log_probs(lm, batch).detach(), torch.cat([s.log_probs for s in samples]), rtol=1e-5, atol=1e-5
    )
    for sample, found in zip(samples, distribution.score(lm, samples, 5), strict=True):
        torch.testing.assert_close(found, sample.log_probs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_teacher_forced_pass_equals_rows_fed_one_by_one() -> None:
    """In float64, with what was mixed in at sampling; padding on either side; the cached and the recomputing path."""
    lm = gated()
    samples = sampled(lm)
    batch = CompletionBatch.of(samples, lm.special, 1)
    assert batch.expected is not None
    width = batch.input_ids.shape[1]
    order = torch.stack([torch.cat([(m == 0).nonzero()[:, 0], m.nonzero()[:, 0]]) for m in batch.attention_mask])
    moved = [value.gather(1, order) for value in (batch.input_ids, batch.attention_mask, batch.labels)]
    expected = batch.expected.gather(1, order[..., None].expand(-1, -1, batch.expected.shape[2]))
    wholes = [
        lm(batch.input_ids, batch.attention_mask, labels=batch.labels, expected=batch.expected, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    wholes.append(lm(moved[0], moved[1], labels=moved[2], expected=expected))
    total = 0.0
    table: Any = lm.base.get_input_embeddings()
    for sample in samples:
        ids, first = torch.tensor(sample.layout.ids.tolist()), sample.layout.num_prompt
        embeds = table.weight[ids].clone()
        assert lm.gates
        assert sample.expected is not None
        for place, h in enumerate(sample.expected):
            told = by_formula(lm.gates, embeds[first + place].tolist(), h.tolist())
            embeds[first + place] = torch.tensor(told, dtype=embeds.dtype)
        logits = lm.base(inputs_embeds=embeds[None]).logits[0]
        total -= float(logits[first - 1 : -1].log_softmax(-1).gather(1, ids[first:, None]).sum())
    assert width > min(len(sample.layout.ids) for sample in samples), "rows are padded"
    for out in wholes:
        assert float(out.loss_sum) == pytest.approx(total, rel=1e-10)


def test_gradient_equals_finite_differences() -> None:
    lm = gated()
    batch = CompletionBatch.of(sampled(lm), lm.special, 1)

    def loss() -> torch.Tensor:
        out = lm(batch.input_ids, batch.attention_mask, labels=batch.labels, expected=batch.expected)
        assert out.loss_sum is not None
        return out.loss_sum

    loss().backward()
    table: Any = lm.base.get_input_embeddings()
    assert lm.gates
    for weight in (*lm.gates.parameters(), table.weight):
        assert weight.grad is not None
        place = int(weight.grad.abs().argmax())
        flat, step = weight.data.view(-1), 1e-5
        kept = float(flat[place])
        values = []
        for shift in (step, -step):
            flat[place] = kept + shift
            values.append(float(loss().detach()))
        flat[place] = kept
        told = (values[0] - values[1]) / (2 * step)
        assert abs(told) > 1e-4
        assert float(weight.grad.view(-1)[place]) == pytest.approx(told, rel=1e-5)


def updated(
    lm: LatentLM, samples: list[Completion], size: int, engine_config: EngineConfig = CPU
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients of an off-policy update in micro-batches of this size, with a KL term."""
    objective = OBJECTIVES["grpo"]
    shifted = [replace(s, log_probs=s.log_probs + 0.2) for s in samples]
    torch.manual_seed(0)
    gains, totals = broadcast_to_tokens(torch.randn(len(samples)), samples), totals_of(samples, 12)
    parts = []
    for first in range(0, len(samples), size):
        rows = range(first, min(first + size, len(samples)))
        part = policy_batch(
            [shifted[i] for i in rows], [gains[i] for i in rows], objective, totals, lm.special, on_policy=False
        )
        parts.append(replace(part, reference=torch.cat([samples[i].log_probs - 0.1 for i in rows])))
    loss = Loss(PolicyLoss(SamplingDistribution.of(lm.special, TEMPERATURE), objective, 0.1), may_skip_modules=True)
    apply_engine_options(lm, engine_config)
    engine = make_engine(lm, loss, engine_config, OptimizerConfig(lr=1e-3), World(), {"gates.": 20.0})
    found: dict[str, torch.Tensor] = {}
    engine.optimizer.register_step_pre_hook(lambda *_: found.update(gradients(lm)))  # pyright: ignore
    done = engine.update(parts, 1e-3)
    return done.loss, done.grad_norm, found


def test_update_does_not_depend_on_the_micro_batch_or_on_recomputed_layers() -> None:
    found = []
    for size, engine in ((8, CPU), (2, CPU), (1, CPU), (3, replace(CPU, activation_checkpointing=True))):
        lm = gated(dtype=torch.float32)
        found.append(updated(lm, sampled(lm, group=2), size, engine))
    assert found[0][2]["gates.Lambda"].norm() > 1e-4
    for loss, norm, its in found[1:]:
        assert (loss, norm) == pytest.approx(found[0][:2], rel=1e-4)
        for name, gradient in found[0][2].items():
            torch.testing.assert_close(its[name], gradient, rtol=1e-3, atol=1e-6)


def test_update_in_bfloat16_is_close_to_one_in_float32() -> None:
    found = []
    for precision in (Precision.float32, Precision.bfloat16):
        lm = gated(dtype=torch.float32)
        found.append(updated(lm, sampled(lm, group=2), 3, replace(CPU, precision=precision)))
    (loss, norm, exact), (rough_loss, rough_norm, rough) = found
    assert (rough_loss, rough_norm) == pytest.approx((loss, norm), rel=0.01)
    assert 0 < relative(rough, exact) < 0.1


def test_closed_gates_update_the_model_as_without_gates() -> None:
    ends = []
    for with_gates in (True, False):
        lm = close(gated(dtype=torch.float32))
        if not with_gates:
            lm.gates, lm.reasoning = None, replace(lm.reasoning, gated=None)
        samples = sampled(lm, group=2)
        assert (samples[0].expected is not None) == with_gates
        updated(lm, samples, 3)
        ends.append({name: w for name, w in lm.state_dict().items() if not name.startswith("gates")})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_each_group_of_parameters_has_its_learning_rate() -> None:
    lm = gated(dtype=torch.float32)
    optimizer = adamw(lm, AdamWConfig(lr=5e-6), torch.device("cpu"), GatesConfig().lr_factors(5e-6))
    set_learning_rate(optimizer, 0.5 * 5e-6)  # half way through the warm-up
    rates = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    for name, weight in lm.named_parameters():
        full = 1e-3 if name == "gates.Lambda" else 1e-4 if name.startswith("gates.") else 5e-6
        assert rates[id(weight)] == pytest.approx(0.5 * full)
    in_order = [id(w) for group in optimizer.param_groups for w in group["params"]]
    assert in_order == [id(w) for w in lm.parameters()], "the order of a state that is saved by parameter"


@torch.no_grad()
def test_gate_statistics_equal_the_means_over_words() -> None:
    lm = gated()
    samples = sampled(lm, group=2)
    found = gate_statistics(lm, samples)
    kept, shares = [], []
    table: Any = lm.base.get_input_embeddings()
    assert lm.gates
    for sample in samples:
        assert sample.expected is not None
        for word, h in zip(sample.completion_ids, sample.expected, strict=False):
            zeros = [0.0] * len(h)
            alone = torch.tensor(by_formula(lm.gates, table.weight[word].tolist(), zeros))
            latent = torch.tensor(by_formula(lm.gates, table.weight[word].tolist(), h.tolist())) - alone
            kept.append(float((alone / table.weight[word]).mean()))
            shares.append(float(latent.norm() / (latent.norm() + alone.norm())))
    assert found["gate"] == pytest.approx(sum(kept) / len(kept), rel=1e-6)
    assert found["latent_share"] == pytest.approx(sum(shares) / len(shares), rel=1e-5)


# --- runs -------------------------------------------------------------------------------------------

Made = tuple[Path, DataConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return trained(tmp_path_factory.mktemp("cot"))


def settings(made: Made, folder: Path, **changes: Any) -> RLConfig:
    values: dict[str, Any] = {
        "run": str(folder), "init": str(made[0]), "data": made[1], "objective": ObjectiveConfig("grpo", kl_coef=0.01),
        "gates": GatesConfig(enabled=True, min=0.5, max=0.9, lr=1e-3, lambda_lr=1e-2), "engine": CPU, "num_steps": 3,
        "prompts_per_step": 3, "group_size": 3, "max_new_tokens": 6, "temperature": TEMPERATURE,
        "optimizer": AdamWConfig(lr=1e-3, max_grad_norm=1.0, warmup_steps=2), "validate_every": 3, "save_every": 1,
        "num_minibatches": 2, "keep_checkpoints": 100,
    }  # fmt: skip
    return RLConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "gated"
    assert run(settings(made, folder)) == 0
    return folder


@pytest.mark.slow
def test_gated_policy_is_trained_saved_evaluated_and_described(
    finished: Path, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of_kind(finished, "train")
    assert all(0.5 < row["gate"] < 1 and 0 < row["latent_share"] < 1 for row in rows)
    first, last = (LatentLM.from_pretrained(Checkpoints(finished).path(step)).gates for step in (0, 3))
    assert first
    assert last
    weights = zip(first.state_dict().values(), last.state_dict().values(), strict=True)
    moved = [float((a - b).abs().max()) for a, b in weights]
    assert min(moved) > 1e-4
    assert moved[0] > 5 * moved[1], "Lambda learns at a rate of its own"
    run_evaluate(EvaluateConfig(run=str(finished), checkpoint="last"))
    assert analyze(AnalyzeConfig(run=str(finished), checkpoint="last", engine=CPU)) == 0
    studies = read_run(finished).studies
    assert studies.keys() >= {"rollouts", "shortcuts"}
    assert "influence" not in studies
    assert "Left out influence: This model mixes what it expected into each word" in capsys.readouterr().out
    page = report(read_run(finished))
    assert "The gates keep" in page
    assert "0.5 to 0.9" in page


@pytest.mark.slow
def test_resumed_gated_policy_equals_uninterrupted(finished: Path, made: Made, tmp_path: Path) -> None:
    copy_until(1, finished, tmp_path / "run")
    assert run(settings(made, tmp_path / "run")) == 0
    same_end(tmp_path / "run", finished)


@pytest.mark.slow
def test_gates_beside_lora_are_trained_saved_and_resumed(made: Made, tmp_path: Path) -> None:
    init = saved_as("lora in bfloat16", starting_point(str(made[0])), tmp_path)
    options: dict[str, Any] = {"engine": replace(CPU, precision=Precision.bfloat16), "num_steps": 2}
    assert run(settings((init, made[1]), tmp_path / "run", **options)) == 0
    first, end = (Checkpoints(tmp_path / "run").path(step) for step in (0, 2))
    files = {file.name for file in end.glob("*.safetensors")}
    assert files == {ADAPTER_FILE, ROWS_FILE, WEIGHTS_FILE}
    for name in files:
        before, after = (load_file(checkpoint / name) for checkpoint in (first, end))
        assert not any(torch.equal(after[key], before[key]) for key in after), "all that is saved is trained"
    copy_until(1, tmp_path / "run", tmp_path / "resumed")
    assert run(settings((init, made[1]), tmp_path / "resumed", **options)) == 0
    same_end(tmp_path / "resumed", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "lora in bfloat16"])
def test_reference_begins_with_the_policys_gates(made: Made, tmp_path: Path, kind: str) -> None:
    init = saved_as(kind, starting_point(str(made[0])), tmp_path)
    precision = Precision.bfloat16 if kind.endswith("bfloat16") else Precision.float32
    changes: dict[str, Any] = {"engine": replace(CPU, precision=precision), "optimizer": AdamWConfig(lr=0.03)}
    training = new_policy_trainer(settings((init, made[1]), tmp_path / "run", num_minibatches=1, **changes))
    training.dry_run()
    groups = training.sample(0)
    assert training.learn(groups)["kl"] == 0.0
    assert training.learn(groups)["kl"] > 0.0
    assert training.lm.gates
    assert training.lm.gates.Lambda.dtype is torch.float32, "0.999 is no number of bfloat16"


def test_merged_model_keeps_its_gates(made: Made, tmp_path: Path) -> None:
    lm = LatentLM.from_pretrained(saved_as("lora", starting_point(str(made[0])), tmp_path)).float()
    lm.add_gates(0.3, 0.7, TEMPERATURE)
    merged = lm.merged()
    merged.save_pretrained(tmp_path / "merged")
    again = LatentLM.from_pretrained(tmp_path / "merged")
    assert lm.gates
    assert again.gates
    assert torch.equal(again.gates.Lambda, lm.gates.Lambda)
    outs = [model.generate(*padded([[5, 6, 7], [8]]), max_new_tokens=8, log_probs=True) for model in (lm, again)]
    assert outs[0].texts == outs[1].texts
    for ours, its in zip(outs[0].expected or (), outs[1].expected or (), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)


def on_few(start: str, folder: Path, world: World | None = None) -> None:
    """Two steps of one update each, of four questions."""
    made = Path(start), data_beside(start)
    assert run(settings(made, folder, num_steps=2, num_minibatches=1, prompts_per_step=4), world=world) == 0


def on_two(start: str, folder: str) -> None:
    with init_distributed(replace(CPU, timeout=120)) as world:
        on_few(start, Path(folder), world)


@pytest.mark.slow
def test_gates_learn_on_two_processes_as_on_one(made: Made, tmp_path: Path) -> None:
    together(on_two, str(made[0]), str(tmp_path / "two"))
    on_few(str(made[0]), tmp_path / "one")
    two, one = (rows_of_kind(tmp_path / name, "train") for name in ("two", "one"))
    assert two[0]["kl"] == 0.0, "policy and reference begin with the same gates in all processes"
    assert two[1]["kl"] > 0.0
    for ours, its in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "kl", "reward", "gate", "latent_share", "new_tokens"):
            assert ours[key] == pytest.approx(its[key], rel=1e-3, abs=1e-7), key
    ends = [Checkpoints(tmp_path / name).path(1) for name in ("two", "one")]
    moments, its_moments = (load_trainer(end)["optimizer"]["state"] for end in ends)  # of the first gradient
    names = [name for name, _ in LatentLM.from_pretrained(ends[0]).named_parameters()]
    for index, state in its_moments.items():
        assert state["exp_avg"].norm() > 0 or not names[index].startswith("gates.")
        torch.testing.assert_close(moments[index]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-7)
    assert {name for name in names if name.startswith("gates.")} <= {names[index] for index in moments}


@pytest.mark.slow
def test_other_trainings_refuse_gates(finished: Path, made: Made, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"which only coconut rl trains"):
        run_training(small_run(tmp_path / "none", made[1], init=str(finished), method="cot"))
    config = RewardModelConfig(run=str(tmp_path / "none"), init=str(finished), data=made[1], engine=CPU)
    with pytest.raises(ValueError, match=r"which answers in a file do not hold"):
        RewardTrainer(config, tmp_path, {}, World())


@pytest.mark.slow
def test_gated_runs_are_refused_by_name(made: Made, finished: Path, tmp_path: Path) -> None:
    for changes, message in [
        ({"process_reward": ProcessRewardConfig(weight=1.0), "objective": ObjectiveConfig("dr_grpo")}, "reward model"),
        ({"engine": EngineConfig(kind=EngineKind.deepspeed, device="cpu")}, "gates.enabled=true.*Set engine=local"),
        ({"engine": EngineConfig(cuda_graphs=True)}, "Set engine.cuda_graphs=false"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings(made, tmp_path / "none", **changes)
    with pytest.raises(ValueError, match=r"gates.min=0.9 and gates.max=0.5"):
        GatesConfig(min=0.9, max=0.5)
    with pytest.raises(ValueError, match=r"Set gates.enabled=true"):
        run(settings((finished, made[1]), tmp_path / "none", gates=GatesConfig()))
    with pytest.raises(ValueError, match=r"gates.min=0.5 .* has gates, which are trained further"):
        run(settings((finished, made[1]), tmp_path / "none", gates=GatesConfig(enabled=True, min=0.5)))


@pytest.mark.parametrize("name", ["hrpo_laptop", "hrpo_qwen"])
def test_experiments_are_composed(name: str) -> None:
    config = composed("rl", RLConfig, [f"experiment={name}", "init=runs/start"])
    assert config.gates.enabled
    if name == "hrpo_qwen":
        assert config.gates.lr_factors(config.optimizer.lr) == {"gates.Lambda": pytest.approx(200), "gates.": 20}
        assert (config.objective.kl_coef, config.temperature, config.gates.max) == (0.005, 0.5, 0.999)
