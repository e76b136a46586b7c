"""A model that says its mode first: trained on pairs, asked in any mode, free to choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import MODES, QUESTIONS, build, by_recomputation, hybrid, padded, rows_of
from helpers.runs import graph_files, small_run

from coconut import LatentLM, answer
from coconut.completions.config import RolloutConfig
from coconut.config import DataFiles, OptimizerConfig, TooLong, TrainConfig
from coconut.data.tokenization import encode_questions
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.generate import run as run_generate
from coconut.generation.config import GenerateConfig
from coconut.generation.generate import mode_log_probs
from coconut.methods import Curriculum, Unit, parse_mode
from coconut.rollout import run as roll
from coconut.runs.description import read_metrics, read_results
from coconut.training.trainer import run
from coconut.utils.files import read_json, write_json

EACH = ["think", "latent_2", "short", "latent_2"]  # a mode for each of QUESTIONS


def alone(lm: LatentLM, question: list[int], mode: str, limit: int) -> list[int]:
    """As a model without modes answers the question with the control token at its end, recomputed."""
    thinks = parse_mode(mode)
    plain = LatentLM(lm.base, lm.tokenizer, lm.special, lm.reasoning.in_mode(mode))
    return by_recomputation(plain, [*question, lm.special.control[mode]], thinks.num_thoughts, limit)


def choice(lm: LatentLM, question: list[int]) -> torch.Tensor:
    """The probabilities of the modes after a question, recomputed."""
    logits = lm(torch.tensor([question]), return_logits=True, use_cache=False).logits
    assert logits is not None
    return logits.detach()[0, -1, [lm.special.control[name] for name in MODES]].softmax(-1)


def test_each_mode_when_forced(family: str) -> None:
    lm = hybrid(family)
    ids, mask = padded(QUESTIONS)
    for mode in MODES:
        out = lm.generate(ids, mask, max_new_tokens=6, mode=mode)
        assert out.modes == [mode] * 4
        assert out.mode_log_probs == [None] * 4
        assert out.num_thoughts.tolist() == [parse_mode(mode).num_thoughts] * 4
        assert rows_of(out) == [alone(lm, question, mode, 6) for question in QUESTIONS]
    out = lm.generate(ids, mask, max_new_tokens=6, mode=EACH)
    assert rows_of(out) == [alone(lm, question, mode, 6) for question, mode in zip(QUESTIONS, EACH, strict=True)]


def test_an_answer_that_has_begun_goes_on_in_its_mode() -> None:
    lm = hybrid()
    whole = [alone(lm, question, mode, 6) for question, mode in zip(QUESTIONS, EACH, strict=True)]
    places = [i for i, row in enumerate(whole) if len(row) > 2]
    assert {EACH[i] for i in places} >= {"latent_2"}
    begun = torch.tensor([whole[i][:2] for i in places])
    ids, mask = padded([QUESTIONS[i] for i in places])
    out = lm.generate(ids, mask, max_new_tokens=4, mode=[EACH[i] for i in places], prefix_ids=begun)
    assert rows_of(out) == [whole[i][2:] for i in places]
    with pytest.raises(ValueError, match=r"is in a mode already. Name it with mode="):
        lm.generate(ids, mask, prefix_ids=begun)


def test_its_own_choice_is_its_likeliest_control_token(family: str) -> None:
    lm = hybrid(family)
    out = lm.generate(*padded(QUESTIONS), max_new_tokens=6)
    for place, question in enumerate(QUESTIONS):
        likely = choice(lm, question)
        assert out.modes[place] == MODES[int(likely.argmax())]
        assert out.mode_log_probs[place] == pytest.approx(float(likely.max().log()), rel=1e-5)
        assert rows_of(out)[place] == alone(lm, question, out.modes[place], 6)
    written = {token for row in rows_of(out) for token in row}
    assert not written & set(lm.special.added), "a control token is said once, first"


def test_sampled_choices_come_as_often_as_they_are_likely() -> None:
    lm = hybrid()
    question = QUESTIONS[1]
    torch.manual_seed(0)
    out = lm.generate(torch.tensor([question]), max_new_tokens=1, do_sample=True, num_return_sequences=600)
    shares = torch.tensor([out.modes.count(name) / 600 for name in MODES])
    torch.testing.assert_close(shares, choice(lm, question).float(), atol=0.06, rtol=0)
    hot = mode_log_probs(lm, torch.tensor([question]), torch.ones(1, len(question)).bool(), temperature=10.0)
    assert float(hot.exp().max() - hot.exp().min()) < 0.5 * float(shares.max() - shares.min())


def test_a_question_is_read_once_a_mode_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = hybrid()
    read: list[tuple[int, ...]] = []
    states = LatentLM.hidden_states

    def hidden_states(lm: LatentLM, embeds: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        read.append(embeds.shape[:2])
        return states(lm, embeds, *rest, **options)

    monkeypatch.setattr(LatentLM, "hidden_states", hidden_states)
    torch.manual_seed(0)
    out = lm.generate(torch.tensor([QUESTIONS[1]]), max_new_tokens=3, do_sample=True, num_return_sequences=32)
    assert (set(out.modes), len(out.texts)) == (set(MODES), 32)
    assert [rows for rows, _ in read] == [1] * (1 + 1 + 1 + 1 + 2), "to choose; short; think; latent with two thoughts"


def test_saved_and_opened_it_chooses_the_same(tmp_path: Path) -> None:
    lm = hybrid(dtype=torch.float32)
    lm.save_pretrained(tmp_path)
    again = LatentLM.from_pretrained(tmp_path)
    assert (again.reasoning, again.special) == (lm.reasoning, lm.special)
    assert again.new_tokens["control"]["tokens"] == ["<short>", "<think>", "<latent_2>"]
    assert answer(again, ["3 7 21"], max_new_tokens=4).texts == answer(lm, ["3 7 21"], max_new_tokens=4).texts
    [ids] = encode_questions(again.tokenizer, ["3 <short> 7"], again.reasoning.format)
    assert not set(ids) & set(again.special.added), "what a question says is text"


def test_what_a_hybrid_model_cannot_be_asked() -> None:
    lm, ids = hybrid(), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="mode=long is not one of short, think, latent_2"):
        lm.generate(ids, mode="long")
    with pytest.raises(ValueError, match="for each of 1 questions"):
        lm.generate(ids, mode=["short", "think"])
    with pytest.raises(ValueError, match="mode sets the number of its thoughts"):
        lm.generate(ids, num_thoughts=2)
    with pytest.raises(ValueError, match="mode=short: this model, coconut, has no modes"):
        build("llama").generate(ids, mode="short")
    for modes, message in ((["short"], "at least two"), (["short", "short"], "two different modes"),
                           (["short", "latent_0"], "There is no mode 'latent_0'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Curriculum(modes=modes)


def warm_up(folder: Path, **changes: Any) -> TrainConfig:
    return small_run(
        folder / "run", graph_files(folder, 64, 16, 16), method="hybrid_warmup", max_new_tokens=8,
        curriculum=Curriculum(modes=MODES, length_unit=Unit.updates, total_length=60),
        optimizer=OptimizerConfig(lr=1e-2), **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    assert run(warm_up(folder)) == 0
    return folder / "run"


def test_it_learns_all_modes_at_about_even_odds(warm: Path) -> None:
    losses = [row["loss"] for row in read_metrics(warm) if row["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    lm = LatentLM.from_pretrained(max((warm / "checkpoints").glob("step-*")))
    assert lm.reasoning.modes == tuple(MODES)
    questions = [row["question"] for row in read_json(warm.parent / "test.json")]
    rows = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    for row in rows:
        likely = mode_log_probs(lm, torch.tensor([row]), torch.ones(1, len(row)).bool()).exp()[0]
        assert 0.15 < float(likely.min()) <= float(likely.max()) < 0.6
    short, long = (lm.generate(torch.tensor(rows[:1]), mode=mode) for mode in ("short", "think"))
    assert int(short.lengths) < int(long.lengths)


def test_it_is_evaluated_by_its_choice_and_in_any_mode(warm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluate(EvaluateConfig(run=str(warm)))
    assert "modes" in capsys.readouterr().out
    found = read_json(warm / "evaluation" / "test.json")
    assert sum(found["modes"].values()) == pytest.approx(1)
    run_evaluate(EvaluateConfig(run=str(warm), mode="latent_2"))
    forced = read_json(warm / "evaluation" / "test-mode-latent_2.json")
    assert forced["modes"] == {"short": 0, "think": 0, "latent_2": 1}
    assert (forced["num_thoughts"], forced["default_settings"]) == (2, False)
    capsys.readouterr()
    question = read_json(warm.parent / "test.json")[0]["question"]
    run_generate(GenerateConfig(run=str(warm), question=question, mode="think"))
    assert "[think, 0 thoughts, " in capsys.readouterr().err
    with pytest.raises(ValueError, match="mode=latent_9 is not one of short, think, latent_2"):
        roll(RolloutConfig(run=str(warm), split="valid", samples=2, mode="latent_9"))


def test_a_question_is_to_leave_room_in_every_mode_that_may_be_chosen(warm: Path, tmp_path: Path) -> None:
    rows = read_json(warm.parent / "test.json")[:2]
    file = tmp_path / "long.json"
    write_json(file, [{**rows[0], "question": "0 " * (96 - 1 - 1)}, rows[1]])  # room for <think> and one token
    config = EvaluateConfig(run=str(warm), data=DataFiles(test=str(file)))
    for mode in (None, "latent_2"):
        with pytest.raises(ValueError, match=r"1 of 2 questions leave no room .* question 1 \(94 tokens\)"):
            run_evaluate(replace(config, mode=mode))
    run_evaluate(replace(config, mode="think"))
    run_evaluate(replace(config, too_long=TooLong.skip))
    assert [found["count"] for name, found in read_results(warm).items() if name.startswith("long-")] == [2, 1]
    asked = GenerateConfig(run=str(warm), file=str(file), batch_size=1, output=str(tmp_path / "answers.jsonl"))
    for mode in (None, "latent_2"):
        with pytest.raises(ValueError, match=r"long.json, question 1: it has 94 tokens, which leaves no room"):
            run_generate(replace(asked, mode=mode))
    assert run_generate(replace(asked, mode="think")) == 0


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0, r"1 of 64 examples have no steps, the first of them example 1.*needs a chain"),
        (30, r"1 of 64 examples are longer than the model's context.*: example 1 "),  # the first epoch cuts its steps
    ],
)
def test_an_example_without_a_chain_or_too_long_in_a_later_epoch_is_refused(
    tmp_path: Path, times: int, message: str
) -> None:
    config = warm_up(tmp_path)
    rows = read_json(tmp_path / "train.json")
    rows[0]["steps"] *= times
    write_json(tmp_path / "train.json", rows)
    with pytest.raises(ValueError, match=message):
        run(config)
