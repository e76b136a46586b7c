"""The model `coconut` in lm-evaluation-harness: its own evaluator and command, on tasks of this folder."""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from helpers import ROOT
from helpers.models import ARCHITECTURES, build, byte_level_tokenizer, shift_weights
from helpers.processes import python
from helpers.runs import graph_files, small_run
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions, encode_texts
from coconut.evaluation.evaluator import Prediction, evaluate
from coconut.lm_eval import main
from coconut.methods import NOTHING, PAUSES, PromptFormat, Reasoning
from coconut.runs.checkpoints import Checkpoints
from coconut.tasks import TASKS
from coconut.training.trainer import run as run_training

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the harness and what it imports
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from coconut.hub.harness import CoconutLM

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

FORM = PromptFormat("{} ", "{} ", "a {}")
QUESTIONS = ["3 4 5", "7 a", "b 11 12 13 14 2", "9 9", "21 22 1 b", "4 4 4 4 4"]
CHOICES = ["3", "7 b", "c", "12 12"]


def saved(folder: Path, **reasoning: Any) -> Path:
    """A small model of words, in float64."""
    build("gpt2", **{"num_thoughts": 2, "format": FORM, "max_new_tokens": 6, **reasoning}).save_pretrained(folder)
    return folder


def of_bytes(folder: Path, chat: str = "", start: bool = True, **reasoning: Any) -> Path:
    """A small model with a byte-level tokenizer, in float64. `start`: whether a token stands before every text."""
    tokenizer = byte_level_tokenizer(start)
    tokenizer.chat_template = chat or None
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **ARCHITECTURES["gpt2"])
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", Reasoning(**reasoning))
    shift_weights(lm, 0.1).double().save_pretrained(folder)
    return folder


def model(path: Path, **settings: Any) -> CoconutLM:
    return CoconutLM(str(path), device="cpu", **settings)


def predicted(lm: LatentLM, questions: Sequence[str] = QUESTIONS) -> list[Prediction]:
    """What `coconut evaluate` finds for these questions, which all have the answer 3."""
    return evaluate(lm, TASKS["prosqa"], [Example(question, (), "3") for question in questions]).predictions


def write_tasks(folder: Path, questions: Sequence[str], answers: Sequence[str], **changes: Any) -> None:
    """Two tasks of the harness with the same questions: `written` to answer in words, `chosen` to choose an answer."""
    rows = [
        {"question": question, "answer": answer, "choices": CHOICES, "right": i % len(CHOICES)}
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}, "cache_dir": str(folder / "datasets")},
    }  # fmt: skip
    last_word = {"function": "regex", "regex_pattern": r"(\S+)\s*$"}
    written = {
        "task": "written", "output_type": "generate_until", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"do_sample": False, "temperature": 0.0, "until": ["\n\n"]},
        "filter_list": [{"name": "last", "filter": [last_word, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    chosen = {
        "task": "chosen", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    for task in (written, chosen):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task, **changes}))


def evaluated(lm: LM, folder: Path, *tasks: str, **settings: Any) -> Any:
    manager, run = TaskManager(include_path=str(folder), include_defaults=False), cast(Any, simple_evaluate)
    return run(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **settings)


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)


def own_model(path: Path, **settings: Any) -> Any:
    """The harness's model of a transformers folder."""
    return cast(Any, HFLM)(str(path), dtype="float64", device="cpu", **settings)


def log_likelihoods(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)


