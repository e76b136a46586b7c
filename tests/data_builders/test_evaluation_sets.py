"""Evaluation sets: the same rows from the released form and from the hub's; other rows and columns are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset as Table
from helpers import DATA, ROOT, SHARED

from coconut.__main__ import BUILDERS, builder
from coconut.tasks import TASKS
from coconut.utils.files import read_json as read
from coconut.utils.files import sha256
from data_builders import gsm8k_aug_nl
from data_builders.evaluation_builder import Dataset, EvaluationBuild, build, released_rows, told
from data_builders.evaluation_sets import EVALUATION_SETS

SUITES = DATA / "suites"
HUB_NAMES = {"train": "train", "valid": "validation", "test": "test"}  # of splits, in files of a folder
MADE_UP = {
    "asdiv": [
        {"body": "Ann has 3 pears and buys 6.", "question": "How many has she?", "answer": "9 (pears)"},
        {"body": "Ann is 4 years old", "question": "Bob is 3. Who is older?", "answer": "Ann"},
        {"body": "A day has 24 hours.", "question": "What is 90 minutes?", "answer": "1 (hour); 30 (minutes)"},
    ],
    "commonsenseqa": [
        {
            "question": "Where is money kept?", "answerKey": "C",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["river", "tree", "bank ", "sky", "shoe"]},
        },
        {
            "question": "What is wet?", "answerKey": "A",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["rain", "sand", "dust", "fire", "salt"]},
        },
    ],
    "strategyqa": [
        {"qid": "1", "term": "Moon", "question": "Is it far?", "answer": True, "facts": "It is far."},
        {"qid": "2", "term": "Sun", "question": "Is it cold?", "answer": False, "facts": "It is hot."},
    ],
}  # fmt: skip


def excerpt(name: str) -> list[dict[str, Any]]:
    """Real rows in their released form; made up ones of sets that could not be had, in the hub's."""
    if name in MADE_UP:
        return MADE_UP[name]
    if name == "math500":
        return read(SUITES / "math500.json")
    return [json.loads(line) for line in (SUITES / f"{name}.jsonl").read_text().splitlines()]


