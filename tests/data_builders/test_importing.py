"""Data of one's own: every format gives the same rows, and what cannot be read is named."""

from __future__ import annotations

import csv
import gzip
import json
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import DATA
from helpers.models import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.config import BadRows, ColumnNames, Division, RowRule, StepRule
from coconut.data.examples import read_examples
from coconut.methods import PromptFormat
from coconut.utils.files import read_json as read
from coconut.utils.files import sha256
from data_builders import importing
from data_builders.columns import rows_of_table
from data_builders.gsm8k import Gsm8kBuild, Steps, released_rows
from data_builders.gsm8k import build as build_gsm8k
from data_builders.hub import load_hub
from data_builders.importing import HubSplits, ImportBuild, build
from data_builders.tables import Table, read_table

NAMES = ColumnNames("problem", "result", "rationale")
RECORDS = [
    {"problem": "Tom, aged 7, has 3 apples and buys 4?", "rationale": "3 + 4 = 7\n\nIt is 7.", "result": "007"},
    {"problem": 'He said: "two\nlines"', "rationale": "", "result": "1.0"},
    {"problem": "NA", "rationale": "one; two", "result": "-3"},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records in the format that the file's name says, by the format's own library."""
    ending = path.name.partition(".")[2].removesuffix(".gz")
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if ending in ("csv", "tsv"):
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
        else:
            file.write(json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records)))
    return path


def rows_of(path: Path, rule: RowRule) -> list[dict[str, Any]]:
    return rows_of_table(read_table(path), rule)[0]


def expected(record: dict[str, Any], separator: str) -> dict[str, Any]:
    """The row of a record, by hand."""
    steps = [step.strip() for step in record["rationale"].split(separator)]
    return {
        "question": record["problem"].strip(), "steps": [step for step in steps if step],
        "answer": record["result"].strip(),
    }  # fmt: skip


@pytest.mark.parametrize(
    "ending", ["json", "jsonl", "csv", "tsv", "parquet", "json.gz", "jsonl.gz", "csv.gz", "tsv.gz"]
)
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{ending}", RECORDS)
    for separator in ("\n", ";"):
        rule = RowRule(columns=NAMES, steps=StepRule(separator=separator))
        assert rows_of(path, rule) == [expected(record, separator) for record in RECORDS]


# a blank or "\r" would be taken off, or turned by a reader of text into "\n"
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1).filter(str.strip)
lines = texts.filter(lambda text: "\n" not in text)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(lines, max_size=3), lines), min_size=1, max_size=4))
def test_any_rows_are_the_same_in_every_format(drawn: list[tuple[str, list[str], str]]) -> None:
    records = [{"problem": q, "rationale": "\n".join(steps), "result": a} for q, steps, a in drawn]
    rule = RowRule(columns=NAMES, steps=StepRule(separator="\n"))
    with tempfile.TemporaryDirectory() as folder:
        found = [rows_of(write(Path(folder, f"a.{ending}"), records), rule) for ending in ("csv", "jsonl", "parquet")]
    assert found[0] == found[1] == found[2] == [expected(record, "\n") for record in records]


@pytest.mark.parametrize(
    ("rule", "chain", "steps"),
    [
        ({}, "a\r\nb\n\n c ", ["a", "b", "c"]),
        ({"separator": " -> "}, "a -> b -> ", ["a", "b"]),
        ({"pattern": r"\d+[.)]\s"}, "1. first 2) second", ["first", "second"]),
        ({"pattern": r"(,)|(;)"}, "a,b;c", ["a", "b", "c"]),
        ({"into": Division.sentences}, "It is 2.50. Twice is 5! So?\nA", ["It is 2.50.", "Twice is 5!", "So?", "A"]),
        ({}, ["a\nb", " ", None, "c"], ["a\nb", "c"]),
        ({"into": Division.lines}, ["a\nb", "c"], ["a", "b", "c"]),
        ({}, None, []), ({}, [], []), ({}, float("nan"), []),
    ],
)  # fmt: skip
def test_steps_come_from_lists_and_texts(rule: dict[str, Any], chain: Any, steps: list[str]) -> None:
    table = Table("t", [("row 1", {"question": "Q", "answer": 5, "steps": chain})])
    assert rows_of_table(table, RowRule(steps=StepRule(**rule)))[0] == [
        {"question": "Q", "steps": steps, "answer": "5"}
    ]


def test_a_mark_divides_chain_and_answer() -> None:
    """GSM8K's own file gives what its builder makes of it, but for the equations and the commas."""
    path = DATA / "gsm8k_test.jsonl"
    rows = rows_of(path, RowRule(steps=StepRule(mark="####")))
    for row, record, other in zip(
        rows, map(json.loads, path.read_text().splitlines()), released_rows(str(path), Steps.sentences), strict=True
    ):
        chain, answer = record["answer"].split("\n#### ")
        assert row == {"question": record["question"], "steps": chain.split("\n"), "answer": answer}
        assert [re.sub("<<.*?>>", "", step).strip() for step in row["steps"]] == other["steps"]
    record = {"question": "Q", "why": "a\nb", "answer": "It is #### 5"}
    both = RowRule(columns=ColumnNames(steps="why"), steps=StepRule(mark="####"))
    assert rows_of_table(Table("t", [("row 1", record)]), both)[0][0]["steps"] == ["a", "b"]


def test_dots_lead_into_nested_columns(tmp_path: Path) -> None:
    record = {"a.b": "Q", "answers": {"text": ["5", "five"], "start": [3]}, "chain": [{"step": "x"}, {"step": "y"}],
              "meta": {"level": 2, "who": None}}  # fmt: skip
    rule = RowRule(columns=ColumnNames("a.b", "answers.text.0", "chain.step"), keep=["meta.level", "answers"])
    row = {"question": "Q", "steps": ["x", "y"], "answer": "5", "meta.level": 2, "answers": record["answers"]}
    for ending in ("jsonl", "parquet"):
        assert rows_of(write(tmp_path / f"a.{ending}", [record]), rule) == [row]


@pytest.mark.parametrize(
    ("value", "text"), [(5, "5"), (2.5, "2.5"), (5.0, "5.0"), (True, "True"), (10**30, str(10**30)), (" x ", "x")]
)
def test_numbers_and_truth_values_are_answers(value: Any, text: str) -> None:
    assert rows_of_table(Table("t", [("row 1", {"question": "Q", "answer": value})]), RowRule())[0][0]["answer"] == text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": None}, "'answer' is empty"), ({"answer": " "}, "'answer' is empty"),
        ({"question": 5}, r"'question' is 5 \(int\); it must be a text\."),
        ({"answer": ["a", "b"]}, r"'answer' is a list of 2 values; .* or a number\. answer\.0 takes the first"),
        ({"answer": {"a": 1}}, r"'answer' is a set of columns \(a\)"),
        ({"answer": "a\nb"}, "the answer must be one line"),
        ({"steps": [1, 2]}, r"'steps' is a list with 1 \(int\) in it"),
        ({"steps": {"a": "b"}}, r"'steps' is a set of columns \(a\); steps must be a text, or a list of texts"),
    ],
)  # fmt: skip
def test_bad_values_are_named(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    good = {"question": "Q", "answer": "5", "steps": ["x"]}
    path = write(tmp_path / "a.jsonl", [good, good | change, good])
    with pytest.raises(ValueError, match=rf"a\.jsonl has 1 bad of 3 rows.* bad_rows=skip:\n  line 2: {complaint}"):
        rows_of(path, RowRule())
    rows, report = rows_of_table(read_table(path), RowRule(bad_rows=BadRows.skip))
    assert (len(rows), report.rows) == (2, 3)
    assert len(report.skipped) == 1
    assert report.skipped[0].startswith("line 2: ")


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": "Q", "meta": {"x": 1}}, {"problem": "Q", "result": 2}])
    there = r"Its columns are problem, meta\.x, result\."
    for key, rule in [
        ("columns.question", RowRule()),
        ("columns.answer", RowRule(columns=ColumnNames("problem"))),
        ("columns.steps", RowRule(columns=ColumnNames("problem", "result", "why"))),
        ("keep", RowRule(columns=ColumnNames("problem", "result"), keep=["why"])),
    ]:
        with pytest.raises(ValueError, match=rf"a\.jsonl has no column '\w+'\. {there} .*with {key}="):
            rows_of(path, rule)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", b"question,answer\nQ,1\nQ\nQ,1,2\n",
         r"has 2 bad of 3 rows(?s:.*)line 3: it has 1 fields(?s:.*) line 4:"),
        ("a.csv", b'question,answer\nQ,1\n"Q,1\nQ,2\n', r"a\.csv breaks in the row that begins in line 3"),
        ("a.csv", b"answer,answer\n1,2\n", "several columns of the name 'answer'"),
        ("a.csv", b"question,answer\n", "holds no row"),
        ("a.csv", b"", "an empty file"), ("a.json", b"[]", "holds no row"),
        ("a.csv", b"a\0b", "a binary file"), ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a web page"), ("a.parquet", b"PAR1 broken", "a broken Parquet file"),
        ("a.csv.gz", b"\x1f\x8bbroken", "a broken gzip file"), ("a.txt", b"some text", "none of the known forms"),
        ("a.json", b"[1, 2", "a JSON list that breaks at line 1"),
        ("a.jsonl", b'{"question": "Q", "answer": 1}\n{"question"\n', "1 bad of 2 rows(?s:.*)line 2: not JSON"),
        ("a.csv", "question,answer\ncafé,1\n".encode("latin-1"), "not UTF-8 text .*line 2 holds 0xE9"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        rows_of(tmp_path / name, RowRule())


def test_a_semicolon_separates_columns_where_there_is_no_comma(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffquestion;answer\n\nQ, or not;1,5\n", encoding="utf-8")
    assert rows_of(tmp_path / "a.csv", RowRule()) == [{"question": "Q, or not", "steps": [], "answer": "1,5"}]


def test_import_writes_a_set_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"problem": f"Q{n}?", "rationale": "a;b", "result": n, "level": n % 2} for n in range(20)]
    source, out = write(tmp_path / "my.csv", records), tmp_path / "out"
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = ImportBuild(
        str(out), source=str(source), columns=NAMES, steps=StepRule(separator=";"), keep=["level"], num_valid=3,
        num_test=2, preview=2, format=PromptFormat("Q: {}\t", "{}\n", "A {}"), tokenizer=str(tmp_path / "tokenizer"),
        task="gsm8k",
    )  # fmt: skip
    build(config)
    rows = {split: read(out / f"own_{split}.json") for split in ("train", "valid", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 15, "valid": 3, "test": 2}
    made = sorted((row for found in rows.values() for row in found), key=lambda row: int(row["answer"]))
    assert made == [
        {"question": f"Q{n}?", "steps": ["a", "b"], "answer": str(n), "level": str(n % 2)} for n in range(20)
    ]
    first = read_examples(out / "own_train.json")[0]
    said = capsys.readouterr()
    assert f"    question  'Q: {first.question}\\t'\n" in said.out
    assert f"    answer    'A {first.answer}'\n" in said.out
    tokens = re.search(r"step 1 +'a\\n'\n +(\d+) tokens (.*)\n", said.out)
    assert tokens
    assert int(tokens[1]) == len(tokens[2].split()) == 2, "a byte a token"
    assert said.out.count("  row ") == 2
    assert "data=own data.task=gsm8k data.prefix=" in said.out
    manifest = read(out / "own_manifest.json")
    assert manifest["sources"] == {"source": {"file": "my.csv", "sha256": sha256(source)}}
    assert manifest["rule"] == {
        "columns": {"question": "problem", "answer": "result", "steps": "rationale"}, "steps": {"separator": ";"},
        "keep": ["level"],
    }  # fmt: skip
    card = (out / "own_card.md").read_text()
    assert "columns.question=problem" in card
    assert "'steps.separator=;' 'keep=[level]'" in card
    assert "- `level`: the column level of the source" in card


def test_skipped_rows_and_undivided_chains_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", [*RECORDS, {"problem": "", "rationale": "x", "result": "1"}])
    rule: dict[str, Any] = {"columns": NAMES, "steps": StepRule(separator="|"), "bad_rows": BadRows.skip}
    build(ImportBuild(str(tmp_path), train=str(path), preview=0, **rule))
    said = capsys.readouterr()
    assert "1 of 4 rows are skipped, the first: line 8: 'problem' is empty." in said.err
    assert "the separator '|' occurs in none of 2 chains, so each is one step" in said.err
    assert "as a model reads" not in said.out
    read_of = read(tmp_path / "own_manifest.json")["read"]["a.csv"]
    assert read_of == {"rows": 4, "skipped_rows": 1, "skipped": ["line 8: 'problem' is empty."]}
    with pytest.raises(ValueError, match="the task prontoqa would not judge its answer right: '007'"):
        build(ImportBuild(str(tmp_path), train=str(path), columns=NAMES, task="prontoqa"))


def test_a_folder_is_read_by_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    records = [{"question": f"Q{n}", "answer": f"0{n}"} for n in range(30)]
    write(folder / "train-00000-of-00002.csv", records[:10])
    write(folder / "train-00001-of-00002.csv", records[10:25])
    write(folder / "validation.jsonl", records[25:])
    build(ImportBuild(str(tmp_path), source=str(tmp_path / "set"), preview=0))
    rows = {split: read(tmp_path / f"own_{split}.json") for split in ("train", "valid", "test")}
    assert [row["answer"] for row in rows["valid"]] == [record["answer"] for record in records[25:]]
    assert (len(rows["train"]), len(rows["test"])) == (23, 2), "a split that is missing comes out of the training rows"
    assert {row["answer"] for row in rows["train"] + rows["test"]} == {record["answer"] for record in records[:25]}
    with pytest.raises(ValueError, match="has 5 valid rows of its own"):
        build(ImportBuild(str(tmp_path / "b"), source=str(tmp_path / "set"), num_valid=3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no file of JSON.*train=FILE"):
        build(ImportBuild(str(tmp_path / "b"), source=str(tmp_path / "empty")))


def test_class_labels_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(question=datasets.Value("string"), answer=datasets.ClassLabel(names=["no", "yes"]))
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.parquet"
    datasets.Dataset.from_dict({"question": ["Q", "R"], "answer": [1, 0]}, features=features).to_parquet(path)
    assert [row["answer"] for row in rows_of(path, RowRule())] == ["yes", "no"]
    loaded, _ = load_hub(str(tmp_path / "set"), splits=HubSplits(valid="train").names())
    assert {split: [record["answer"] for record in records] for split, records in loaded.items()} == {
        "valid": ["yes", "no"]
    }


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({}, "No data are named. Give source=FILE"),
        ({"source": "a.csv", "task": "maths"}, "There is no task maths"),
        ({"source": "a.csv", "hub_config": "main"}, "hub_config=main is for source=OWNER/NAME"),
        ({"source": "a.csv", "keep": ["answer"]}, "keep names answer"),
        ({"source": "a.csv", "preview": -1}, "preview is -1"),
        ({"source": "a.csv", "preview": 0, "tokenizer": "x"}, "tokenizer=x is for compare=FILE"),
        ({"source": "a.csv", "format": PromptFormat(chat=True)}, "format.chat=true needs tokenizer"),
    ],
)
def test_import_refuses_contradicting_keys(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ImportBuild(**keys)


def test_an_unknown_source_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The file 'my\.csv' does not exist in .*Name a file of JSON"):
        build(ImportBuild(source="my.csv"))
    with pytest.raises(ValueError, match=r"'owner/set' on the Hugging Face hub .*source=FOLDER.*train=FILE"):
        build(ImportBuild(source="owner/set"))
    assert not list(tmp_path.iterdir())


def test_the_command_is_the_module(tmp_path: Path) -> None:
    assert import_module("data_builders.import").main is importing.main
    source = str(DATA / "gsm8k_test.jsonl")
    counts: dict[str, Any] = {"source": source, "num_valid": 2, "num_test": 1, "seed": 4}
    build(ImportBuild(str(tmp_path), steps=StepRule(mark="####"), preview=0, **counts))
    build_gsm8k(Gsm8kBuild(str(tmp_path), **counts))
    for split in ("train", "valid", "test"):
        ours, theirs = (read(tmp_path / f"{name}_{split}.json") for name in ("own", "gsm8k"))
        assert [row["question"] for row in ours] == [row["question"] for row in theirs], "divided as other builders do"
