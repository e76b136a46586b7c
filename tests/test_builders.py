"""Data made from scratch is what it claims to be; released files are read, and others refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.files import sha256
from coconut.tasks import prontoqa as prontoqa_task
from coconut.tasks import prosqa as prosqa_task
from data_builders import gsm8k, prontoqa, prosqa
from data_builders.prosqa import ProsqaBuild, graph_rows

HERE = Path(__file__).parent
DATA = HERE / "data"
REAL = HERE.parent.parent / "shared" / "data"


def existing(*names: str) -> list[Path]:
    return [path for name in names for path in REAL.glob(name)]


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(0, 2), st.integers(0, 6))
def test_graphs_hold_what_they_promise(seed: int, low: int, more: int, spare: int) -> None:
    high = low + more
    nodes = low + high + 2 + spare
    rows = graph_rows(seed, 12, nodes=nodes, min_hops=low, max_hops=high)
    assert len(rows) == 12
    for row in rows:
        graph = prosqa_task.graph(row["question"])
        root, target, other = (str(row[key]) for key in ("root", "target", "neg_target"))
        assert set(graph.nodes) == {str(node) for node in range(nodes)}
        assert sorted(graph.edges) == sorted((str(a), str(b)) for a, b in row["edges"])
        assert graph.number_of_edges() == len(row["edges"])
        assert networkx.is_directed_acyclic_graph(graph)
        assert max(degree for _, degree in graph.in_degree()) <= 2
        assert graph.in_degree(root) == 0
        assert graph.graph["root"] == root
        assert set(graph.graph["options"]) == {target, other}
        assert low <= networkx.shortest_path_length(graph, root, target) == len(row["steps"]) <= high
        assert all(graph.has_edge(*edge) for edge in pairwise([root, *row["steps"]]))
        assert row["steps"][-1] == row["answer"] == target
        assert not networkx.has_path(graph, root, other)
        heads = [node for node in networkx.ancestors(graph, other) if graph.in_degree(node) == 0]
        ways = [head for head in heads if not networkx.has_path(graph, head, target)]
        distances = [networkx.shortest_path_length(graph, head, other) for head in ways]
        assert low + high - len(row["steps"]) in distances, "the same pair can be asked the other way round"


def test_graphs_are_balanced_and_differ() -> None:
    rows = graph_rows(seed=3, count=2001)
    hops = Counter(len(row["steps"]) for row in rows)
    assert set(hops) == {2, 3}
    assert abs(hops[2] - hops[3]) <= 1
    keys = ("root", "target", "neg_target")
    asked = {(frozenset(map(tuple, row["edges"])), *(row[key] for key in keys)) for row in rows}
    assert len(asked) == len(rows)
    assert Counter(row["answer"] for row in rows).keys() == set("01234567")
    assert graph_rows(seed=3, count=50) == rows[:50]
    assert graph_rows(seed=4, count=50) != rows[:50]


def test_target_and_distractor_look_alike() -> None:
    """Whatever is counted without the root tells them apart half the time (4 standard errors)."""
    rows = graph_rows(seed=0, count=4000)
    wins: Counter[str] = Counter()
    for row in rows:
        graph = networkx.DiGraph(map(tuple, row["edges"]))
        pair = row["target"], row["neg_target"]
        first = row["question"].split(" ? ")[1].split()[0]
        measures = {
            "edges in": [graph.in_degree(node) for node in pair],
            "edges out": [graph.out_degree(node) for node in pair],
            "ancestors": [len(networkx.ancestors(graph, node)) for node in pair],
            "named first": [first == str(node) for node in pair],
            "place of the last mention": [_last_mention(row["edges"], node) for node in pair],
        }
        for name, (target, distractor) in measures.items():
            wins[name] += (target > distractor) - (target < distractor)
    assert all(abs(won) < 4 * len(rows) ** 0.5 for won in wins.values()), wins


def _last_mention(edges: list[list[int]], node: int) -> int:
    return max(place for place, edge in enumerate(edges) if node in edge)


def test_too_many_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Asked for 500 different questions.*raise nodes"):
        graph_rows(0, 500, nodes=4, min_hops=1, max_hops=1)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"nodes": 6}, "nodes=6 is too few.* = 7"),
        ({"min_hops": 4}, "min_hops=4, max_hops=3"),
        ({"num_valid": -1}, "num_valid is -1"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"source": "a", "train": "b"}, "source=a and train=b"),
        ({"source": "a", "test": "b", "num_test": 3}, "num_test=3 and test=b"),
        ({"source": "a", "preset": prosqa.Preset.graphs}, "preset=graphs and source=a"),
        ({"valid": "a", "nodes": 9}, "nodes=9 .* valid=a"),
    ],
)
def test_keys_that_contradict(keys: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ProsqaBuild(**keys)


def test_the_command_writes_the_same_files_again(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        config = ProsqaBuild(out_dir=str(tmp_path / folder), num_train=30, num_valid=6, num_test=4, seed=5)
        prosqa.build(config)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["graphs_manifest.json", "graphs_test.json", "graphs_train.json", "graphs_valid.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    manifest = json.loads((tmp_path / "a" / "graphs_manifest.json").read_text())
    assert manifest["dials"] == {"nodes": 8, "min_hops": 2, "max_hops": 3}
    assert (manifest["preset"], manifest["seed"], manifest["shared_questions"]) == ("graphs", 5, {})
    for split, count in {"train": 30, "valid": 6, "test": 4}.items():
        path = tmp_path / "a" / f"graphs_{split}.json"
        assert manifest["splits"][split] == {"file": path.name, "rows": count, "sha256": sha256(path)}
        assert len(read(path)) == count
        assert len(path.read_text().splitlines()) == count + 2, "one row a line"


def test_more_training_rows_leave_the_other_splits_alone(tmp_path: Path) -> None:
    for count in (5, 9):
        prosqa.build(ProsqaBuild(str(tmp_path / str(count)), num_train=count, num_valid=4, num_test=4))
    for split in ("valid", "test"):
        name = f"graphs_{split}.json"
        assert (tmp_path / "5" / name).read_bytes() == (tmp_path / "9" / name).read_bytes()


def test_a_split_of_another_build_is_not_left_beside(tmp_path: Path) -> None:
    prosqa.build(ProsqaBuild(str(tmp_path), num_train=4, num_valid=4, num_test=4))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"graphs_test\.json is from an earlier build"):
        prosqa.build(ProsqaBuild(str(tmp_path), num_train=4, num_valid=4, num_test=0))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_questions_in_two_splits_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(DATA / "prosqa_released.json")
    prosqa.build(ProsqaBuild(str(tmp_path), train=file, test=file))
    assert "4 questions are in two splits, train and test" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "graphs_manifest.json").read_text())
    assert manifest["shared_questions"] == {"train and test": 4}
    assert manifest["sources"]["test"] == {"file": "prosqa_released.json", "sha256": sha256(file)}


def test_a_source_is_divided(tmp_path: Path) -> None:
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
    "path", [DATA / "prosqa_released.json", *existing("prosqa/prosqa_valid.json")], ids=lambda path: path.name
)
def test_released_prosqa(path: Path) -> None:
    assert prosqa.released_rows(str(path)) == read(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"edges": [[0, 2]]}, "the question's text and 'edges' differ"),
        ({"edges": [[0, 99]]}, "99 is not the number of a node"),
        ({"target": 2}, "the question asks whether"),
        ({"steps": ["Tom is a terpus."]}, "do not lead from Tom to lempus"),
        ({"steps": ["Tom is a terpus.", "Every brimpus is a lempus."]}, "not a path in the graph"),
        ({"steps": []}, "'steps' is \\[\\]"),
        ({"answer": "Tom is a scrompus."}, "and the target's is 'Tom is a lempus.'"),
        ({"question": None}, "'question' is None"),
        ({"question": "Is it?"}, "ends neither"),
    ],
)
def test_a_prosqa_row_that_contradicts_itself(change: dict, complaint: str, tmp_path: Path) -> None:
    rows = read(DATA / "prosqa_released.json")
    rows[1:] = [rows[0] | change, rows[0] | change]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"bad\.json has 2 bad of 3 rows[^\0]*row 2: .*{complaint}"):
        prosqa.released_rows(str(tmp_path / "bad.json"))


def test_what_graphs_writes_can_be_read_back(tmp_path: Path) -> None:
    prosqa.build(ProsqaBuild(str(tmp_path), num_train=20, num_valid=0, num_test=0))
    path = tmp_path / "graphs_train.json"
    assert prosqa.released_rows(str(path)) == read(path)


@pytest.mark.parametrize(
    "path", [DATA / "prontoqa_generated.json", *existing("prontoqa/*.json")], ids=lambda path: path.name
)
def test_released_prontoqa(path: Path) -> None:
    examples = [example["test_example"] for example in json.loads(path.read_text()).values()]
    for row, example in zip(prontoqa.released_rows(str(path)), examples, strict=True):
        assert row["question"] == f"{example['question']} {example['query']}"
        assert " ".join(row["steps"]) == " ".join(example["chain_of_thought"])
        assert len(row["steps"]) == 6
        assert prontoqa_task.judge(row["answer"], example["answer"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": "Yes"}, "'answer' is 'Yes'"),
        ({"chain_of_thought": []}, "'chain_of_thought' is"),
        ({"chain_of_thought": ["Max is a zumpus."]}, "the proof ends in"),
        ({"query": "Max is dull."}, "must begin with 'True or false: '"),
    ],
)
def test_a_bad_prontoqa_row(change: dict, complaint: str, tmp_path: Path) -> None:
    examples = json.loads((DATA / "prontoqa_generated.json").read_text())
    first = next(e for e in examples.values() if e["test_example"]["answer"] == "True")
    first["test_example"] |= change
    (tmp_path / "bad.json").write_text(json.dumps(examples))
    with pytest.raises(ValueError, match=rf"1 bad of 3 rows[^\0]*row example\d: .*{complaint}"):
        prontoqa.released_rows(str(tmp_path / "bad.json"))


def test_released_gsm8k() -> None:
    first, hash_sign, bare, negative, thousands = gsm8k.released_rows(str(DATA / "gsm8k_test.jsonl"))
    assert first["steps"] == ["<<16-3-4=9>>", "<<9*2=18>>"]
    assert first["answer"] == "18"
    assert "#" in hash_sign["question"]
    assert bare["steps"] == []
    assert negative["answer"].startswith("-")
    assert "," not in thousands["answer"]
    assert len(thousands["answer"]) > 3


def test_gsm8k_sentences() -> None:
    rows = gsm8k.released_rows(str(DATA / "gsm8k_test.jsonl"), gsm8k.Steps.sentences)
    assert rows[0]["steps"][1] == "She makes 9 * 2 = $18 every day at the farmer’s market."
    assert rows[2]["steps"]
    assert not any("<<" in step or "####" in step for row in rows for step in row["steps"])


def test_released_gsm8k_aug() -> None:
    first, bare, thousands = gsm8k.released_rows(str(DATA / "gsm8k_aug_valid.txt"))
    assert first["question"].startswith("John cuts his grass")
    assert first["steps"] == ["<<4-2=2>>", "<<2/.5=4>>", "<<12/4=3>>", "<<100*3=300>>"]
    assert first["answer"] == "300"
    assert bare["steps"] == []
    assert "," not in thousands["answer"]
    with pytest.raises(ValueError, match="has no sentences"):
        gsm8k.released_rows(str(DATA / "gsm8k_aug_valid.txt"), gsm8k.Steps.sentences)


def test_gsm8k_aug_line() -> None:
    row = gsm8k.from_aug("Room #4 || 5 costs #### what?||<<1+1=2>> <<2*-600=-1200>> #### -1,200.50\r")
    assert row == {
        "question": "Room #4 || 5 costs #### what?",
        "steps": ["<<1+1=2>>", "<<2*-600=-1200>>"],
        "answer": "-1200.50",
    }


COUNTS = {
    "gsm8k_test.jsonl": (5, 1),
    "gsm8k_aug_valid.txt": (3, 1),
    "train.jsonl": (7473, 95),
    "test.jsonl": (1319, 18),
    "aug_valid.txt": (500, 6),
}


@pytest.mark.parametrize(
    "path",
    [DATA / "gsm8k_test.jsonl", DATA / "gsm8k_aug_valid.txt", *existing("gsm8k/*.jsonl", "gsm8k/*.txt")],
    ids=lambda path: path.name,
)
def test_no_gsm8k_row_has_an_empty_step(path: Path) -> None:
    rows = gsm8k.released_rows(str(path))
    assert (len(rows), sum(row["steps"] == [] for row in rows)) == COUNTS[path.name]
    assert all(step.strip() for row in rows for step in row["steps"])


def test_bad_gsm8k_rows_are_counted_before_it_stops(tmp_path: Path) -> None:
    good = "How many?||<<1+1=2>> #### 2\n"
    bad = ["no bars #### 2\n", "Q||<<1+1=2>>\n", "Q||<<1+1=2>> #### two\n", "Q||<<1+1=2 #### 2\n"]
    bad += ["Q||text <<1+1=2>> #### 2\n", "||<<1+1=2>> #### 2\n"] * 4
    (tmp_path / "train.txt").write_text(good + "\n" + "".join(bad))
    with pytest.raises(ValueError, match="12 bad of 13 rows") as error:
        gsm8k.released_rows(str(tmp_path / "train.txt"))
    lines = str(error.value).splitlines()
    assert lines[1] == "  row 3: it has no question before a '||': 'no bars #### 2'."
    assert "####" in lines[2]
    assert "'two' is not a number" in lines[3]
    assert "do not match" in lines[4]
    assert "more than <<...>>" in lines[5]
    assert lines[-1] == "  and 2 more"


@pytest.mark.parametrize(
    ("content", "looks_like"),
    [
        (b"PAR1\x00\x01", "a binary file"),
        (b"\x1f\x8b\xff\xfe", "a binary file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"  \n", "an empty file"),
        (b"some prose\n", "none of the known forms"),
        (b"[]", "none of the known forms"),
        (b'{"a": 1}\n', "none of the known forms"),
        (b'[{"question": "q", "steps": [], "answer": "a"}]', "a JSON list of question, steps and answer"),
        ((DATA / "prosqa_released.json").read_bytes(), "ProsQA as released"),
        ((DATA / "prontoqa_generated.json").read_bytes(), "the output of ProntoQA's generator"),
        ((DATA / "gsm8k_test.jsonl").read_bytes().splitlines()[0], "GSM8K as released"),
        ((DATA / "gsm8k_aug_valid.txt").read_bytes(), "GSM8K-Aug as released"),
    ],
)
def test_a_file_of_another_kind_is_named(content: bytes, looks_like: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    taken = {
        "ProsQA": prosqa.released_rows,
        "the output": prontoqa.released_rows,
        "GSM8K": gsm8k.released_rows,
    }
    for kind, rows in taken.items():
        if looks_like.startswith(kind):
            assert rows(str(path))
        else:
            with pytest.raises(ValueError, match=f"looks like {looks_like}"):
                rows(str(path))
    with pytest.raises(ValueError, match="There is no file"):
        prosqa.released_rows(str(tmp_path / "missing.json"))


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_from_another_folder(tmp_path: Path) -> None:
    done = command(tmp_path, "data_builders.prosqa", "num_train=3", "num_valid=2", "num_test=2", "out_dir=here")
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == [f"here/graphs_{part}.json" for part in ("manifest", "test", "train", "valid")]


@pytest.mark.parametrize("name", ["prosqa", "prontoqa", "gsm8k"])
def test_help(name: str, tmp_path: Path) -> None:
    done = command(tmp_path, f"data_builders.{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"python -m data_builders.{name} ") == 3
    assert all(key in done.stdout for key in ("out_dir", "name", "seed", "source", "num_train"))
    assert not list(tmp_path.iterdir())


def test_errors_of_the_command_are_for_people(tmp_path: Path) -> None:
    unknown = command(tmp_path, "data_builders.prosqa", "hops=3")
    assert unknown.returncode != 0
    assert "Key 'hops' not in 'ProsqaBuild'" in unknown.stderr
    missing = command(tmp_path, "data_builders.gsm8k")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: No file is given.")
    assert "Traceback" not in unknown.stderr + missing.stderr
    assert not list(tmp_path.iterdir())