def slow_score(lm: LatentLM, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Token by token: one row that is recomputed without a cache, in float64."""
    total, greedy = 0.0, True
    allowed = [token for token in range(len(lm.tokenizer)) if token not in lm.special.added]
    for end, token in enumerate(continuation):
        ids = torch.tensor([[*prompt, *continuation[:end]]])
        logits: Any = lm(ids, return_logits=True, use_cache=False).logits
        assert logits.dtype is torch.float64
        probabilities = logits[0, -1].softmax(-1).tolist()
        total += torch.tensor(probabilities[token], dtype=torch.float64).log().item()
        greedy = greedy and max(allowed, key=probabilities.__getitem__) == token
    return total, greedy


def same(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], rel=1e-9)


def test_answers_are_those_of_coconut_evaluate(tmp_path: Path) -> None:
    """Question by question, in batches of any size, and again from the harness's cache."""
    path = saved(tmp_path / "model", format=PromptFormat("{} ", "{} ", "{}"))
    lm = model(path).lm
    gold = [one.predicted or "" if i % 2 else "nothing" for i, one in enumerate(predicted(lm))]
    examples = [Example(question, (), answer) for question, answer in zip(QUESTIONS, gold, strict=True)]
    result, found, _ = evaluate(lm, TASKS["prosqa"], examples)
    write_tasks(tmp_path, QUESTIONS, gold)
    assert len({one.text for one in found}) > 3
    for size, cache in ((1, None), (4, tmp_path / "cache"), (4, tmp_path / "cache")):
        lm = model(path, batch_size=size)
        theirs = evaluated(lm, tmp_path, "written", use_cache=cache and str(cache))
        rows = sorted(theirs["samples"]["written"], key=lambda row: row["doc_id"])
        assert [row["resps"][0][0] for row in rows] == [one.text for one in found]
        assert [row["exact_match"] == 1 for row in rows] == [one.correct for one in found]
        assert theirs["results"]["written"]["exact_match,last"] == result.accuracy == 0.5
        assert theirs["config"]["reasoning"]["num_thoughts"] == 2
    assert lm.cache_hook.dbdict is not None
    assert len(lm.cache_hook.dbdict) == 1 + len(QUESTIONS)


def test_a_choice_is_scored_as_an_answer_after_the_thoughts(tmp_path: Path) -> None:
    write_tasks(tmp_path, QUESTIONS, QUESTIONS)
    lm = model(saved(tmp_path / "model"), batch_size=5)
    rows = sorted(evaluated(lm, tmp_path, "chosen")["samples"]["chosen"], key=lambda row: row["doc_id"])
    special, mark, right = lm.lm.special, *encode_texts(lm.tokenizer, ["a"]), []
    for i, (question, row) in enumerate(zip(QUESTIONS, rows, strict=True)):
        (asked,) = encode_questions(lm.tokenizer, [question], FORM)
        prompt = [*asked, special.bot, special.latent, special.latent, special.eot, *mark]
        scores = [slow_score(lm.lm, prompt, [*ids, special.eos]) for ids in encode_texts(lm.tokenizer, CHOICES)]
        same([resps[0] for resps in row["resps"]], scores)
        best = max(range(len(CHOICES)), key=lambda k: scores[k][0])
        right.append(best == i % len(CHOICES))
        assert row["acc"] == right[-1]
    assert 0 < sum(right) < len(right), "else it could be a constant"


def test_greedy_is_what_the_model_would_write(tmp_path: Path) -> None:
    lm = model(saved(tmp_path / "model", format=PromptFormat("{}", "{} ", "{}"), max_new_tokens=3), format="raw")
    found = predicted(lm.lm)
    others = [" ".join([*one.text.split()[:2], "39"]) for one in found]
    pairs = [(one.question, text) for one, text in zip(found * 2, [*(one.text for one in found), *others], strict=True)]
    assert [greedy for _, greedy in log_likelihoods(lm, pairs)] == [True] * len(found) + [False] * len(found)


@pytest.mark.parametrize("slot", [{}, {"slot": PAUSES}], ids=["thoughts", "pauses"])
def test_raw_text_goes_on_after_the_thoughts(tmp_path: Path, slot: dict[str, Any]) -> None:
    lm = model(of_bytes(tmp_path / "model", num_thoughts=3, **slot), format="raw", num_thoughts=2, batch_size=3)
    pairs = [("Is Tom a cat?", " Every dog"), ("How many?\n", "3"), ("a", "b"), ("Is it? ", " no")]
    expected = []
    for context, continuation in pairs:
        start, middle = lm.prefix_token_id, slot_with_markers(lm.lm.reasoning, lm.lm.special, 2).tolist()
        asked, said = encode_texts(lm.tokenizer, [context, continuation])
        expected.append(slow_score(lm.lm, [start, *asked, *middle], said))
    same(log_likelihoods(lm, pairs), expected)


def test_without_a_slot_it_equals_the_harness_own_model(tmp_path: Path) -> None:
    path = of_bytes(tmp_path / "model", slot=NOTHING, markers=False, max_new_tokens=8)
    ours = model(path, format="raw", max_length=40)
    theirs = own_model(path, max_length=40, add_bos_token=True)
    pairs = [("Is Tom a cat?", " Every dog"), ("How many? ", "3"), ("", "a cat is"), ("a cat is " * 2, "a dog")]
    same(log_likelihoods(ours, pairs), log_likelihoods(theirs, pairs))


def test_plain_text_in_windows(tmp_path: Path) -> None:
    """No thought is involved: `hf`, which opens the same folder and does not feed a window's last token, agrees."""
    path = of_bytes(tmp_path / "model", start=False, num_thoughts=3)
    texts = ["Is Tom a cat?", "Every dog is a cat. " * 8, "How many?"]
    plain = [request("loglikelihood_rolling", text) for text in texts]
    theirs = own_model(path, max_length=39)
    found = model(path, max_length=40, batch_size=2).loglikelihood_rolling(plain, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(plain, disable_tqdm=True), rel=1e-9)


def test_stop_strings_limits_and_sampling(tmp_path: Path) -> None:
    lm = model(saved(tmp_path / "model"), batch_size=4)

    def answers(**options: Any) -> list[str]:
        return lm.generate_until([request("generate_until", q, options) for q in QUESTIONS], disable_tqdm=True)

    whole = [one.text for one in predicted(lm.lm)]
    assert answers(until=[]) == whole
    stop = whole[0].split()[2]
    assert answers(until=[stop, ""]) == [text.split(stop)[0] for text in whole]
    assert answers(until=stop)[0] == whole[0].split(stop)[0]
    short = [request("generate_until", question, {"max_gen_toks": 1 + i}) for i, question in enumerate(QUESTIONS)]
    limited = lm.generate_until(short, disable_tqdm=True)
    assert limited == [" ".join(text.split()[: 1 + i]) for i, text in enumerate(whole)]
    torch.manual_seed(1)
    drawn = answers(do_sample=True, temperature=1.5, top_p=0.9)
    assert drawn != whole
    torch.manual_seed(1)
    assert answers(do_sample=True, temperature=1.5, top_p=0.9) == drawn
    with pytest.raises(ValueError, match=r"num_beems=4 is not supported"):
        answers(num_beems=4)


def test_a_long_prompt_loses_its_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "model")
    lm, words = model(path, max_length=20), [str(i % 40) for i in range(50)]
    long, fits = " ".join(words), " ".join(words[-15:])  # <bot>, two thoughts, <eot>, and one token of the answer
    said = lm.generate_until([request("generate_until", text, {}) for text in (long, fits)], disable_tqdm=True)
    assert said[0] == said[1]
    assert "1 prompts lose their beginning, since max_length is 20" in capsys.readouterr().out
    said = [encode_texts(lm.tokenizer, [text])[0] for text in said]
    assert [len(ids) for ids in said] == [1, 1]
    fits = " ".join(words[-13:])  # the mark, the answer and the end of the sequence
    same(*[log_likelihoods(lm, [(text, "5")]) for text in (long, fits)])
    assert log_likelihoods(lm, [(" ".join(words[-12:]), "5")]) != log_likelihoods(lm, [(long, "5")])
    with pytest.raises(ValueError, match="max_length=6 leaves no token for a prompt"):
        log_likelihoods(model(path, max_length=6), [("3", "5")])