def as_on_the_hub(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A released record with the columns and types that the set has on the hub."""
    if name == "svamp":
        body, question = re.fullmatch(r"(.*)\. (.*)", row["input"], re.DOTALL).groups()  # pyright: ignore
        return {"ID": "", "Body": body, "Question": question, "Equation": "", "Answer": str(row["target"]), "Type": ""}
    if name == "multiarith":
        return {"question": row["input"], "final_ans": str(row["target"])}
    if name == "math500":
        return {"problem": row["problem"], "solution": "", "answer": row["answer"], "subject": "", "level": 1}
    return row


def as_released(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The inverse for the set whose authors' file has another form than the hub's, and was made up here."""
    if name != "commonsenseqa":
        return row
    choices = [dict(zip(("label", "text"), pair, strict=True)) for pair in zip(*row["choices"].values(), strict=True)]
    return {"answerKey": row["answerKey"], "id": "", "question": {"stem": row["question"], "choices": choices}}


def whole(name: str, count: int) -> list[dict[str, Any]]:
    """As many records as the published set has, by repetition."""
    rows = excerpt(name)
    text = next(key for key in ("input", "problem", "body", "question") if key in rows[0])
    return [{**rows[n % len(rows)], text: f"{n}: {rows[n % len(rows)][text]}"} for n in range(count)]


def write_folder(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be read as a data set of the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "set"


@pytest.mark.parametrize(("name", "subset"), [(name, key) for name, e in EVALUATION_SETS.items() for key in e.subsets])
def test_released_file_and_hub_give_the_same_rows(name: str, subset: str, folder: Path, tmp_path: Path) -> None:
    pinned, (default, *_) = EVALUATION_SETS[name].subsets[subset], EVALUATION_SETS[name].subsets
    records = whole(name, pinned.rows)
    file = tmp_path / "released.json"
    file.write_text(json.dumps([as_released(name, row) for row in records]))
    config = EvaluationBuild(str(tmp_path / "a"), dataset=Dataset(name), subset=subset, test=str(file))
    build(config)
    assert config.name == name if subset == default else f"{name}_{subset}"

    cuts = [pinned.rows * n // len(pinned.hub_splits) for n in range(len(pinned.hub_splits) + 1)]
    on_hub = [as_on_the_hub(name, row) for row in records]
    parts = {HUB_NAMES[s]: on_hub[a:b] for s, a, b in zip(pinned.hub_splits, cuts, cuts[1:], strict=False)}
    write_folder(folder, parts)
    build(EvaluationBuild(str(tmp_path / "b"), dataset=Dataset(name), subset=subset, hub=str(folder)))

    rows = read(tmp_path / "a" / f"{config.name}_test.json")
    assert rows == read(tmp_path / "b" / f"{config.name}_test.json")
    assert len(rows) == pinned.rows
    judge = EVALUATION_SETS[name].judge
    assert all(list(row) == ["question", "steps", "answer"] and row["steps"] == [] for row in rows)
    assert all(TASKS[judge].judge(row["answer"], row["answer"]) for row in rows)

    manifests = [read(tmp_path / where / f"{config.name}_manifest.json") for where in "ab"]
    for manifest in manifests:
        assert {key: manifest[key] for key in ("task", "dataset", "subset")} == {
            "task": judge, "dataset": name, "subset": subset,
        }  # fmt: skip
        assert manifest["splits"]["test"]["rows"] == pinned.rows
        assert manifest["splits"]["test"]["sha256"] == sha256(tmp_path / "a" / f"{config.name}_test.json")
        assert list(manifest["splits"]) == ["test"]
    released, hub = (manifest["sources"] for manifest in manifests)
    assert released == {"test": {"file": "released.json", "sha256": sha256(file), "known_as": None}}
    assert (hub["hub"], hub["splits"]) == ("set", list(pinned.hub_splits))
    assert {split: files[0]["sha256"] for split, files in hub["files"].items()} == {
        split: sha256(folder / f"{HUB_NAMES[split]}.jsonl") for split in pinned.hub_splits
    }
    card = (tmp_path / "a" / f"{config.name}_card.md").read_text()
    assert f"coconut data {name} " in card
    assert EVALUATION_SETS[name].beware in card


BOXED = "so we get \\boxed{{{}}}"  # other text than the gold answer, so that its expression is compared
CONVERTED = {
    "gsm_hard": ["-9867630", None, "388147.4117647059"],
    "svamp": ["51", "1", "17"],
    "multiarith": ["39", "8", "2"],
    "asdiv": ["9", "Ann", "1; 30"],
    "commonsenseqa": ["C", "A"],
    "strategyqa": ["yes", "no"],
}


def test_rows_of_the_excerpts(tmp_path: Path) -> None:
    rows = {}
    for name in EVALUATION_SETS:
        (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in excerpt(name)))
        rows[name] = released_rows(EvaluationBuild(dataset=Dataset(name)), str(tmp_path / "lines.jsonl"))
        for row, expected in zip(rows[name], CONVERTED.get(name, []), strict=name in CONVERTED):
            assert expected in (row["answer"], None)
    assert rows["gsm_hard"][1]["answer"].startswith("-")
    assert rows["commonsenseqa"][0]["question"] == "Where is money kept?\nA. river\nB. tree\nC. bank\nD. sky\nE. shoe"
    assert rows["asdiv"][1]["question"] == "Ann is 4 years old. Bob is 3. Who is older?"
    assert rows["svamp"][1]["question"] == excerpt("svamp")[1]["input"]
    golds = [row["answer"] for row in rows["math500"]]
    assert golds == [row["answer"] for row in excerpt("math500")]
    assert [gold for gold in golds if not TASKS["math"].judge(BOXED.format(gold), gold)] == []


def test_parquet_is_read(tmp_path: Path) -> None:
    rows = [as_on_the_hub("commonsenseqa", row) for row in MADE_UP["commonsenseqa"]]
    Table.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = EvaluationBuild(dataset=Dataset("commonsenseqa"))
    read_as = [released_rows(config, str(tmp_path / name)) for name in ("rows.parquet", "rows.json")]
    assert read_as[0] == read_as[1] != []


def test_another_number_of_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    file = str(SUITES / "svamp.jsonl")
    for subset, rows in (("all", "1,000"), ("test300", "300")):
        with pytest.raises(
            ValueError, match=rf"svamp\.jsonl has 3 rows, and the published svamp \({subset}\) has {rows}"
        ):
            build(EvaluationBuild(str(tmp_path), dataset=Dataset("svamp"), subset=subset, test=file))
    (tmp_path / "all.json").write_text(json.dumps(whole("svamp", 1000)))
    with pytest.raises(ValueError, match=r"has 1,000 rows, and .* has 300\. subset=all has 1,000"):
        build(
            EvaluationBuild(str(tmp_path), dataset=Dataset("svamp"), subset="test300", test=str(tmp_path / "all.json"))
        )
    write_folder(folder, {"test": [as_on_the_hub("svamp", row) for row in whole("svamp", 300)]})
    with pytest.raises(ValueError, match="has no train split, only test; svamp is made of train, test"):
        build(EvaluationBuild(str(tmp_path), dataset=Dataset("svamp"), hub=str(folder)))
    assert not list(tmp_path.glob("svamp*"))


@pytest.mark.parametrize(
    ("name", "record", "complaint"),
    [
        ("svamp", {"input": "Q", "answer": 3}, "columns are input answer; wanted are input target, or Body"),
        ("svamp", {"input": "Q", "target": None}, "'target' is None; it must be a number"),
        ("svamp", {"input": "Q", "target": float("nan")}, "'target' is nan"),
        ("svamp", {"input": " ", "target": 3}, "'input' is ' '; it must be text"),
        ("svamp", {"Body": "B", "Question": "Q", "Answer": ""}, "'Answer' is ''"),
        ("multiarith", {"question": "Q", "final_ans": True}, "'final_ans' is True"),
        ("asdiv", {"body": "B.", "question": "Q", "answer": "(apples)"}, "nothing is left of it without its unit"),
        ("commonsenseqa", MADE_UP["commonsenseqa"][0] | {"answerKey": ""}, "'answerKey' is ''"),
        ("commonsenseqa", MADE_UP["commonsenseqa"][0] | {"answerKey": "F"}, "'answerKey' is 'F', and 'choices' is"),
        ("strategyqa", MADE_UP["strategyqa"][0] | {"answer": "yes"}, "'answer' is 'yes'; it must be true or false"),
        ("math500", {"problem": "Q", "answer": None}, "'answer' is None"),
        ("math500", [1], "a JSON object is wanted, and this is list"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(name: str, record: Any, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([excerpt(name)[0], record]))
    with pytest.raises(ValueError, match=rf"bad\.json has 1 bad of 2 rows(?s:.*)row 2: .*{re.escape(complaint)}"):
        build(EvaluationBuild(str(tmp_path), dataset=Dataset(name), test=str(tmp_path / "bad.json")))


def test_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.json").write_text("<!doctype html><html></html>")
    with pytest.raises(
        ValueError, match=r"looks like a web page\. Wanted is a JSON list, or a JSON object on each line"
    ):
        build(EvaluationBuild(str(tmp_path), test=str(tmp_path / "page.json")))
    (tmp_path / "prose.json").write_text("some prose\n")
    with pytest.raises(ValueError, match="row 1: a JSON object is wanted, and this is str"):
        build(EvaluationBuild(str(tmp_path), test=str(tmp_path / "prose.json")))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"train": "a"}, "train=a is given, but svamp is a set to test on"),
        ({"num_valid": 5}, "num_valid=5 is given"), ({"source": "a"}, "source=a is given"),
        ({"subset": "300"}, r"no subset=300. The subsets are: all \(1,000 rows\), test300 \(300 rows\)"),
        ({"hub": "a", "test": "b"}, "hub=a and test=b are given"),
        ({"hub_config": "a", "test": "b"}, "hub_config=a and test=b are given"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        EvaluationBuild(**keys)


def test_every_set_is_a_command_and_in_the_docs() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    for name, entry in EVALUATION_SETS.items():
        assert builder(name) == ("data_builders.evaluation_builder", [f"dataset={name}"])
        assert name in BUILDERS
        assert entry.judge in TASKS
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        assert all(f"{subset.rows:,}" in row for subset in entry.subsets.values())
        assert entry.hub in row
        assert entry.licence.split(":")[0].split(";")[0] in row
        assert entry.beware.split()[0] in " ".join(told(name, "facts").split())
    for task in TASKS:
        assert re.search(rf"^\| .*`{task}`", page, re.MULTILINE), f"docs/data.md has no row of the judge {task}"


KNOWN = {file.name: file for file in sorted((SHARED / "suites").glob("*.json*"))}


@pytest.mark.slow
@pytest.mark.skipif(not KNOWN, reason="the released files are not at hand")
@pytest.mark.parametrize("name", ["gsm_hard", "svamp", "multiarith", "math500"])
def test_every_gold_of_the_released_files_is_judged_right(name: str, tmp_path: Path) -> None:
    file = KNOWN[f"{name}.json" if name == "math500" else f"{name}.jsonl"]
    build(EvaluationBuild(str(tmp_path), dataset=Dataset(name), test=str(file)))
    entry = EVALUATION_SETS[name]
    assert read(tmp_path / f"{name}_manifest.json")["sources"]["test"]["known_as"] in entry.released
    task = TASKS[entry.judge]
    golds = [row["answer"] for row in read(tmp_path / f"{name}_test.json")]
    forms = ["{}", "The answer is {}."] if name != "math500" else ["{}", BOXED]
    assert [gold for gold in golds for form in forms if not task.judge(form.format(gold), gold)] == []
    if name != "math500":
        targets = [json.loads(line)["target"] for line in file.read_text().splitlines()]
        assert [float(gold) for gold in golds] == targets


# --- GSM8K-Aug-NL -----------------------------------------------------------------------------------


def test_gsm8k_aug_nl(folder: Path, tmp_path: Path) -> None:
    cot = "Ann has 3 + 4 = 7 pears. They cost $2.50 each, so $17.50."
    records = [{"question": f"Q{n}", "cot": cot, "answer": "17.5"} for n in range(6)]
    write_folder(folder, {"train": records})
    sources: dict[str, dict[str, Any]] = {"a": {"hub": str(folder)}, "b": {"train": str(folder / "train.jsonl")}}
    for where, keys in sources.items():
        gsm8k_aug_nl.build(gsm8k_aug_nl.Gsm8kAugNlBuild(str(tmp_path / where), **keys))
        assert read(tmp_path / where / "gsm8k_aug_nl_manifest.json")["task"] == "gsm8k"
        assert "    coconut data gsm8k_aug_nl " in (tmp_path / where / "gsm8k_aug_nl_card.md").read_text()
    rows = read(tmp_path / "a" / "gsm8k_aug_nl_train.json")
    assert rows == read(tmp_path / "b" / "gsm8k_aug_nl_train.json")
    steps = ["Ann has 3 + 4 = 7 pears.", "They cost $2.50 each, so $17.50."]
    assert rows[0] == {"question": "Q0", "steps": steps, "answer": "17.5"}
    gsm8k_aug_nl.build(gsm8k_aug_nl.Gsm8kAugNlBuild(str(tmp_path / "c"), hub=str(folder), num_valid=2))
    assert [len(read(tmp_path / "c" / f"gsm8k_aug_nl_{split}.json")) for split in ("train", "valid")] == [4, 2]
    assert gsm8k_aug_nl.Gsm8kAugNlBuild().hub_name == gsm8k_aug_nl.HUB
