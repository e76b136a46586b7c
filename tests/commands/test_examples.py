"""Each example and each block of Python in the docs runs; the plain examples compute what the library computes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.models import WORDS, gradients
from helpers.processes import Forked
from helpers.runs import graph_files, small_run

from coconut import Curriculum, LatentLM, plan
from coconut.data.batching import collate, count_for_term
from coconut.data.sequences import layout
from coconut.data.tokenization import SpecialIds, build_word_tokenizer
from coconut.generation.generate import pad_rows
from coconut.hub.folder import write_folder
from coconut.hub.model_card import card
from coconut.methods import Reasoning, Stage
from coconut.objectives.training_model import TrainingModel
from coconut.runs.checkpoints import Checkpoints
from coconut.training.trainer import run as train

EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = plan("coconut", Curriculum(max_stage=2)).stages


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


plain = module("coconut_from_scratch")
codi = module("codi_from_scratch")


def special_of(example: Any) -> SpecialIds:
    """Of an example that has no <pause>."""
    return SpecialIds(example.BOT, example.EOT, example.LATENT, example.LATENT, example.EOS, example.PAD)


SPECIAL = special_of(plain)


def ours(model: Any) -> LatentLM:
    """The library's model with the same weights."""
    return LatentLM(copy.deepcopy(model), build_word_tokenizer(WORDS), SPECIAL)


def rows(count: int) -> list[tuple[str, str]]:
    random.seed(0)
    return [plain.draw() for _ in range(count)]


def segments(question: str, chain: str) -> list[list[int]]:
    """The parts of an example as the library takes them: question, each step, answer."""
    *steps, answer = map(plain.encode, chain)
    return [plain.encode(question), *steps, [*answer, plain.EOS]]


def output(*arguments: str, folder: Path) -> str:
    """What an example prints, in a process of its own."""
    name, *rest = arguments
    code = f"import runpy; runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    with Forked(code, *rest, cwd=folder) as process:
        status = process.wait(300)
        assert status == 0, process.printed
        return process.output


# --- Coconut from scratch ---------------------------------------------------------------------------


def test_a_chain_is_what_look_ups_give() -> None:
    for question, chain in rows(50):
        table, at = question.split("?")
        for letter in chain:
            at = table[plain.LETTERS.index(at)]
            assert letter == at
        assert len(set(chain)) == plain.HOPS


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_from_scratch_equals_the_library(stage: int) -> None:
    torch.manual_seed(0)
    model = plain.new_model().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    lm = ours(model)
    examples = rows(6)
    ids_BT = plain.padded([plain.sequence(question, chain, stage) for question, chain in examples])
    assert (ids_BT == plain.PAD).any(), "rows differ in length"

    loss = plain.loss(model, ids_BT)
    loss.backward()
    batch = collate([layout(segments(*example), STAGES[stage].form, SPECIAL) for example in examples], SPECIAL)
    out = lm(batch.input_ids, batch.attention_mask, labels=batch.labels)
    assert out.loss is not None
    out.loss.backward()

    given = [row[row != plain.PAD].tolist() for row in ids_BT]
    assert given == [row[row != plain.PAD].tolist() for row in batch.input_ids]
    torch.testing.assert_close(loss, out.loss, rtol=1e-9, atol=0)
    found = {f"base.{name}": p.grad for name, p in model.named_parameters()}
    assert all(grad.norm() > 0 for grad in found.values())
    torch.testing.assert_close(found, gradients(lm), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("thoughts", [0, 2])
def test_from_scratch_answers_as_the_library(thoughts: int) -> None:
    torch.manual_seed(0)
    model = plain.new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sequences = plain.padded([plain.sequence(question, chain, thoughts) for question, chain in rows(32)])
    for _ in range(40):  # long enough that no marker is likeliest; the library never says one
        optimizer.zero_grad()
        plain.loss(model, sequences).backward()
        optimizer.step()
    questions = [question for question, _ in rows(40)]
    written = plain.answers(model, questions, thoughts)
    assert len(set(written)) > 1

    limit = plain.HOPS - thoughts + 1
    ids, mask = pad_rows([plain.encode(question) for question in questions], plain.PAD)
    made = ours(model).generate(ids, mask, num_thoughts=thoughts, max_new_tokens=limit)
    tokens = [row[:length] for row, length in zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)]
    assert written == ["".join(plain.VOCABULARY[token] for token in row) for row in tokens]


@pytest.mark.slow
def test_from_scratch_runs(tmp_path: Path) -> None:
    said = output("coconut_from_scratch.py", "--updates", "3", folder=tmp_path).splitlines()
    assert [line.split(":")[0] for line in said] == ["stage 0", "stage 1", "stage 2"]
    assert "of 500 unseen questions" in said[-1]


# --- CODI from scratch ------------------------------------------------------------------------------