def test_chat_templates(tmp_path: Path) -> None:
    """The harness's prompt for a question, as it is, is the prompt of a model that was trained with the template."""
    template = (
        "<s>{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    form = PromptFormat("{}", "{} ", "{}", chat=True)
    path = of_bytes(tmp_path / "model", template, num_thoughts=2, format=form, max_new_tokens=8)
    write_tasks(tmp_path, ["Is Tom a cat?", "How many?"], ["a", "b"])
    raw, trained = model(path, format="raw"), model(path)
    texts = [one.text for one in predicted(raw.lm, ["Is Tom a cat?", "How many?"])]
    for lm, chat in ((raw, True), (trained, False)):
        rows = evaluated(lm, tmp_path, "written", apply_chat_template=chat)["samples"]["written"]
        assert [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])] == texts
    assert raw.chat_template(True) == template
    with pytest.raises(ValueError, match="add format=raw"):
        evaluated(trained, tmp_path, "written", apply_chat_template=True)
    with pytest.raises(ValueError, match=r"names .*latent"):
        raw.tok_encode(f"a {raw.tokenizer.convert_ids_to_tokens(raw.lm.latent_id)}")


def test_a_cache_belongs_to_one_model_with_its_settings(tmp_path: Path) -> None:
    first, other = saved(tmp_path / "model"), tmp_path / "other"
    shift_weights(LatentLM.from_pretrained(first), 0.01).save_pretrained(other)
    write_tasks(tmp_path, QUESTIONS[:1], ["3"])
    cache = str(tmp_path / "cache")
    evaluated(model(first), tmp_path, "written", use_cache=cache)
    settings: list[dict[str, Any]] = [
        {"num_thoughts": 1}, {"max_length": 50}, {"format": "raw"}, {"precision": "bfloat16"}
    ]  # fmt: skip
    others = [model(other), *(model(first, **one) for one in settings)]
    assert len({lm.tokenizer_name for lm in [model(first), model(first, batch_size=1), *others]}) == 1 + len(others)
    for lm in others:
        with pytest.raises(ValueError, match="holds answers of another model"):
            evaluated(lm, tmp_path, "written", use_cache=cache)


