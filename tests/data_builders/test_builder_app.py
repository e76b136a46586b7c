"""Data made from scratch is what it claims to be; released files are read, and others refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers import DATA, ROOT, SHARED
from helpers.models import byte_level_tokenizer
from helpers.processes import python

from coconut.utils.files import read_json as read
from coconut.utils.files import sha256
from data_builders import graph_measures, gsm8k, pointers, prontoqa, prosqa
from data_builders.dataset_writer import SPLITS, WrittenRow, divide, shared_questions
from data_builders.prosqa import ProsqaBuild
from data_builders.statistics import Line, compact, compare, summary

GRAPHS: dict[str, Any] = {"preset": prosqa.Preset.graphs, "name": "graphs"}


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"num_valid": -1}, "num_valid is -1"), ({"num_workers": 0}, "num_workers is 0"),
        ({"compare_rows": 0}, "compare_rows is 0"), ({"name": "a/b"}, "name is 'a/b'"),
        ({"source": "a", "train": "b"}, "source=a and train=b"),
        ({"source": "a", "test": "b", "num_test": 3}, "num_test=3 and test=b"),
    ],
)  # fmt: skip
def test_builder_refuses_contradicting_keys(keys: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ProsqaBuild(**keys)


def test_rows_with_the_same_question_stay_in_one_split() -> None:
    """Sizes are kept, so that of at most the two questions at the ends of splits some rows lie on either side."""
    rows = [{"question": str(number % 40), "number": number} for number in range(120)]
    splits = divide(rows, {"valid": 30, "test": 31}, seed=3)
    assert [len(splits[split]) for split in SPLITS] == [59, 30, 31]
    assert sorted(row["number"] for part in splits.values() for row in part) == list(range(120))
    found = [{row["question"] for row in part} for part in splits.values()]
    shared = [one & other for k, one in enumerate(found) for other in found[k + 1 :]]
    assert sum(map(len, shared)) <= 2
    single = [{"question": str(number)} for number in range(50)]
    assert divide(single, {"valid": 5, "test": 5}, seed=0)["train"] != single[:40], "shuffled"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "build"),
    [
        (ProsqaBuild(seed=5, **GRAPHS), prosqa.build), (ProsqaBuild(seed=5, name="prosqa"), prosqa.build),
        (prontoqa.ProntoqaBuild(seed=5), prontoqa.build), (pointers.PointersBuild(seed=5), pointers.build),
    ],
    ids=["graphs", "prosqa", "prontoqa", "pointers"],
)  # fmt: skip
def test_build_does_not_depend_on_the_number_of_workers(config: Any, build: Any, tmp_path: Path) -> None:
    counts = {"num_train": 300, "num_valid": 260, "num_test": 10}
    for workers in (1, 2):
        build(replace(config, out_dir=str(tmp_path / str(workers)), num_workers=workers, **counts))
    one, two = (digests(tmp_path / folder) for folder in "12")
    assert len(one) == 5
    assert one == two
    card = (tmp_path / "1" / f"{config.name}_card.md").read_text()
    assert f"Made with\n\n    coconut data {'prosqa' if config.name == 'graphs' else config.name} " in card
    assert "seed=5" in card
    manifest = json.loads((tmp_path / "1" / f"{config.name}_manifest.json").read_text())
    assert (manifest["seed"], manifest["shared_questions"]) == (5, {})
    presets = {"graphs": "graphs", "pointers": None}
    assert manifest.get("preset") == presets.get(config.name, "released")
    assert manifest["dials"]["hops_from"] == {"graphs": 2, "prosqa": 3, "prontoqa": 5, "pointers": 1}[config.name]
    for split, count in {"train": 300, "valid": 260, "test": 10}.items():
        path = tmp_path / "1" / f"{config.name}_{split}.json"
        assert manifest["splits"][split] == {"file": path.name, "rows": count, "sha256": sha256(path)}
        assert len(read(path)) == count
        assert len({row["question"] for row in read(path)}) == count
        assert len(path.read_text().splitlines()) == count + 2, "one row a line"
        assert manifest["statistics"][split]
        assert path.name in card


def test_split_does_not_depend_on_the_size_of_others(tmp_path: Path) -> None:
    for count in (5, 9):
        prosqa.build(ProsqaBuild(str(tmp_path / str(count)), **GRAPHS, num_train=count, num_valid=count, num_test=4))
    small, large = ({split: read(tmp_path / n / f"graphs_{split}.json") for split in SPLITS} for n in "59")
    assert small["test"] == large["test"]
    assert small["train"] == large["train"][:5]
    assert small["valid"] == large["valid"][:5]


@pytest.mark.slow
def test_splits_share_no_question_across_seeds(tmp_path: Path) -> None:
    """There are few graphs of this size, so that most are drawn several times."""
    splits = {}
    for seed in (0, 1):
        config = ProsqaBuild(str(tmp_path / str(seed)), **GRAPHS, nodes=9, seed=seed)
        prosqa.build(replace(config, num_train=400, num_valid=60, num_test=60))
        splits |= {f"{split} {seed}": read(tmp_path / str(seed) / f"graphs_{split}.json") for split in SPLITS}
    made = {
        split: [WrittenRow.of(row, graph_measures.key_of(row), {}) for row in rows] for split, rows in splits.items()
    }
    shared = shared_questions(made, graph_measures.alike)
    assert set(shared) <= {f"{split} 0 and {split} 1" for split in SPLITS}
    assert shared["train 0 and train 1"] > 100, "the check does find what is alike"
    for a, b in [("train 0", "test 1"), ("valid 0", "test 0"), ("valid 1", "train 0")]:
        by_degrees: dict[Any, list[dict]] = {}
        for row in splits[a]:
            by_degrees.setdefault(degrees(row), []).append(row)
        pairs = [(row, other) for row in splits[b] for other in by_degrees.get(degrees(row), [])]
        assert pairs, "there are rows that have to be told apart"
        assert not any(graph_measures.alike(*pair) for pair in pairs)


def degrees(row: dict) -> Any:
    """A key that is equal for isomorphic graphs, and for many others."""
    ends = [[edge[end] for edge in row["edges"]] for end in (0, 1)]
    return tuple(sorted((ends[0].count(n), ends[1].count(n)) for n in range(len(row["idx_to_symbol"]))))


def test_build_checks_its_folder_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    few: dict[str, Any] = {"num_train": 4, "num_valid": 0, "num_test": 0}
    with pytest.raises(OSError, match=r"file is no folder, so out_dir=.*file/data cannot be made"):
        prosqa.build(ProsqaBuild(str(tmp_path / "file" / "data"), **few))
    with pytest.raises(ValueError, match="There is not a single row to write"):
        prosqa.build(replace(ProsqaBuild(str(tmp_path), **few), num_train=0))
    prosqa.build(ProsqaBuild(str(tmp_path), name="mine", **few))
    with pytest.raises(ValueError, match=r"mine_manifest\.json is of a prosqa set.*another name than name=mine"):
        prontoqa.build(prontoqa.ProntoqaBuild(str(tmp_path), name="mine", **few))


def test_build_removes_only_abandoned_temporary_folders(tmp_path: Path) -> None:
    for name, age in {".graphs.old.part": 100_000, ".graphs.new.part": 10}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    prosqa.build(ProsqaBuild(str(tmp_path), **GRAPHS, num_train=4, num_valid=0, num_test=0))
    assert [path.name for path in tmp_path.glob(".*")] == [".graphs.new.part"]


def test_generated_rows_can_be_read_as_source(tmp_path: Path) -> None:
    config = prontoqa.ProntoqaBuild(str(tmp_path), num_train=6, num_valid=0, num_test=0)
    prontoqa.build(config)
    written = read(tmp_path / "prontoqa_train.json")
    assert prontoqa.released_rows(str(tmp_path / "prontoqa_train.json")) == written
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in read(DATA / "prosqa_released.json"))
    )
    assert prosqa.released_rows(str(tmp_path / "lines.jsonl")) == read(DATA / "prosqa_released.json")
    wrong = [row | {"answer": "True" if row["answer"] == "False" else "False"} for row in written]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="has 6 bad of 6 rows"):
        prontoqa.released_rows(str(tmp_path / "wrong.json"))


@pytest.mark.slow
def test_make_splits_refuses_too_many_questions(tmp_path: Path) -> None:
    config = ProsqaBuild(str(tmp_path), **GRAPHS, nodes=4, hops_from=1, hops_to=1, num_train=300, num_valid=0)
    with pytest.raises(ValueError, match=r"Asked for 800 questions, but after \d+ hardly any new ones come"):
        prosqa.build(config)
    assert not list(tmp_path.iterdir())


def test_build_refuses_a_leftover_split(tmp_path: Path) -> None:
    prosqa.build(ProsqaBuild(str(tmp_path), **GRAPHS, num_train=4, num_valid=4, num_test=4))
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=r"graphs_test\.json is from an earlier build"):
        prosqa.build(ProsqaBuild(str(tmp_path), **GRAPHS, num_train=4, num_valid=4, num_test=0))
    assert digests(tmp_path) == before


def test_build_warns_of_questions_in_two_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(DATA / "prosqa_released.json")
    prosqa.build(ProsqaBuild(str(tmp_path), train=file, test=file))
    assert "4 questions are in two splits, train and test" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "prosqa_manifest.json").read_text())
    assert manifest["shared_questions"] == {"train and test": 4}
    assert manifest["sources"]["test"] == {"file": "prosqa_released.json", "sha256": sha256(file)}
    assert "**Questions in two splits:** 4 of train and test." in (tmp_path / "prosqa_card.md").read_text()


def test_written_splits_open_with_datasets(tmp_path: Path) -> None:
    prosqa.build(ProsqaBuild(str(tmp_path), num_train=6, num_valid=3, num_test=2))
    files = {split: str(tmp_path / f"prosqa_{split}.json") for split in SPLITS}
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "valid": 3, "test": 2}
    assert list(loaded["test"]) == read(Path(files["test"]))


def test_compare_prints_a_table_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    keys: dict[str, Any] = {"compare_rows": 30, "tokenizer": str(tmp_path / "tokenizer")}
    files = {"prosqa": "prosqa_released.json", "prontoqa": "prontoqa_generated.json", "gsm8k": "gsm8k_test.jsonl"}
    prosqa.build(ProsqaBuild(compare=str(DATA / files["prosqa"]), **keys))
    prontoqa.build(prontoqa.ProntoqaBuild(compare=str(DATA / files["prontoqa"]), **keys))
    gsm8k.build(gsm8k.Gsm8kBuild(source=str(DATA / files["gsm8k"]), compare=str(DATA / files["gsm8k"]), **keys))
    said = capsys.readouterr().out
    assert "30 rows here" in said
    assert "4 rows of the file" in said
    assert re.search(r"^hops to the target: 3 +[0-9.]+ % +[0-9.]+ % +[-+][0-9.]+$", said, re.M)
    assert said.count("tokens of the question") == 3
    assert re.search(r"^sentences of the context +25 +25$", said, re.M), "no difference of what never varies"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_statistics_by_hand() -> None:
    first = [{"n": 1.0, "hops": "a", "in": ["x", "x", "y"]}, {"n": 3.0, "hops": "b", "in": ["y"]}]
    assert summary(first) == {
        "n": {"mean": 2.0, "sd": 1.0, "min": 1.0, "max": 3.0}, "hops": {"a": 0.5, "b": 0.5}, "in": {"x": 0.5, "y": 0.5},
    }  # fmt: skip
    assert summary(list(map(compact, first))) == summary(first)
    assert all(line.distance in (0, None) for line in compare(first, first))
    lines = {line.name: line for line in compare(first * 50, [{"n": 2.0, "hops": "a", "in": ["z"]}] * 50)}
    assert lines["hops: b"].first == "50.0 %"
    assert lines["in: z"] == Line("in: z", "0.0 %", "100.0 %", lines["in: z"].distance)
    assert lines["n"].distance == 0
    a, b = (np.random.default_rng(seed).normal(size=400) for seed in (1, 2))
    (line,) = compare([{"n": float(x)} for x in a], [{"n": float(x)} for x in b[:100]])
    pooled = np.concatenate([a, b[:100]]).std()
    assert line.distance == pytest.approx((a.mean() - b[:100].mean()) / (pooled * (1 / 400 + 1 / 100) ** 0.5))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(first, [])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_leaves_no_files(stop: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "data_builders.prosqa", "num_train=1000000", "num_workers=2", "out_dir=here"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    first = process.stdout.readline()
    time.sleep(1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(stop) if stop is signal.SIGKILL else os.killpg(process.pid, stop)
    said, _ = process.communicate(timeout=60)
    assert "Making 1,000,800 rows" in first, "it says what it does"
    assert process.returncode == (130 if stop is signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    until = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.1)


def test_source_is_divided_into_splits(tmp_path: Path) -> None:
    source = str(DATA / "gsm8k_test.jsonl")
    gsm8k.build(gsm8k.Gsm8kBuild(str(tmp_path / "a"), source=source, num_valid=2, num_test=1))
    parts = {split: read(tmp_path / "a" / f"gsm8k_{split}.json") for split in ("train", "valid", "test")}
    assert [len(rows) for rows in parts.values()] == [2, 2, 1]
    questions = {row["question"] for rows in parts.values() for row in rows}
    assert questions == {row["question"] for row in gsm8k.released_rows(source)}
    with pytest.raises(ValueError, match="ask for 6 rows, and the source has 5"):
        gsm8k.build(gsm8k.Gsm8kBuild(str(tmp_path / "b"), source=source, num_valid=5, num_test=1))
    with pytest.raises(ValueError, match="num_valid=1 has no file to divide"):
        gsm8k.build(gsm8k.Gsm8kBuild(str(tmp_path / "b"), test=source, num_valid=1))


@pytest.mark.parametrize(
    "path", [DATA / "prosqa_released.json", *SHARED.glob("prosqa/prosqa_valid.json")], ids=lambda path: path.name
)
def test_released_prosqa_is_converted(path: Path) -> None:
    assert prosqa.released_rows(str(path)) == read(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"edges": [[0, 2]]}, "the question's text and 'edges' differ"),
        ({"edges": [[0, 99]]}, "99 is not the number of a node"), ({"target": 2}, "the question asks whether"),
        ({"steps": ["Tom is a terpus."]}, "do not lead from Tom to lempus"),
        ({"steps": ["Tom is a terpus.", "Every brimpus is a lempus."]}, "not a path in the graph"),
        ({"steps": []}, "'steps' is \\[\\]"),
        ({"answer": "Tom is a scrompus."}, "and the target's is 'Tom is a lempus.'"),
        ({"question": None}, "'question' is None"), ({"question": "Is it?"}, "ends neither"),
    ],
)  # fmt: skip
def test_inconsistent_prosqa_row_is_refused(change: dict, complaint: str, tmp_path: Path) -> None:
    rows = read(DATA / "prosqa_released.json")
    rows[1:] = [rows[0] | change, rows[0] | change]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"bad\.json has 2 bad of 3 rows[^\0]*row 2: .*{complaint}"):
        prosqa.released_rows(str(tmp_path / "bad.json"))


@pytest.mark.parametrize("preset", prosqa.Preset)
def test_written_prosqa_rows_can_be_read_back(preset: prosqa.Preset, tmp_path: Path) -> None:
    prosqa.build(ProsqaBuild(str(tmp_path), preset=preset, num_train=20, num_valid=0, num_test=0))
    path = tmp_path / "prosqa_train.json"
    assert prosqa.released_rows(str(path)) == read(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": "Yes"}, "'answer' is 'Yes'"),
        ({"chain_of_thought": []}, "'chain_of_thought' is"),
        ({"chain_of_thought": ["Max is a zumpus."]}, "does not follow"),
        ({"query": "Max is dull."}, "must begin with 'True or false: '"),
    ],
)
def test_malformed_prontoqa_row_is_refused(change: dict, complaint: str, tmp_path: Path) -> None:
    examples = json.loads((DATA / "prontoqa_generated.json").read_text())
    first = next(e for e in examples.values() if e["test_example"]["answer"] == "True")
    first["test_example"] |= change
    (tmp_path / "bad.json").write_text(json.dumps(examples))
    with pytest.raises(ValueError, match=rf"1 bad of 3 rows[^\0]*row example\d: .*{complaint}"):
        prontoqa.released_rows(str(tmp_path / "bad.json"))


def test_wrong_encoding_is_named_by_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes("How many cats?||<<1+1=2>> #### 2\nHow many caf\xe9s?||<<1+1=2>> #### 2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8 text .*line 2 holds 0xE9.*iconv -f LATIN1"):
        gsm8k.released_rows(str(path))
    path.write_bytes("How many cats?||<<1+1=2>> #### 2\n".encode("utf-16"))
    with pytest.raises(ValueError, match="iconv -f UTF-16"):
        gsm8k.released_rows(str(path))
    path.write_text(json.dumps({"question": "How many \ud800?", "answer": "<<1+1=2>> #### 2"}))
    with pytest.raises(ValueError, match=r"1 bad of 1 rows[^\0]*row 1: it holds half of a surrogate pair"):
        gsm8k.released_rows(str(path))


@pytest.mark.parametrize(
    ("content", "looks_like"),
    [
        (b"PAR1\x00\x01", "a binary file"), (b"\x1f\x8b\xff\xfe", "a binary file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"), (b"  \n", "an empty file"),
        (b"some prose\n", "none of the known forms"), (b"[]", "none of the known forms"),
        (b'{"a": 1}\n', "none of the known forms"), (b'[{"question": "q", "steps": []}]', "none of the known forms"),
        ((DATA / "prosqa_released.json").read_bytes(), "ProsQA as released"),
        ((DATA / "prontoqa_generated.json").read_bytes(), "the output of ProntoQA's generator"),
        ((DATA / "gsm8k_test.jsonl").read_bytes().splitlines()[0], "GSM8K as released"),
        ((DATA / "gsm8k_aug_valid.txt").read_bytes(), "GSM8K-Aug as released"),
    ],
)  # fmt: skip
def test_file_of_another_kind_is_named(content: bytes, looks_like: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    taken = {"ProsQA": prosqa.released_rows, "the output": prontoqa.released_rows, "GSM8K": gsm8k.released_rows}
    for kind, rows in taken.items():
        if looks_like.startswith(kind):
            assert rows(str(path))
        else:
            with pytest.raises(ValueError, match=f"looks like {looks_like}"):
                rows(str(path))
    with pytest.raises(ValueError, match="There is no file"):
        prosqa.released_rows(str(tmp_path / "missing.json"))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", *arguments, cwd=folder, PYTHONPATH=str(ROOT))


def test_builder_command_runs_from_another_folder(tmp_path: Path) -> None:
    done = command(tmp_path, "data_builders.prosqa", "num_train=3", "num_valid=2", "num_test=2", "out_dir=here")
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    parts = ("card.md", "manifest.json", "test.json", "train.json", "valid.json")
    assert written == [f"here/prosqa_{part}" for part in parts]


@pytest.mark.parametrize("name", ["prosqa", "prontoqa", "gsm8k"])
def test_builder_help(name: str, tmp_path: Path) -> None:
    done = command(tmp_path, f"data_builders.{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"coconut data {name}") >= 3
    assert all(key in done.stdout for key in ("out_dir", "name", "seed", "source", "num_train"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_builder_errors_have_no_traceback(tmp_path: Path) -> None:
    unknown = command(tmp_path, "data_builders.prosqa", "hops=3")
    assert unknown.returncode != 0
    assert "There is no key hops. Did you mean" in unknown.stderr
    missing = command(tmp_path, "data_builders.gsm8k")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: No file is given.")
    assert "Traceback" not in unknown.stderr + missing.stderr
    assert not list(tmp_path.iterdir())