def trained_by_codi(model: Any) -> tuple[TrainingModel, Stage]:
    """The library's model with the same weights, the terms of its loss, and the sequences that they are of."""
    its = plan("codi", Curriculum(num_thoughts=codi.THOUGHTS))
    special = special_of(codi)
    lm = LatentLM(copy.deepcopy(model.lm), build_word_tokenizer(WORDS), special, Reasoning.at(its, its.stages[0]))
    lm.feedback.projector = copy.deepcopy(model.projector)
    return TrainingModel(lm, its), its.stages[0]


def test_codi_from_scratch_equals_the_library() -> None:
    torch.manual_seed(0)
    model = codi.Model().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    module, stage = trained_by_codi(model)
    examples = rows(6)
    assert len({len(question) for question, _ in examples}) > 1, "rows differ in length"

    found = codi.terms(model, examples)
    torch.stack(found).sum().backward()
    parts = [[codi.encode(question), *map(codi.encode, chain), [*codi.encode(f"={chain[-1]}"), codi.EOS]]
             for question, chain in examples]  # fmt: skip
    layouts = [layout(part, form, module.lm.special, num_answer_mark=1) for form in stage.together for part in parts]
    batch = collate(layouts, module.lm.special, num_forms=2)
    counts = [count_for_term(term, [form.name for form in stage.together].index(term.of), batch)
              for term in module.terms]  # fmt: skip
    expected = module(batch) / torch.tensor(counts)
    expected.sum().backward()

    assert [term.name for term in module.terms] == ["tokens", "teacher", "states"]
    assert [item.ids.tolist() for item in layouts] == [
        sequence(*example) for sequence in (codi.student, codi.teacher) for example in examples
    ]
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-9, atol=0)
    ours = {name.replace("lm.base.", "lm.").replace("lm.feedback.", ""): p.grad
            for name, p in module.named_parameters()}  # fmt: skip
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad.norm() > 0 for grad in theirs.values())
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-11)


def test_codi_from_scratch_answers_as_the_library() -> None:
    torch.manual_seed(0)
    model = codi.Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    examples = rows(32)
    for _ in range(40):  # long enough that no marker is likeliest; the library never says one
        optimizer.zero_grad()
        torch.stack(codi.terms(model, examples)).sum().backward()
        optimizer.step()
    questions = [question for question, _ in rows(40)]
    written = codi.write(model, [codi.prompt(question) for question in questions], 3)
    assert len(set(written)) > 1

    ids, mask = pad_rows([codi.encode(question) for question in questions], codi.PAD)
    made = trained_by_codi(model)[0].lm.generate(ids, mask, num_thoughts=codi.THOUGHTS, max_new_tokens=3)
    tokens = [row[:length] for row, length in zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)]
    assert written == ["".join(codi.VOCABULARY[token] for token in row) for row in tokens]


@pytest.mark.slow
def test_codi_from_scratch_runs(tmp_path: Path) -> None:
    said = output("codi_from_scratch.py", "--updates", "5", folder=tmp_path).splitlines()
    assert [line.split(":")[0] for line in said] == [f"update {k}" for k in range(1, 6)]
    assert "right of 500 unseen" in said[-1]


# --- your own data ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_data_is_learned(tmp_path: Path) -> None:
    said = output("own_data.py", folder=tmp_path).splitlines()
    for row in module("own_data").ROWS:
        line = next(line for line in said if line.startswith(row["question"]))
        assert f"2 thoughts, then: ### {row['answer']}  (right: {row['answer']})" in line
    assert list(tmp_path.iterdir()) == [], "what it makes lies in a temporary folder"


# --- probing a thought ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    assert train(small_run(folder / "run", graph_files(folder, train=32, valid=8, test=8))) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def probed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return output("probe_a_thought.py", str(small), folder=tmp_path_factory.mktemp("elsewhere")).splitlines()


def test_own_thoughts_change_nothing(probed: list[str]) -> None:
    answers = [line.removeprefix("  answer: ") for line in probed if line.startswith("  answer: ")]
    assert len(answers) == 2
    assert sum("is close to:" in line for line in probed) == 4, "two thoughts of two questions"
    replaced = [line.split(": ", 1) for line in probed if line.startswith("  with ")]
    assert len(replaced) == 4
    assert replaced[0] == ["  with its own thoughts", answers[0]]


def test_the_notebook_is_the_script(
    small: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((EXAMPLES / "probe_a_thought.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "saved without outputs"
    monkeypatch.setenv("COCONUT_RUN", str(small))
    names: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert capsys.readouterr().out.splitlines() == probed


# --- the docs ---------------------------------------------------------------------------------------


def blocks(language: str) -> list[Any]:
    """Those of README and docs in this language, by page and number."""
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, block in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        )
    ]


@pytest.fixture(scope="module")
def desk(small: Path) -> Path:
    """A folder that holds what the blocks name: a run, data, a saved model."""
    folder = small.parent
    (folder / "runs").mkdir()
    for name in ("quickstart", "warm"):
        (folder / "runs" / name).symlink_to(small)
    lm = LatentLM.from_pretrained(Checkpoints(small).find("best"))
    write_folder(lm, folder / "FOLDER", card(lm))
    return folder


@pytest.mark.parametrize("block", blocks("python"))
def test_python_in_the_docs_runs(block: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    exec(block, {})