def test_a_hybrid_model_in_a_mode(tmp_path: Path) -> None:
    lm = build("gpt2", format=FORM, max_new_tokens=6)
    lm.add_modes(["short", "latent_2"])
    lm.save_pretrained(tmp_path / "model")
    hybrid, chosen = model(tmp_path / "model", mode="latent_2"), model(tmp_path / "model")
    special, (asked,) = hybrid.lm.special, encode_questions(hybrid.tokenizer, ["3 4"], FORM)
    mark, answer = (encode_texts(hybrid.tokenizer, [text])[0] for text in ("a", "7 b"))
    prompt = [*asked, special.control["latent_2"], special.bot, *[special.latent] * 2, special.eot, *mark]
    same(log_likelihoods(hybrid, [("3 4", " 7 b")]), [slow_score(hybrid.lm, prompt, [*answer, special.eos])])
    wanted = [request("generate_until", question, {}) for question in QUESTIONS]
    assert chosen.generate_until(wanted, disable_tqdm=True) == [one.text for one in predicted(hybrid.lm)]
    examples = [Example(question, (), "3") for question in QUESTIONS]
    forced = evaluate(hybrid.lm, TASKS["prosqa"], examples, mode="latent_2").predictions
    assert hybrid.generate_until(wanted, disable_tqdm=True) == [one.text for one in forced]
    with pytest.raises(ValueError, match="Add mode=NAME"):
        log_likelihoods(chosen, [("3 4", "7")])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "row"}, "format is 'row'; it is one of trained, raw"),
        ({"precision": "float8"}, "precision is 'float8'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"mode": "short"}, "mode=short: coconut has no modes"),
        ({"num_thoughts": -1}, "num_thoughts is -1"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(saved(tmp_path / "model"), **settings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Add --model_args path=PATH"),
        ({"path": "run", "pretrained": "gpt2"}, "no argument pretrained, only path, "),
    ],
)
def test_arguments_that_are_missing_or_unknown(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CoconutLM(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device can be used")
def test_the_harness_default_device_without_cuda(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    assert CoconutLM(str(path), device="cuda:0").device == CoconutLM(str(path)).device


def test_thoughts_of_a_method_without(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", method="cot", slot=NOTHING, markers=False, num_thoughts=0)
    with pytest.raises(ValueError, match="cot has neither thoughts nor pauses"):
        model(path, num_thoughts=2)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": 1,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="in one process, but this is one of 2"):
        model(saved(tmp_path / "model"))


def test_the_entry_point_names_the_class() -> None:
    """What a release of the harness that looks for entry points finds in the package's metadata."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    registry = Registry("model", base_cls=LM)
    for name, target in groups["lm_eval.models"].items():
        registry.register(name, target=EntryPoint(name, target, "lm_eval.models"))
    assert registry.get("coconut") is CoconutLM


def test_the_command_on_a_run(tmp_path: Path) -> None:
    """Without a line of code: a run by its folder, each of its checkpoints a model of its own."""
    data = graph_files(tmp_path, 20, 8, 4)
    run = tmp_path / "run"
    assert run_training(small_run(run, data, save_every=2)) == 0
    best, first = model(run), model(run, checkpoint=min(Checkpoints(run).steps()))
    assert best.tokenizer_name != first.tokenizer_name
    questions = [row["question"] for row in json.loads(Path(data.test).read_text())]
    write_tasks(tmp_path, questions, ["5"] * len(questions))
    done = python(
        "-m", "coconut", "lm_eval", "run", "--model", "coconut", "--model_args", f"path={run},num_thoughts=1",
        "--device", "cpu", "--batch_size", "4", "--tasks", "written,chosen", "--include_path", str(tmp_path),
        "--output_path", str(tmp_path / "results"), "--log_samples", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|written|" in done.stdout.replace(" ", "")
    (file,) = (tmp_path / "results").rglob("samples_written_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    examples = [Example(question, (), "5") for question in questions]
    expected = evaluate(best.lm, TASKS["prosqa"], examples, num_thoughts=1).predictions
    assert [row["resps"][0][0] for row in rows] == [one.text for one in expected]


def test_the_command_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path, QUESTIONS, QUESTIONS)
    given = ["--model", "coconut", "--model_args", f"path={tmp_path / 'none'}", "--tasks", "written"]
    monkeypatch.setattr("sys.argv", ["lm_eval", "run", *given, "--include_path", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
