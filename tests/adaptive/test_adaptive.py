"""Choosing how to answer: spaces, policies, backends, judges, tables, and the command."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import EXAMPLES, TASK, build, byte_level_tokenizer, hybrid
from helpers.processes import forked_command
from helpers.runs import graph_files, small_run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from coconut import LatentLM
from coconut.adaptive import backends, encoders, report
from coconut.adaptive import main as adaptive
from coconut.adaptive.backends import CausalModelBackend, FunctionBackend, LatentBackend, Reply, collect_answers
from coconut.adaptive.chooser import Chooser, policy_metadata
from coconut.adaptive.config import AdaptiveConfig, FunctionConfig, JudgeConfig, JudgeKind, PolicyConfig
from coconut.adaptive.experiments import arms_study, run_experiments, studies
from coconut.adaptive.judges import ExactJudge, ImplicitJudge, PretrainedJudge, Vote, judge_scores
from coconut.adaptive.outcome_table import OutcomeTable
from coconut.adaptive.policy import ConfigurationPolicy, distances, entropies, learn, reinforce
from coconut.adaptive.space import Space
from coconut.completions.completion import completion_from_ids
from coconut.config import DataFiles, EngineConfig, TaskName
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import evaluate
from coconut.generate import run as generate
from coconut.generation.config import GenerateConfig
from coconut.generation.generate import pad_rows
from coconut.methods import PromptFormat
from coconut.rewards.implicit import ImplicitReward
from coconut.runs.checkpoints import Checkpoints
from coconut.tasks import TASKS
from coconut.training.trainer import run as train
from coconut.utils.files import read_json, write_json

CPU = EngineConfig(device="cpu", threads=1)
QUESTIONS = [example.question for example in EXAMPLES]
SPACE = Space.of(
    {"num_thoughts": [0, 1, 3], "decoding": {"greedy": {"temperature": 0}, "vote": {"temperature": 1, "samples": 3}}}
)
QUICK = FunctionConfig(workers=3, tries=3, wait=0.0)


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4))
def test_space_numbers_configurations(sizes: list[int]) -> None:
    space = Space.of({f"d{i}": list(range(size)) for i, size in enumerate(sizes)})
    assert len(space) == np.prod(sizes)
    for number, places in enumerate(product(*map(range, sizes))):
        assert space.settings(number) == {f"d{i}": place for i, place in enumerate(places)}
        assert space.number(places) == space.find({f"d{i}": place for i, place in enumerate(places)}) == number
    again = Space.of(json.loads(json.dumps(space.dimensions)))
    assert [again.settings(number) for number in range(len(again))] == [space.settings(n) for n in range(len(space))]


def test_dimension_accepts_three_forms() -> None:
    crossed = Space.of({"instruction": {"base": ["Compute.", "Guess."], "variation": ["", "Be brief."]}})
    instructions = [crossed.settings(number)["instruction"] for number in range(len(crossed))]
    assert instructions == ["Compute.", "Compute. Be brief.", "Guess.", "Guess. Be brief."]
    chosen = SPACE.settings(SPACE.find({"num_thoughts": 3, "decoding": "vote"}))
    assert chosen == {"num_thoughts": 3, "temperature": 1, "samples": 3}
    assert SPACE.label(0) == "num_thoughts 0, decoding greedy"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "space is empty"),
        ({"steps": [3]}, "Leave out a dimension with one value"),
        ({"steps": [3, 3]}, "all different"),
        ({"steps": 3}, "must be a list of values"),
        ({"a": {"x": {"t": 1}, "y": {"t": 2}}, "t": [1, 2]}, "space.a and space.t both set t"),
    ],
)
def test_space_refuses_invalid_dimensions(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space.of(spec)
    with pytest.raises(ValueError, match="num_thoughts has no value 2; its values are 0, 1, 3"):
        SPACE.find({"num_thoughts": 2})
    with pytest.raises(ValueError, match="There is no dimension mode"):
        SPACE.find({"mode": "think"})


def test_reinforce_gradient_is_that_of_the_expected_reward() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(2, 3, dtype=torch.float64)
    logits = [torch.randn(1, 1, size, dtype=torch.float64, requires_grad=True) for size in (2, 3)]
    log_probs = [row.log_softmax(-1) for row in logits]
    wanted = -(log_probs[0].exp()[0, 0] @ rewards @ log_probs[1].exp()[0, 0])
    expected = torch.autograd.grad(wanted, logits, retain_graph=True)
    for baseline in (0.0, 0.7):
        loss = torch.zeros((), dtype=torch.float64)
        for a, b in product(range(2), range(3)):
            chance = (log_probs[0][0, 0, a] + log_probs[1][0, 0, b]).exp().detach()
            taken = [torch.tensor([[a]]), torch.tensor([[b]])]
            loss = loss + chance * reinforce(log_probs, taken, (rewards[a, b] - baseline)[None, None])
        found = torch.autograd.grad(loss, logits, retain_graph=True)
        for gradient, wanted_gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=1e-12)


def clear_table(questions: int = 300, seed: int = 0) -> OutcomeTable:
    """Three kinds of questions, each answered by one value of a dimension; the other dimension only costs passes."""
    random = np.random.default_rng(seed)
    kinds = random.integers(3, size=questions)
    space = Space.of({"num_thoughts": [0, 1, 2], "decoding": {"once": {"samples": 1}, "thrice": {"samples": 3}}})
    settings = [space.settings(number) for number in range(len(space))]
    right = np.array([[float(one["num_thoughts"] == kind) for one in settings] for kind in kinds], np.float32)
    passes = np.array([[2.0 * one["samples"] for one in settings]] * questions, np.float32)
    embeddings = np.eye(3, 8)[kinds] + 0.1 * random.normal(size=(questions, 8))
    questions_text = [f"question {i}" for i in range(questions)]
    about = {"backend": "by hand", "embedding": "mean", "task": "prosqa", "max_new_tokens": None, "checkpoint": "best"}
    return OutcomeTable(space, questions_text, kinds, right, right, passes, embeddings.astype(np.float32), about)


@pytest.mark.slow
def test_policy_learns_what_depends_on_the_question() -> None:
    table = clear_table()
    config = PolicyConfig(updates=400, decay=0.99)
    results = run_experiments(table, config, cost=0.05, default=0, num_train_questions=60, seeds=4)
    rows = {row["arm"]: row for row in arms_study(results).rows}
    assert rows["oracle"]["reward"] == pytest.approx(0.9)
    assert rows["policy"]["reward"] > 0.85
    assert rows["policy"]["seeds_above"] == 4
    assert rows["num_thoughts alone"]["reward"] > 0.85
    for name in ("blind policy", "best fixed", "decoding alone"):
        assert rows[name]["reward"] < 0.4
    assert rows["random"]["reward"] == pytest.approx(1 / 3 - 0.05 * 4, abs=1e-5)
    assert rows["random"]["accuracy"] == pytest.approx(1 / 3)
    shown = results.learned.policy.probabilities(torch.from_numpy(table.embeddings).expand(4, -1, -1), 0.1)
    far, undecided = distances(shown), entropies(shown)
    assert (far[:, 0] > 0.5).all()
    assert (far[:, 1] < 0.2).all()
    assert (undecided < 0.5).all()


def test_parallel_policies_are_independent() -> None:
    torch.manual_seed(1)
    space, embeddings = clear_table().space, torch.randn(2, 20, 5)
    rewards = torch.rand(2, 20, len(space))
    config = PolicyConfig(updates=20)
    first = learn(space, embeddings, rewards, config)
    other = learn(space, embeddings, torch.stack([rewards[0], rewards[1].flip(-1)]), config)
    for a, b in zip(first.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])
    again = learn(space, embeddings, rewards, config)
    assert all(map(torch.equal, again.policy.parameters(), first.policy.parameters()))
    few = learn(space, embeddings, rewards, PolicyConfig(updates=2, batch_size=3))
    assert 1 <= few.tried.min() <= few.tried.max() <= 6


def test_fixed_dimension_is_not_trained() -> None:
    table = clear_table()
    rewards = torch.from_numpy(table.rewards(0.0))[None]
    embeddings, fixed = torch.from_numpy(table.embeddings)[None], [None, torch.tensor([1])]
    held = learn(table.space, embeddings, rewards, PolicyConfig(updates=50), fixed=fixed)
    start = learn(table.space, embeddings, rewards, PolicyConfig(updates=1, lr=1e-12))
    assert torch.allclose(held.policy.heads[1], start.policy.heads[1])
    assert not torch.allclose(held.policy.heads[0], start.policy.heads[0])


def test_policy_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy, embeddings = ConfigurationPolicy(SPACE, 8, 4, copies=3), torch.randn(3, 50, 8)
    policy.fit_scale(embeddings)
    policy.save(tmp_path / "p.safetensors", {"task": "prosqa"}, copy=2)
    alone, about = ConfigurationPolicy.load(tmp_path / "p.safetensors")
    assert about == {"task": "prosqa"}
    assert torch.equal(alone.best(embeddings[2:]), policy.best(embeddings)[2:])
    assert (tmp_path / "p.safetensors").stat().st_size < 4096
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no")
    for name in ("other.safetensors", "text"):
        with pytest.raises(ValueError, match="is no policy"):
            ConfigurationPolicy.load(tmp_path / name)


def latent(batch_size: int = 64) -> LatentBackend:
    return LatentBackend(build("gpt2", torch.float64), "a model", batch_size, 6)


def test_latent_backend_answers_equal_evaluation(tmp_path: Path) -> None:
    backend = latent()
    replies = collect_answers(backend, QUESTIONS, SPACE, tmp_path / "log.jsonl")
    for number in range(0, len(SPACE), 2):
        settings = SPACE.settings(number)
        expected = evaluate(backend.lm, TASK, EXAMPLES, num_thoughts=settings["num_thoughts"], max_new_tokens=6)
        for row, prediction in zip(replies, expected.predictions, strict=True):
            assert row[number].texts == (prediction.text.strip(),)
            assert (row[number].passes, row[number].truncated) == (prediction.passes, prediction.truncated)
        assert all(len(row[number + 1].texts) == len(row[number + 1].completion_ids) == 3 for row in replies)


@pytest.mark.parametrize("kind", ["words", "thoughts", "hybrid"])
def test_reply_passes_equal_forward_calls(kind: str) -> None:
    """Decoded again call by call: the prompt once, then each sample's tokens but the last."""
    lm = hybrid("gpt2") if kind == "hybrid" else build("gpt2", torch.float64)
    backend, calls = LatentBackend(lm, "a model", 64, 5), 0
    thoughts: dict[str, Any] = {} if kind == "hybrid" else {"num_thoughts": 3 * (kind == "thoughts")}
    [replies] = backend([QUESTIONS[0]], {"temperature": 1, "samples": 5, **thoughts}, (0,))
    reply = replies[0]

    def fed(embeds_TD: torch.Tensor, cache: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        base: Any = lm.base
        out = base.transformer(inputs_embeds=embeds_TD[None], use_cache=True, **{lm.cache_argument: cache})
        return out.last_hidden_state[0, -1]

    def embedded(ids: Sequence[int]) -> torch.Tensor:
        return lm.base.get_input_embeddings()(torch.tensor(ids))

    [question], sampled, likely = backend.rows([QUESTIONS[0]], {}), [], []
    calls += any(reply.modes)  # over the question, to choose their modes
    with torch.no_grad():
        for mode, count in sorted(set(zip(reply.modes, reply.num_thoughts, strict=True))):
            control = [lm.special.control[mode]] if mode else []
            slot = slot_with_markers(lm.reasoning.in_mode(mode) if mode else lm.reasoning, lm.special, count).tolist()
            prompt, cache = DynamicCache(), DynamicCache()
            before = [*question, *control, *slot[:1]] if count else [*question, *control, *slot]
            state = fed(embedded(before), prompt)
            for _ in range(count):
                state = fed(state[None], prompt)
            if count:
                state = fed(embedded(slot[-1:]), prompt)
            for place, ids in enumerate(reply.completion_ids):
                if reply.modes[place] != mode:
                    continue
                cache, own = copy.deepcopy(prompt), state
                for n, token in enumerate(ids):
                    own = fed(embedded(ids[n - 1 : n]), cache) if n else own
                    logits = lm.logits(own).float()
                    logits[list(lm.special.added)] = -torch.inf
                    likely.append(float(logits.log_softmax(-1)[token]))
                sampled.append(place)
    assert sorted(sampled) == list(range(5))
    assert reply.passes == calls
    with backends._seeded((0,), lm.device):
        out = lm.generate(*pad_rows([question], lm.special.pad), do_sample=True, temperature=1.0, top_p=1.0,
                          log_probs=True, num_return_sequences=5, max_new_tokens=5, **thoughts)  # fmt: skip
    assert out.log_probs is not None
    assert likely == pytest.approx([value for i in sampled for value in out.log_probs[i].tolist()], abs=1e-5)


def test_latent_backend_encodes_questions_as_evaluation_does(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_causal(tmp_path))
    lm = LatentLM.from_base(base, byte_level_tokenizer())
    asked = [" Is Tom a cat? ", "How many?\n"]
    longer = [f"Every dog {question}" for question in asked]
    for texts, settings in ((asked, {}), (longer, {"prefix": "Every dog"})):
        expected = encode_questions(lm.tokenizer, texts, lm.reasoning.format)
        assert LatentBackend(lm, "a model").rows(asked, settings) == expected


def test_answers_do_not_depend_on_batches_and_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = Space.of({"num_thoughts": [0, 1, 2]})
    together = collect_answers(latent(), QUESTIONS, greedy, tmp_path / "a.jsonl")
    assert collect_answers(latent(1), QUESTIONS, greedy, tmp_path / "b.jsonl") == together
    whole = collect_answers(latent(), QUESTIONS, SPACE, tmp_path / "whole.jsonl", chunk=2)
    part, asked = tmp_path / "part.jsonl", 0
    real = latent()

    class Stopping(LatentBackend):
        def __call__(self, *arguments: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == 4:
                raise RuntimeError("out of memory")
            return super().__call__(*arguments)

    with pytest.raises(ValueError, match=r"out of memory\n5 of 18 answers are in .* resumes from there"):
        collect_answers(Stopping(real.lm, "a model", 64, 6), QUESTIONS, SPACE, part, chunk=2)
    part.write_text(part.read_text() + '{"key": "cut of')
    assert collect_answers(real, QUESTIONS, SPACE, part, chunk=2) == whole
    monkeypatch.setattr(LatentBackend, "__call__", lambda *_: pytest.fail("a logged question is asked again"))
    assert collect_answers(real, QUESTIONS, SPACE, part, chunk=2) == whole
    fewer = Space.of({"decoding": {"vote": {"temperature": 1, "samples": 3}, "greedy": {"temperature": 0}},
                      "num_thoughts": [3, 1]})  # fmt: skip
    assert collect_answers(real, [*QUESTIONS, QUESTIONS[0]], SPACE, part, chunk=2) == [*whole, whole[0]]
    [row, *_] = collect_answers(real, QUESTIONS, fewer, part)
    assert row[0] == whole[0][SPACE.find({"num_thoughts": 3, "decoding": "vote"})]


def test_latent_backend_accepts_mode_and_prefix(tmp_path: Path) -> None:
    backend = LatentBackend(hybrid("gpt2"), "hybrid", 64, 4)
    space = Space.of({"mode": ["short", "think"], "prefix": ["", "7 7"]})
    replies = collect_answers(backend, QUESTIONS, space, tmp_path / "l")
    assert {mode for row in replies for reply in row for mode in reply.modes} == {"short", "think"}
    with pytest.raises(ValueError, match="mode sets the number of its thoughts"):
        collect_answers(backend, QUESTIONS, Space.of({"num_thoughts": [0, 1]}), tmp_path / "m")
    [several] = backend(QUESTIONS, {"temperature": 2, "samples": 8}, (0,))
    assert any(len(set(reply.modes)) > 1 for reply in several.values()), "samples choose their own mode"


def saved_causal(folder: Path) -> Path:
    tokenizer = byte_level_tokenizer()
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def causal(place: Path, prompt: str = "{question}", **limits: int) -> CausalModelBackend:
    return CausalModelBackend(str(place), prompt, torch.device("cpu"), **limits)


def test_causal_model_backend_answers_and_checks_its_prompt(tmp_path: Path) -> None:
    place, decoding = (
        saved_causal(tmp_path / "model"),
        {"greedy": {"temperature": 0}, "two": {"temperature": 1, "samples": 2}},
    )
    space = Space.of({"steps": [1, 2], "decoding": decoding})
    backend = causal(place, "{question} in {steps} steps", max_new_tokens=5)
    replies = collect_answers(backend, QUESTIONS, space, tmp_path / "log")
    one = causal(place, "{question} in {steps} steps", batch_size=1, max_new_tokens=5)
    alone = collect_answers(one, QUESTIONS, space, tmp_path / "log1")
    for row, other in zip(replies, alone, strict=True):
        assert [reply.texts for reply in row[::2]] == [reply.texts for reply in other[::2]]
        assert [len(reply.texts) for reply in row] == [1, 2, 1, 2]
        assert all(0 < reply.passes <= 5 * len(reply.texts) for reply in row)
    with pytest.raises(ValueError, match="which the space does not set"):
        backends.refuse_unknown(Space.of({"temperature": [0, 1]}), causal(place, "{question} {plan}"))
    with pytest.raises(ValueError, match=r"it must contain \{question\}"):
        causal(place, "{steps}")
    with pytest.raises(ValueError, match="braces must hold names of settings"):
        causal(place, "{question} {}")
    assert one.fits(["1", "1 " * 200], {"steps": 1}) == [True, False]


def test_causal_model_backend_ignores_its_generation_config(tmp_path: Path) -> None:
    place = saved_causal(tmp_path / "model")
    plain = causal(place, "{question} ?", max_new_tokens=6)
    own = {"do_sample": True, "repetition_penalty": 9.0, "min_p": 0.99, "no_repeat_ngram_size": 1, "min_new_tokens": 6,
           "eos_token_id": plain.eos_ids}  # fmt: skip
    write_json(place / "generation_config.json", own)
    backend = causal(place, "{question} ?", max_new_tokens=6)
    [replies] = backend(QUESTIONS, {"temperature": 0}, (0,))
    for i, ids in enumerate(backend.rows(QUESTIONS, {})):
        said: list[int] = []
        while len(said) < 6 and not set(said) & set(backend.eos_ids):
            with torch.no_grad():
                said.append(int(backend.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        assert replies[i].completion_ids == (tuple(said),)
    wild = {"temperature": 1.5, "samples": 6}
    [[sampled], [expected]] = ([*each(QUESTIONS, wild, (0,))] for each in (backend, plain))
    assert sampled == expected
    [uniform] = backend(["1 2"], {"temperature": 1000, "samples": 400, "max_new_tokens": 1}, (0,))
    assert len(set(uniform[0].completion_ids)) > 60  # transformers' own top_k is 50


def function(call: Any) -> FunctionBackend:
    return FunctionBackend(call, "mine", QUICK, frozenset({"steps"}))


STEPS = Space.of({"steps": [1, 2]})


def test_function_backend_retries_and_asks_once(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    lock = threading.Lock()

    def shaky(question: str, settings: dict[str, Any]) -> str | Reply:
        with lock:
            calls.append((question, settings["steps"]))
            first = calls.count((question, settings["steps"])) == 1
        if first:
            raise ConnectionError("busy")
        return f"{question} {settings['steps']}" if question != "9" else Reply(("### c",), passes=7)

    replies = collect_answers(function(shaky), QUESTIONS, STEPS, tmp_path / "log")
    assert len(calls) == 2 * len(QUESTIONS) * len(STEPS)
    assert replies[0][1].texts == (f"{QUESTIONS[0]} 2",)
    assert replies[0][1].passes == len(QUESTIONS[0].split()) + 1
    assert replies[2][0].passes == 7
    assert collect_answers(function(shaky), QUESTIONS, STEPS, tmp_path / "log") == replies
    assert len(calls) == 2 * len(QUESTIONS) * len(STEPS)


def test_function_backend_keeps_replies_before_a_failure(tmp_path: Path) -> None:
    questions = [str(i) for i in range(20)]

    def broken(question: str, settings: dict[str, Any]) -> str:
        time.sleep(0.02)
        if question == "7":
            raise ConnectionError("no route")
        return "### c"

    with pytest.raises(ValueError, match=r"mine failed 3 times on '7', the last time with ConnectionError: no route\n"):
        collect_answers(function(broken), questions, STEPS, tmp_path / "log")
    before = len(backends.read_log(tmp_path / "log"))
    assert 5 <= before < 20
    calls: list[str] = []
    collect_answers(function(lambda asked, _: calls.append(asked) or "### c"), questions, STEPS, tmp_path / "log")
    assert len(calls) == 2 * len(questions) - before
    for bad in (3, Reply(())):
        with pytest.raises(ValueError, match=r"mine gave .* for '1'; it must return a text"):
            collect_answers(function(lambda *_, bad=bad: bad), ["1"], STEPS, tmp_path / "other")


def test_function_backend_doubles_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(backends.time, "sleep", waits.append)

    def never(question: str, settings: dict[str, Any]) -> str:
        raise TimeoutError

    asked = FunctionBackend(never, "mine", FunctionConfig(workers=1, tries=4, wait=1.0), frozenset())
    with pytest.raises(ValueError, match="failed 4 times"):
        list(asked(["1"], {}, (0,)))
    assert len(waits) == 3
    assert all(0.75 * 2**i <= wait <= 1.25 * 2**i for i, wait in enumerate(waits))


VOTE = Vote(TASK, PromptFormat("{}", "{} ", "### {}"))
NUMBERS = Vote(TASKS["gsm8k"], PromptFormat())


def test_tied_answers_share_the_score() -> None:
    examples = [Example("?", (), "c")]
    for texts in set(permutations(["### a", "### c", "nothing", "### c .", "### a"])):
        assert sorted(texts[i][:5] for i in VOTE.tied_samples(Reply(texts))) == ["### a", "### c"]
        assert ExactJudge(VOTE)(examples, [Reply(texts)]) == [0.5]
    assert ExactJudge(VOTE)(examples, [Reply(("### a", "### b", "### c"))]) == [pytest.approx(1 / 3)]
    firsts = [texts[VOTE.chosen_sample(Reply(texts))] for texts in permutations(["### a", "### c", "### c", "### a"])]
    assert firsts.count("### c") == firsts.count("### a") == 12, "each is equally often the first"
    assert NUMBERS.tied_samples(Reply(("### $18", "### 7", "### 18", "### 7", "### 18.00"))) == [0]


def test_vote_takes_the_first_of_the_most_frequent_answers() -> None:
    assert VOTE.chosen_sample(Reply(("### a", "### c", "nothing", "### c", "### a"))) == 0
    assert VOTE.chosen_sample(Reply(("### a", "### c", "### c"))) == 1
    assert VOTE.chosen_sample(Reply(("nothing", "none"))) == 0
    assert NUMBERS.chosen_sample(Reply(("### 7", "### 1000", "### 1,000", "### 7", "### $1000"))) == 1
    replies = [Reply(("### a", "### c", "### c")), Reply(("### a",)), Reply(("c",))]
    assert ExactJudge(VOTE)([Example("?", (), "c")] * 3, replies) == [1, 0, 0]


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_judge_scores_names_an_invalid_score(score: float) -> None:
    message = r"The judge gave .* to '### c', an answer to '\?'; a score must be in \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        judge_scores(lambda *_: [score], [Example("?", (), "c")], [Reply(("### c",))], {})


def test_pretrained_judge_scores_the_chosen_sample(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    shape = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64,
             "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    torch.manual_seed(0)
    for labels, name in ((1, "judge"), (2, "classes")):
        config = AutoConfig.for_model("gpt2", **shape, num_labels=labels)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    judge = PretrainedJudge(str(tmp_path / "judge"), VOTE, torch.device("cpu"), batch_size=2)
    replies = [Reply(("### a", "### c", "### c")), Reply(("a longer answer ### c",)), Reply(("### b",))]
    scores = judge_scores(judge, EXAMPLES, replies, {})
    assert len({round(score, 6) for score in scores}) == 3
    for example, reply, score in zip(EXAMPLES, replies, scores, strict=True):
        alone = PretrainedJudge(str(tmp_path / "judge"), VOTE, torch.device("cpu"))
        assert alone([example], [Reply((reply.texts[VOTE.chosen_sample(reply)],))]) == pytest.approx([score], abs=1e-5)
    with pytest.raises(ValueError, match="has 2 outputs; a judge must have one"):
        PretrainedJudge(str(tmp_path / "classes"), VOTE, torch.device("cpu"))


def test_implicit_judge_is_the_sigmoid_of_the_token_sum() -> None:
    backend, model = latent(), build("gpt2", torch.float64, seed=3)
    reward = ImplicitReward(model, backend.lm, 0.5)
    settings = {"num_thoughts": 1}
    [replied] = backend(QUESTIONS, settings, (0,))
    replies = [replied[i] for i in range(len(QUESTIONS))]
    scores = judge_scores(ImplicitJudge(backend, reward, VOTE), EXAMPLES, replies, settings)
    for question, reply, score in zip(QUESTIONS, replies, scores, strict=True):
        [row] = backend.rows([question], settings)
        [tokens] = reward.tokens([completion_from_ids(model, row, reply.completion_ids[0], text="", num_thoughts=1)])
        assert score == pytest.approx(float(tokens.sum().sigmoid()), abs=1e-6)
    assert len(set(scores)) > 1


@pytest.mark.parametrize("pooling", encoders.POOLINGS)
def test_encoder_does_not_depend_on_the_batch(pooling: str, tmp_path: Path) -> None:
    lm = build("llama", torch.float64)
    many, one = (encoders.latent_encoder(lm, pooling, size)(QUESTIONS) for size in (3, 1))
    torch.testing.assert_close(many, one, rtol=0, atol=1e-6)
    place = saved_causal(tmp_path / "model")
    backend = causal(place)
    many, one = (encoders.model_encoder(backend.model.base_model, backend.tokenizer, pooling, size)(QUESTIONS)
                 for size in (3, 1))  # fmt: skip
    torch.testing.assert_close(many, one, rtol=0, atol=1e-5)
    if pooling == "mean":
        named = encoders.load_encoder(str(place), torch.device("cpu"))(QUESTIONS)
        torch.testing.assert_close(named, one, rtol=0, atol=1e-5)


def test_outcome_table_is_written_and_read_and_refuses_invalid_values(tmp_path: Path) -> None:
    table = clear_table(20)
    table.write(tmp_path / "t.npz")
    again = OutcomeTable.read(tmp_path / "t.npz")
    assert (again.questions, again.about, again.space) == (table.questions, table.about, table.space)
    for name in ("score", "correct", "passes", "embeddings", "steps"):
        assert np.array_equal(getattr(again, name), getattr(table, name))
    (tmp_path / "no.npz").write_text("no")
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    for name in ("no.npz", "other.npz"):
        with pytest.raises(ValueError, match=r"is no table of coconut adaptive"):
            OutcomeTable.read(tmp_path / name)
    with pytest.raises(ValueError, match="has a score of 2"):
        replace(table, score=table.score + 1)
    with pytest.raises(ValueError, match="The table of outcomes is empty"):
        replace(table, questions=[])


def test_arms_equal_hand_computation_and_page_is_complete(tmp_path: Path) -> None:
    table = clear_table(60)
    found = run_experiments(table, PolicyConfig(updates=30), cost=0.05, default=5, num_train_questions=20, seeds=3)
    assert sorted([*found.train[0], *found.test[0]]) == list(range(60))
    rewards = table.rewards(0.05)
    rows = {row["arm"]: row for row in arms_study(found).rows}
    assert rows["default"]["reward"] == pytest.approx(rewards[:, 5][found.test].mean())
    best = [rewards[train].mean(0).argmax() for train in found.train]
    by_hand = np.mean([rewards[test, number].mean() for test, number in zip(found.test, best, strict=True)])
    assert rows["best fixed"]["reward"] == pytest.approx(by_hand)
    assert rows["oracle"]["reward"] == pytest.approx(rewards.max(1)[found.test].mean())
    assert arms_study(found).facts["headroom"] == pytest.approx(rows["oracle"]["reward"] - by_hand, abs=1e-6)
    made = studies(found)
    curve = made["curve"].rows
    assert curve[0]["update"] == 1
    total = sum(row["regret"] for row in curve)  # as many points as updates
    assert made["curve"].facts["total"] == pytest.approx(total, rel=1e-5)
    html = report.adaptive_page(made, "by hand", tmp_path)
    assert report.sentences(made)[0].startswith("The headroom is +0.")
    assert "the best for each question" in html
    assert html.count("<svg") == 2
    assert max(map(len, report.on_screen(made).splitlines())) <= 100
    flat = replace(table, score=np.ones_like(table.score), correct=np.ones_like(table.score))
    made = studies(run_experiments(flat, PolicyConfig(updates=5), cost=0.0, default=0, num_train_questions=20, seeds=2))
    assert any("hardly anything to gain by choosing" in sentence for sentence in report.sentences(made))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive") / "run"
    train(small_run(folder, graph_files(folder.parent, 64, 24, 8)))
    return folder


def asked_of(trained: Path) -> dict[str, Any]:
    """Keys that another model needs to be asked the questions of a run."""
    file = read_json(trained / "run.json")["data"]["valid"]["file"]
    return {"data": DataFiles(valid=file), "task": TaskName.prosqa}


def command(folder: Path | None, **changes: Any) -> AdaptiveConfig:
    values: dict[str, Any] = {
        "run": str(folder or ""), "split": "valid", "num_train_questions": 4, "seeds": 2, "max_new_tokens": 6,
        "cost": 0.01, "engine": CPU,
        "space": {"num_thoughts": [0, 1, 2], "decoding": SPACE.dimensions["decoding"]},
        "policy": PolicyConfig(updates=20),
    }  # fmt: skip
    return AdaptiveConfig(**{**values, **changes})


@pytest.mark.slow
def test_adaptive_command_writes_table_policy_and_page(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adaptive.run(command(trained), only_table=True) == 0
    table = OutcomeTable.read(trained / "adaptive" / "outcomes.npz")
    assert adaptive.run(command(trained)) == 0
    said = capsys.readouterr().out
    assert "The headroom is +" in said
    folder = trained / "adaptive"
    files = "outcomes.npz answers.jsonl policy.safetensors adaptive.html arms.csv curve.json choices.json heads.csv"
    assert set(files.split()) <= {file.name for file in folder.iterdir()}
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert len(lines) == len(set(table.questions)) * 6
    arms = (folder / "arms.json").read_text()
    other = command(None, table=str(folder / "outcomes.npz"), output=str(folder.parent / "again"))
    assert adaptive.run(other) == 0
    assert (folder.parent / "again" / "arms.json").read_text() == arms
    with pytest.raises(ValueError, match="exists already"):
        adaptive.run(other, only_table=True)


def test_generate_uses_the_policys_configuration(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = {"space": {"num_thoughts": [0, 1, 2]}, "output": str(tmp_path / "choice")}
    adaptive.run(command(trained, **greedy))
    table = OutcomeTable.read(tmp_path / "choice" / "outcomes.npz")
    policy, _ = ConfigurationPolicy.load(tmp_path / "choice" / "policy.safetensors")
    chosen = policy.best(torch.from_numpy(table.embeddings)[None])[0].tolist()
    capsys.readouterr()
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(table.questions))
    own = str(tmp_path / "choice" / "policy.safetensors")
    asked: dict[str, Any] = {"run": str(trained), "policy": own, "engine": CPU}
    assert generate(GenerateConfig(**asked, file=str(questions), output=str(tmp_path / "out.jsonl"))) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [policy.space.settings(number) for number in chosen]
    for i, row in enumerate(rows):
        assert row["question"] == table.questions[i]
        assert row["passes"] == table.passes[i, chosen[i]]
        assert row["num_thoughts"] == row["chosen"]["num_thoughts"]
    capsys.readouterr()
    assert generate(GenerateConfig(**asked, question=table.questions[0])) == 0
    done = capsys.readouterr()
    assert done.out.strip() == rows[0]["text"]
    assert policy.space.label(chosen[0]) in done.err
    with pytest.raises(ValueError, match=r"are both given\. The policy says"):
        GenerateConfig(**asked, num_thoughts=2)
    with pytest.raises(ValueError, match="Question 1 is too long: in one of the configurations"):
        generate(GenerateConfig(**asked, question="1 " * 200))


def test_chooser_refuses_another_model(tmp_path: Path) -> None:
    lm, other = build("gpt2", torch.float64), build("gpt2", torch.float64, seed=5)
    table = clear_table(5)
    seen = encoders.latent_encoder(lm, "mean")([QUESTIONS[0]])
    questions = [QUESTIONS[0], *table.questions[1:]]
    mine = replace(table, questions=questions, embeddings=np.repeat(seen.numpy(), 5, 0))
    ConfigurationPolicy(table.space, seen.shape[1], 4).save(tmp_path / "p", policy_metadata(mine))
    assert len(Chooser(tmp_path / "p", lm).choose(QUESTIONS)) == len(QUESTIONS)
    with pytest.raises(ValueError, match="was trained for another model, by hand"):
        Chooser(tmp_path / "p", other)
    ConfigurationPolicy(STEPS, seen.shape[1], 4).save(tmp_path / "steps", policy_metadata(mine))
    with pytest.raises(ValueError, match="The space sets steps, which a model does not accept"):
        Chooser(tmp_path / "steps", lm).answer(LatentBackend(lm, "a model"), QUESTIONS)


def test_adaptive_command_with_base_and_function(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved_causal(tmp_path / "model")
    values: dict[str, Any] = {**asked_of(trained), "limit": 8, "space": {"steps": [1, 2]}}
    of_model = {"base": str(place), "prompt": "{question} {steps}", "output": str(tmp_path / "by_model")}
    assert adaptive.run(command(None, **values, **of_model)) == 0
    assert (tmp_path / "by_model" / "adaptive.html").is_file()
    (tmp_path / "api.py").write_text("def ask(question, settings):\n    return '### ' + str(settings['steps'])\n")
    monkeypatch.chdir(tmp_path)
    values |= {"embedding": str(place), "output": str(tmp_path / "by_function")}
    assert adaptive.run(command(None, **values, function="api:ask")) == 0
    for name in ("api:nothing", "nowhere:ask", "api"):
        with pytest.raises(ValueError, match="is no MODULE:NAME"):
            adaptive.run(command(None, **values, function=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": ""}, "given: none of them"),
        ({"base": "x"}, "given: run=.* and base=x"),
        ({"run": "", "base": "x", "output": "o"}, "needs task="),
        ({"run": "", "function": "a:b", "task": TaskName.prosqa, "output": "o", "data": DataFiles(valid="f")},
         "which a function does not give"),
        ({"space": {"num_thoughts": [1]}}, "Leave out a dimension with one value"),
        ({"default": {"num_thoughts": 9}}, "has no value 9"),
        ({"split": "other"}, "split is 'other'"),
        ({"num_train_questions": 1}, "num_train_questions is 1; it must be at least 2"),
    ],
)  # fmt: skip
def test_adaptive_config_refuses_invalid_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(Path("runs/mine"), **changes)
    with pytest.raises(ValueError, match=r"needs a model: judge\.model"):
        JudgeConfig(JudgeKind.model)
    with pytest.raises(ValueError, match=r"has no effect with judge\.kind=exact"):
        JudgeConfig(JudgeKind.exact, "x")


def test_adaptive_command_checks_before_it_asks(trained: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    wild = {"space": {"temperature": [0, 1], "samples": [1, 3]}}
    for changes, message in (
        ({"num_train_questions": 24}, "num_train_questions=24 leaves none of"),
        (wild, "temperature 0, samples 3: 3 samples without a temperature are identical"),
        ({"space": {"num_thoughts": [0, 200]}}, "No question of .* leaves room for an answer"),
        ({"run": str(tmp_path / "nothing"), "output": ""}, "There is no folder"),
        ({"run": "", "table": str(tmp_path / "none.npz")}, "There is no table"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            adaptive.run(command(trained, **{"output": output, **changes}))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="There is no policy"):
        generate(GenerateConfig(run=str(trained), policy=str(tmp_path / "none"), question="1", engine=CPU))


def test_answers_depend_on_max_new_tokens(trained: Path, tmp_path: Path) -> None:
    output, space = str(tmp_path / "out"), {"num_thoughts": [0, 1]}
    tables = []
    for limit in (1, 6):
        adaptive.run(command(trained, output=output, space=space, max_new_tokens=limit), only_table=True)
        tables.append(OutcomeTable.read(tmp_path / "out" / "outcomes.npz"))
    assert (tables[0].passes < tables[1].passes).any()


def test_backend_name_identifies_weights_and_format(trained: Path, tmp_path: Path) -> None:
    """The backend's name depends on weights, chat template and reasoning, not on the weights' file."""
    place = saved_causal(tmp_path / "model")
    weights = load_file(place / "model.safetensors")
    asked = asked_of(trained) | {"output": str(tmp_path)}
    by_base = command(None, **asked, base=str(place), limit=4, prompt="{question} {steps}", space={"steps": [1, 2]})

    def names() -> set[str]:
        return {adaptive._inputs(by_base).backend.name for _ in range(2)}

    seen = names()
    (place / "model.safetensors").unlink()
    torch.save(weights, place / "pytorch_model.bin")
    seen |= names()
    assert len(seen) == 1, "the same weights in another file"
    changed = {name: value + (value.dim() == 1) * 1e-3 for name, value in weights.items()}
    torch.save(changed, place / "pytorch_model.bin")
    seen |= names()
    (place / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    seen |= names()
    assert len(seen) == 3

    saved = tmp_path / "saved"
    LatentLM.from_pretrained(Checkpoints(trained).find("best")).save_pretrained(saved)
    by_run = command(saved, **asked)
    first, about = adaptive._inputs(by_run).backend.name, read_json(saved / "coconut.json")
    about["reasoning"]["num_thoughts"] += 1
    write_json(saved / "coconut.json", about)
    assert adaptive._inputs(by_run).backend.name != first


@pytest.mark.slow
def test_killed_table_command_resumes(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n\n\ndef ask(question, settings):\n    time.sleep(0.05)\n"
        "    open('calls', 'a').write('x')\n    return '### 1'\n"
    )
    place, file = saved_causal(tmp_path / "model"), asked_of(trained)["data"].valid
    arguments = [
        "table", "function=slow:ask", f"embedding={place}",
        f"data.valid={file}", "split=valid", "task=prosqa", "+space.steps=[1,2,3]", f"output={tmp_path}/out",
        "num_train_questions=4", "seeds=2", "engine.device=cpu", "engine.threads=1", "calls.workers=1",
    ]  # fmt: skip
    log = tmp_path / "out" / "answers.jsonl"
    with forked_command("adaptive", *arguments, cwd=tmp_path) as killed:
        killed.wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 5)
    logged = len(backends.read_log(log))
    with forked_command("adaptive", *arguments, cwd=tmp_path) as process:
        assert process.wait(120) == 0, process.printed
    table = OutcomeTable.read(tmp_path / "out" / "outcomes.npz")
    asked = (tmp_path / "calls").stat().st_size
    needed = len(set(table.questions)) * 3
    assert logged >= 5
    assert needed <= asked <= needed + 1  # the one that was under way
