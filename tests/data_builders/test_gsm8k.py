"""GSM8K: equations are read exactly, rows from every known form, and what does not hold is named."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers import DATA, ROOT, SHARED
from helpers.models import byte_level_tokenizer
from helpers.processes import python
from hypothesis import example, given
from hypothesis import strategies as st

from coconut.data.tokenization import encode_answers, encode_questions, encode_texts
from coconut.methods import PromptFormat
from coconut.utils.files import read_json as read
from coconut.utils.files import sha256
from data_builders import gsm8k
from data_builders.arithmetic import LONGEST, OPERATORS, Outcome, Verdict, check, shown
from data_builders.builder_app import token_lengths
from data_builders.gsm8k import Faulty, Gsm8kBuild, Preset, Steps, measure, released_rows

REAL = SHARED / "gsm8k"
GSM8K, AUG = DATA / "gsm8k_test.jsonl", DATA / "gsm8k_aug_valid.txt"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1,200.50", "1200.5"), (".5+5.", "5.5"), ("2 * ( 3 + 4 )", "14"), ("10-4-3", "3"), ("24/4/3", "2"),
        ("3×4÷2", "6"), ("2x3", "6"), ("5−7", "-2"), ("71+-3", "68"), ("3*+6", "18"), ("--5", "5"),
        ("-2^2", "-4"), ("2^3^2", "512"), ("2**-1", "1/2"), ("50*20%", "10"), ("5%%", "1/2000"), ("-5%", "-1/20"),
        ("$1,000*2", "2000"), ("€ 5", "5"), ("1/3+1/6", "1/2"), ("7//2", "3"), ("560//10", "56"), ("-7//2", "-4"),
        ("1,00,000+12,345", "112345"),
    ],
)  # fmt: skip
def test_evaluate_expression(expression: str, value: str) -> None:
    assert check(f"{expression}=0").value == Fraction(value)


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "a number is missing"), ("2+", "a number is missing"), ("x+3", "a number is missing"),
        ("1 2", "an operator is missing"), ("1.2.3", "an operator is missing"), ("2(3)", "an operator is missing"),
        ("1+2)", "an operator is missing"), ("10%3", "an operator is missing"), ("(1+2", r"a '\)' is missing"),
        ("12,34", "',' is no part"), ("0,500", "',' is no part"),
        ("5 apples", "'a' is no part"), ("٣", "is no part"), ("1e5", "'e' is no part"),
        ("1/0", "divided by zero"), ("1//(2-2)", "divided by zero"), ("0^-1", "divided by zero"),
        ("2^.5", "not a whole number"), ("9^9^9^9", "too large"), ("(9^999)^999", "too large"),
        ("^".join("9" * 80), "nested deeper"), ("-" * 99 + "1", "nested deeper"), ("(" * 99 + "1", "nested deeper"),
        ("1+" * LONGEST + "1", "longer than"),
    ],
)  # fmt: skip
def test_evaluate_names_why_an_expression_is_unreadable(expression: str, why: str) -> None:
    verdict = check(f"{expression}=1")
    assert (verdict.outcome, verdict.holds, verdict.value) == (Outcome.unreadable, False, None)
    assert re.search(why, verdict.why)


Tree = int | Fraction | tuple[str, "Tree", "Tree"]
leaves = st.one_of(st.integers(0, 10**6), st.decimals(0, 1000, places=2).map(Fraction))
trees = st.recursive(leaves, lambda below: st.tuples(st.sampled_from("+-*/"), below, below), max_leaves=12)


def value_of(tree: Tree) -> Fraction:
    if not isinstance(tree, tuple):
        return Fraction(tree)
    sign, a, b = tree[0], value_of(tree[1]), value_of(tree[2])
    return {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[sign](b)


def written(tree: Tree, draw: Any, rank: int = 0) -> str:
    """With needed and superfluous parentheses, and alternative forms of signs and numbers."""
    if isinstance(tree, tuple):
        sign, own = tree[0], OPERATORS[tree[0]].rank
        left, right = written(tree[1], draw, own), written(tree[2], draw, own + 1)
        sign = draw(st.sampled_from({"*": "*×x·", "/": "/÷", "-": "-−", "+": "+"}[sign]))
        gap = draw(st.sampled_from(["", " "]))
        text = f"{left}{gap}{sign}{gap}{right}"
        return f"({text})" if own < rank or draw(st.booleans()) else text
    if isinstance(tree, int):
        return draw(st.sampled_from([str(tree), f"{tree:,}", f"{tree}.", f"${tree}", f"{tree * 100}%"]))
    return draw(st.sampled_from([f"{float(tree):.2f}", f"{float(tree):,.2f}0", f"{float(tree):.2f}".lstrip("0")]))


@given(tree=trees, data=st.data())
def test_evaluate_equals_exact_fractions(tree: Any, data: st.DataObject) -> None:
    text = written(tree, data.draw)
    try:
        value = value_of(tree)
    except ZeroDivisionError:
        assert check(f"{text}=0").why == "a number is divided by zero"
        return
    said = f"{value.numerator}/{value.denominator}"
    verdict = check(f"{text}={said}")
    assert (verdict.outcome, verdict.value, verdict.written) == (Outcome.exact, value, value)
    wrong = check(f"({text})={said}+1")
    assert (wrong.outcome, wrong.value, wrong.written) == (Outcome.wrong, value, value + 1)


@given(st.integers(-(10**4), 10**4), st.integers(1, 999), st.integers(0, 4), st.booleans())
def test_check_accepts_only_the_nearest_rounding(over: int, under: int, places: int, percent: bool) -> None:
    exact = Fraction(over, under) * 10**places
    nearest = int(abs(exact) + Fraction(1, 2)) * (1 if over > 0 else -1)
    for number in (nearest - 1, nearest, nearest + 1):
        digits = f"{abs(number):0{places + 1}d}"
        text = "-" * (number < 0) + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
        equation = f"{over}/{under}/100={text}%" if percent else f"{over}/{under}={text}"
        expected = Outcome.exact if number == exact else Outcome.rounded if number == nearest else Outcome.wrong
        assert check(equation).outcome is expected, equation


@pytest.mark.parametrize(
    ("equation", "outcome"),
    [
        ("2/3=.67", "rounded"), ("2/3=.66", "wrong"), ("2/3=0.7", "rounded"), ("1/8=.13", "rounded"),
        ("1/8=.12", "wrong"), ("-1/8=-.13", "rounded"), ("7/2=4", "rounded"), ("7/2=3", "wrong"),
        ("2*2.25=4.50", "exact"), ("3/4=3/4", "exact"), ("1/4=25%", "exact"), ("1/3=33%", "rounded"),
        ("10/3=3.33=3.3", "rounded"), ("2+2=4=5", "wrong"), ("3.33=10/3", "rounded"), ("2*3 = 6 = 3*2", "exact"),
        ("10/3=6.66/2", "wrong"), ("8=8", "exact"), ("8=9", "wrong"), ("$1,200*2=$2,400", "exact"),
        ("5", "unreadable"), ("=5", "unreadable"), ("2==2", "unreadable"), ("5*2=10 apples", "unreadable"),
    ],
)  # fmt: skip
def test_check_outcome_of_equations(equation: str, outcome: str) -> None:
    assert check(equation).outcome == outcome


@given(st.one_of(st.text(), st.text("0123456789.,+-*/^()%$= x×÷<", max_size=40), st.text("9^()-=", max_size=600)))
@example("9^" * 250)
@example("1" * 499 + "=")
def test_check_gives_any_text_a_verdict(text: str) -> None:
    verdict = check(text)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome is Outcome.unreadable) == bool(verdict.why) == (verdict.value is None)
    if verdict.value is not None:
        assert len(shown(verdict.value)) < 100


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"), ("-1/4", "-0.25"), ("1200", "1200"), ("10/3", "10/3 (about 3.33333)"),
        (f"{10**40}/3", "about 3.33333e+39"), (str(10**60), "about 1.00000e+60"), ("0", "0"),
    ],
)  # fmt: skip
def test_shown_formats_values(value: str, text: str) -> None:
    assert shown(Fraction(value)) == text


def test_released_excerpts_are_converted() -> None:
    first, hash_sign, bare, negative, thousands = released_rows(str(GSM8K))
    assert first["steps"] == ["<<16-3-4=9>>", "<<9*2=18>>"]
    assert first["answer"] == "18"
    assert "#" in hash_sign["question"]
    assert bare["steps"] == []
    assert negative["answer"].startswith("-")
    assert thousands["answer"].isdigit()
    assert len(thousands["answer"]) > 3
    first, bare, thousands = released_rows(str(AUG))
    assert first["question"].startswith("John cuts his grass")
    assert first["steps"] == ["<<4-2=2>>", "<<2/.5=4>>", "<<12/4=3>>", "<<100*3=300>>"]
    assert first["answer"] == "300"
    assert bare["steps"] == []
    assert "," not in thousands["answer"]


def test_steps_as_sentences() -> None:
    rows = released_rows(str(GSM8K), Steps.sentences)
    assert rows[0]["steps"][1] == "She makes 9 * 2 = $18 every day at the farmer’s market."
    assert rows[2]["steps"]
    assert not any("<<" in step or "####" in step for row in rows for step in row["steps"])
    with pytest.raises(ValueError, match="has no sentences"):
        released_rows(str(AUG), Steps.sentences)


# rows, those without steps, negative answers, answers with a thousands separator, equations, other last values
COUNTS = {
    "gsm8k_test.jsonl": (5, 1, 1, 1, 11, 0), "gsm8k_aug_valid.txt": (3, 1, 0, 1, 8, 1),
    "train.jsonl": (7473, 95, 3, 79, 23716, 377), "test.jsonl": (1319, 18, 2, 14, 4282, 93),
    "aug_valid.txt": (500, 6, 0, 4, 1573, 28),
}  # fmt: skip


@pytest.mark.parametrize("path", [GSM8K, AUG, *sorted(REAL.glob("*"))], ids=lambda path: path.name)
def test_counts_of_the_released_files(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, bare, negative, commas, equations, other = COUNTS[path.name]
    gsm8k.build(Gsm8kBuild(str(tmp_path), test=str(path)))
    built = read(tmp_path / "gsm8k_test.json")
    assert len(built) == rows
    assert sum(row["steps"] == [] for row in built) == bare
    assert sum(row["answer"].startswith("-") for row in built) == negative
    assert len(re.findall(r"####.*[0-9],[0-9]", path.read_text(encoding="utf-8"))) == commas
    assert all(set(row) == {"question", "steps", "answer"} for row in built)
    assert all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", row["answer"]) for row in built)
    assert all(re.fullmatch("<<[^<>]+=[^<>]+>>", step) for row in built for step in row["steps"])
    found = read(tmp_path / "gsm8k_manifest.json")["arithmetic"]["test"]
    listed = found["faults"]["last_value"].pop("list")
    assert len({told["row"] for told in listed}) == len(listed) == other
    assert found == {
        "rows": rows, "dropped_rows": 0, "equations": equations,
        "exact": equations, "rounded": 0, "wrong": 0, "unreadable": 0,
        "faults": {"arithmetic": {"rows": 0, "list": []}, "last_value": {"rows": other}},
    }  # fmt: skip
    said = f"in {other} of {rows} rows the last equation has another value than the answer (kept)"
    assert (said in capsys.readouterr().err) == (other > 0)


LINES = [
    "Q1||<<2+2=4>> <<4*1,000=4,000>> #### 4,000", "Q2||<<2+2=5>> <<5*20%=1>> #### 1", "Q3||<<10/3=3.33>> #### 3.33",
    "Q4||<<3/0=1>> <<2/3=.66>> <<1+1=2>> #### 7", "Q5|| #### -5", "Q6||<<1+1=2>> #### 3",
]  # fmt: skip
LISTED = [
    {"row": 2, "equation": "2+2=5", "exact": "4"},
    {"row": 4, "equation": "3/0=1", "unreadable": "a number is divided by zero"},
    {"row": 4, "equation": "2/3=.66", "exact": "2/3 (about 0.666667)"},
]
OTHER = [{"row": 4, "equation": "1+1=2", "answer": "7"}, {"row": 6, "equation": "1+1=2", "answer": "3"}]


@pytest.mark.parametrize(
    ("dials", "left"),
    [
        ({}, "123456"), ({"arithmetic": Faulty.drop}, "1356"), ({"last_value": Faulty.drop}, "1235"),
        ({"arithmetic": Faulty.drop, "last_value": Faulty.drop}, "135"),
    ],
)  # fmt: skip
def test_faulty_rows_are_listed_and_dropped(
    dials: dict[str, Any], left: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("\n".join(LINES))
    gsm8k.build(Gsm8kBuild(str(tmp_path), train=str(tmp_path / "train.txt"), **dials))
    assert [row["question"] for row in read(tmp_path / "gsm8k_train.json")] == [f"Q{number}" for number in left]
    manifest = read(tmp_path / "gsm8k_manifest.json")
    assert manifest["dials"] == {"steps": "equations", "arithmetic": "keep", "last_value": "keep", **dials}
    assert manifest["arithmetic"]["train"] == {
        "rows": 6, "dropped_rows": 6 - len(left), "equations": 9,
        "exact": 5, "rounded": 1, "wrong": 2, "unreadable": 1,
        "faults": {"arithmetic": {"rows": 2, "list": LISTED}, "last_value": {"rows": 2, "list": OTHER}},
    }  # fmt: skip
    first, second, third, fourth, fifth, last = capsys.readouterr().err.splitlines()
    fates = ["dropped" if key in dials else "kept" for key in gsm8k.FAULTS]
    assert first.endswith(f"train.txt: in 2 of 6 rows an equation does not hold or cannot be read ({fates[0]})")
    assert second == "  row 2: 2+2=5 (exact: 4)"
    assert third == "  row 4: 3/0=1 (unreadable: a number is divided by zero)"
    assert fourth == "  row 4: 2/3=.66 (exact: 2/3 (about 0.666667))"
    assert fifth.endswith(f"in 2 of 6 rows the last equation has another value than the answer ({fates[1]})")
    assert last == "All of them are listed in gsm8k_manifest.json."


def test_faulty_rows_raise_with_error(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("\n".join(LINES * 5))
    with pytest.raises(ValueError, match="in 10 of 30 rows an equation does not hold") as error:
        gsm8k.build(Gsm8kBuild(str(tmp_path), train=str(path), arithmetic=Faulty.error))
    assert "arithmetic=error. Mend them, or give arithmetic=keep or drop" in str(error.value)
    assert str(error.value).splitlines()[1] == "  row 2: 2+2=5 (exact: 4)"
    assert str(error.value).endswith("  and 5 more")
    with pytest.raises(ValueError, match=r"another value than the answer, and last_value=error(?s:.*)row 4"):
        gsm8k.build(Gsm8kBuild(str(tmp_path), train=str(path), last_value=Faulty.error))
    assert list(tmp_path.iterdir()) == [path]


def test_summary_of_faults_is_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, Any] = {split: str(tmp_path / f"{split}.txt") for split in ("train", "valid", "test")}
    for split, path in files.items():
        Path(path).write_text("\n".join(f"{split} {line}" for line in LINES * 30))
    gsm8k.build(Gsm8kBuild(str(tmp_path), **files))
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_equations_of_sentences_are_checked(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "He has 2+2 = $<<2+2=5>>5.\nThat is all.\n#### 6"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    gsm8k.build(Gsm8kBuild(str(tmp_path), train=str(tmp_path / "train.jsonl"), steps=Steps.sentences))
    [built] = read(tmp_path / "gsm8k_train.json")
    assert built == {"question": "Q", "steps": ["He has 2+2 = $5.", "That is all."], "answer": "6"}
    faults = read(tmp_path / "gsm8k_manifest.json")["arithmetic"]["train"]["faults"]
    assert faults["arithmetic"]["list"] == [{"row": 1, "equation": "2+2=5", "exact": "4"}]
    assert faults["last_value"]["list"] == [{"row": 1, "equation": "2+2=5", "answer": "6"}]


def test_gsm8k_aug_line_is_converted(tmp_path: Path) -> None:
    line = "Room #4 || 5 costs #### what?||<<1+1=2>> <<2*-600=-1200>> #### -1,200.50\r\n"
    (tmp_path / "a.txt").write_bytes(line.encode())
    row = {"question": "Room #4 || 5 costs #### what?", "steps": ["<<1+1=2>>", "<<2*-600=-1200>>"], "answer": "-1200.5"}
    assert released_rows(str(tmp_path / "a.txt")) == [row]


def test_all_bad_rows_are_counted(tmp_path: Path) -> None:
    good = "How many?||<<1+1=2>> #### 2\n"
    bad = ["no bars #### 2\n", "Q||<<1+1=2>>\n", "Q||<<1+1=2>> #### two\n", "Q||<<1+1=2 #### 2\n"]
    bad += ["Q||text <<1+1=2>> #### 2\n", "||<<1+1=2>> #### 2\n"] * 4
    (tmp_path / "train.txt").write_text(good + "\n" + "".join(bad))
    with pytest.raises(ValueError, match="12 bad of 13 rows") as error:
        released_rows(str(tmp_path / "train.txt"))
    lines = str(error.value).splitlines()
    assert lines[1] == "  row 3: it has no question before a '||': 'no bars #### 2'."
    assert "####" in lines[2]
    assert "'two' is not a number" in lines[3]
    assert "do not match" in lines[4]
    assert "more than <<...>>" in lines[5]
    assert lines[-1] == "  and 2 more"


def test_rows_of_at_most_so_many_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training and validation rows are counted as they are trained on; the test stays whole."""
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"question": "Why? " * n, "answer": f"{'<<1+1=2>>' * (n % 3)}#### {n}"}) for n in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = str(tmp_path / "rows.jsonl")
    keys: dict[str, Any] = {"source": rows, "test": rows, "num_valid": 10}
    gsm8k.build(Gsm8kBuild(str(tmp_path), "all", **keys))
    gsm8k.build(Gsm8kBuild(str(tmp_path), "few", tokenizer=str(tmp_path / "tokenizer"), max_tokens=90, **keys))

    said = capsys.readouterr().out

    def length(row: dict[str, Any]) -> int:
        texts = [row["question"] + "\n", *(step + "\n" for step in row["steps"]), "### " + row["answer"]]
        return sum(len(tokenizer.encode(text)) for text in texts)

    for split in ("train", "valid"):
        whole = read(tmp_path / f"all_{split}.json")
        kept = [row for row in whole if length(row) <= 90]
        assert 0 < len(kept) < len(whole)
        assert read(tmp_path / f"few_{split}.json") == kept
        assert f"{split}: {len(kept)} of {len(whole)} rows have at most 90 tokens" in said
    assert read(tmp_path / "few_test.json") == read(tmp_path / "all_test.json")
    manifest = read(tmp_path / "few_manifest.json")
    assert (manifest["max_tokens"], manifest["longer_rows"]["test"]) == (90, 0)
    command = (tmp_path / "few_card.md").read_text()
    assert f"tokenizer={tmp_path / 'tokenizer'}" in command
    assert "max_tokens=90" in command
    wrong: dict[str, Any]
    for wrong in ({"max_tokens": 90}, {"max_tokens": 0, "tokenizer": "x"}):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            Gsm8kBuild(**keys, **wrong)
    with pytest.raises(ValueError, match=r"No row of .* at most max_tokens=2 tokens"):
        gsm8k.build(Gsm8kBuild(str(tmp_path), "no", tokenizer=str(tmp_path / "tokenizer"), max_tokens=2, **keys))


def test_tokens_are_counted_as_in_training(tmp_path: Path) -> None:
    """With a tokenizer that puts special tokens around every text."""
    tokenizer = byte_level_tokenizer(start=True)
    tokenizer.save_pretrained(tmp_path)
    row = {"question": "How many?", "steps": ["<<1+1=2>>", "<<2+2=4>>"], "answer": "4"}
    (found,) = token_lengths([row], str(tmp_path))
    (question,) = encode_questions(tokenizer, [row["question"]], PromptFormat())
    assert (question[0], question[-1]) == (tokenizer.bos_token_id, *tokenizer.encode("\n", add_special_tokens=False))
    steps = encode_texts(tokenizer, [f"{step}\n" for step in row["steps"]])
    (answer,), _ = encode_answers(tokenizer, [row["answer"]], PromptFormat())
    assert list(found.values()) == [len(question), sum(map(len, steps)), len(answer) - 1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be read as a data set of the hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


SHAPES: dict[str, dict[str, Any]] = {
    "answer": {"question": "Q", "answer": "It is <<2+3=5>>5.\nTwice is <<5*2=10>>10.\n#### 10"},
    "steps": {"question": "Q", "steps": ["<<2+3=5>>", "<<5*2=10>>"], "answer": "10"},
    "cot": {"question": "Q", "cot": "<<2+3=5>> <<5*2=10>>", "answer": "#### 10"},
    "number": {"question": "Q", "cot": "<<2+3=5>> <<5*2=10>>", "answer": 10, "source": "x"},
    "text": {"text": "Q||<<2+3=5>> <<5*2=10>> #### 10"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_record_shape_gives_the_same_row(shape: str, folder: Path, tmp_path: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps(SHAPES[shape]) + "\n")
    gsm8k.build(Gsm8kBuild(str(tmp_path), hub=str(folder)))
    expected = [{"question": "Q", "steps": ["<<2+3=5>>", "<<5*2=10>>"], "answer": "10"}]
    assert read(tmp_path / "gsm8k_train.json") == expected
    if shape != "text":
        assert released_rows(str(folder / "train.jsonl")) == expected


@pytest.mark.parametrize(
    ("record", "steps"),
    [
        ({"steps": ["It is 5.", "Twice is 10."]}, ["It is 5.", "Twice is 10."]),
        ({"cot": "It is $2.50. Twice is <<2.5*2=5>>5. So 5!"}, ["It is $2.50.", "Twice is 5.", "So 5!"]),
        ({"steps": ["", " "]}, []),
        ({"cot": None}, []),
    ],
)
def test_sentences_in_fields_are_split(record: dict[str, Any], steps: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Q", "answer": "5", **record}))
    [row] = released_rows(str(tmp_path / "a.jsonl"), Steps.sentences)
    assert row["steps"] == steps


@pytest.mark.parametrize(
    ("record", "kind", "complaint"),
    [
        ({"answer": "5"}, "equations", "it has no '####'"),
        ({"answer": None, "steps": []}, "equations", "'answer' is None"),
        ({"answer": True, "steps": []}, "equations", "'answer' is True"),
        ({"answer": "5 or 6", "steps": []}, "equations", "'5 or 6' is not a number"),
        ({"answer": "<<3/2=1.5>> #### 1,5"}, "equations", "'1,5' is not a number"),
        ({"answer": "5", "steps": [5]}, "equations", r"'steps' is \[5\]; it must be text, or a list"),
        ({"answer": "5", "steps": ["It is 5."]}, "equations", "more than <<...>>: 'It is 5.'"),
        ({"answer": "5", "steps": ["<<5=5>>"]}, "sentences", "no sentences, only equations"),
        ({"answer": "#### 5", "question": ""}, "equations", "'question' is ''"),
    ],
)
def test_unreadable_record_is_named(record: dict[str, Any], kind: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "Q", **record}))
    with pytest.raises(ValueError, match=rf"a\.jsonl has 1 bad of 1 rows(?s:.*)row 1: .*{complaint}"):
        released_rows(str(tmp_path / "a.jsonl"), Steps(kind))


def divide_excerpt(folder: Path) -> None:
    lines = GSM8K.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    (folder / "test.jsonl").write_text(lines[4], encoding="utf-8")


def test_folder_is_read_as_the_hub_is(folder: Path, tmp_path: Path) -> None:
    divide_excerpt(folder)
    gsm8k.build(Gsm8kBuild(str(tmp_path / "whole"), hub=str(folder)))
    rows = released_rows(str(GSM8K))
    assert read(tmp_path / "whole" / "gsm8k_train.json") == rows[:4]
    assert read(tmp_path / "whole" / "gsm8k_test.json") == rows[4:]
    assert not (tmp_path / "whole" / "gsm8k_valid.json").exists()
    manifest = read(tmp_path / "whole" / "gsm8k_manifest.json")
    files = {s: [{"file": f"{s}.jsonl", "sha256": sha256(folder / f"{s}.jsonl")}] for s in ("train", "test")}
    assert manifest["sources"] == {"hub": "set", "config": None, "files": files}
    assert {split: found["rows"] for split, found in manifest["arithmetic"].items()} == {"train": 4, "test": 1}

    gsm8k.build(Gsm8kBuild(str(tmp_path / "parts"), hub=str(folder), num_valid=1, seed=3))
    parts = {split: read(tmp_path / "parts" / f"gsm8k_{split}.json") for split in ("train", "valid", "test")}
    assert [len(part) for part in parts.values()] == [3, 1, 1]
    assert sorted(row["question"] for part in parts.values() for row in part) == sorted(row["question"] for row in rows)
    gsm8k.build(Gsm8kBuild(str(tmp_path / "file"), source=str(folder / "train.jsonl"), num_valid=1, num_test=0, seed=3))
    assert read(tmp_path / "file" / "gsm8k_valid.json") == parts["valid"], "divided as a source is"


def test_hub_folder_of_parquet_files(folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_list([SHAPES["steps"], {"question": "R", "steps": [], "answer": "1"}])
    for name in ("train", "validation"):
        rows.to_parquet(folder / f"{name}.parquet")
    gsm8k.build(Gsm8kBuild(str(tmp_path), hub=str(folder)))
    for split in ("train", "valid"):
        assert [row["steps"] for row in read(tmp_path / f"gsm8k_{split}.json")] == [["<<2+3=5>>", "<<5*2=10>>"], []]


def test_hub_folder_of_text_files(folder: Path, tmp_path: Path) -> None:
    for name in ("train.txt", "valid.txt"):
        (folder / name).write_bytes(AUG.read_bytes())
    gsm8k.build(Gsm8kBuild(str(tmp_path), hub=str(folder)))
    for split in ("train", "valid"):
        assert read(tmp_path / f"gsm8k_{split}.json") == released_rows(str(AUG))


def test_unreachable_hub_is_explained(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for preset, name in gsm8k.HUB_NAMES.items():
        with pytest.raises(ValueError, match=f"'{name}' on the Hugging Face hub .*connection.*train=FILE"):
            gsm8k.build(Gsm8kBuild(out, preset=preset))
    divide_excerpt(folder)
    with pytest.raises(ValueError, match=r"num_test=1 is given, and .* has 1 test rows of its own"):
        gsm8k.build(Gsm8kBuild(out, hub=str(folder), num_test=1))
    with pytest.raises(ValueError, match="ask for 5 rows, and the source has 4"):
        gsm8k.build(Gsm8kBuild(out, hub=str(folder), num_valid=5))
    with pytest.raises(ValueError, match=r"from the folder .*'main' not found.*hub_config=NAME"):
        gsm8k.build(Gsm8kBuild(out, hub=str(folder), hub_config="main"))
    (folder / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="has no train split"):
        gsm8k.build(Gsm8kBuild(out, hub=str(folder), num_valid=1))
    (folder / "test.jsonl").write_text('{"question": "Q", "answer": "none"}\n')
    with pytest.raises(ValueError, match=r"set \(test\) has 1 bad of 1 rows"):
        gsm8k.build(Gsm8kBuild(out, hub=str(folder)))
    (folder / "test.jsonl").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"from the folder .*set .*Error: .*train=FILE"):
        gsm8k.build(Gsm8kBuild(out, hub=str(folder)))
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({}, "^No file is given.*preset=gsm8k .*preset=gsm8k_aug .*hub=NAME.*source=FILE"),
        ({"preset": Preset.gsm8k, "hub": "a/b"}, "preset=gsm8k and hub=a/b are given"),
        ({"hub": "a/b", "train": "c"}, "hub=a/b and train=c are given"),
        ({"preset": Preset.gsm8k_aug, "source": "c"}, "preset=gsm8k_aug and source=c are given"),
        ({"train": "c", "hub_config": "main"}, "hub_config=main is given without hub=NAME"),
    ],
)
def test_gsm8k_refuses_contradicting_keys(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Gsm8kBuild(**keys)


def test_gsm8k_measures() -> None:
    row = {
        "question": "How many apples?",
        "steps": ["<<2+3*4=14>>", "<<14/3=4.67>>", "<<1+1=3>>", "<<two=2>>", "<<7-10.5=-3.5>>"],
        "answer": "-3.5",
    }
    measured = measure(row)
    assert measured == {
        "steps": 5.0, "rows without steps": 0.0, "words of the question": 3.0,
        "characters of a step": [12.0, 13.0, 9.0, 9.0, 15.0],
        "equations": ["exact", "rounded", "wrong", "unreadable", "exact"], "operators": ["*", "+", "/", "+", "-"],
        "last value is not the answer": 0.0, "digits of the answer": 2.0, "negative answers": 1.0,
        "answers with decimals": 1.0,
    }  # fmt: skip
    bare = measure({"question": "Q", "steps": [], "answer": "none"})
    assert bare.keys() == measured.keys()
    assert not any(value for key, value in bare.items() if key not in ("rows without steps", "words of the question"))
    assert measure({**row, "answer": "3"})["last value is not the answer"] == 1.0
    operators = Counter(sign for row in released_rows(str(GSM8K)) for sign in measure(row)["operators"])  # pyright: ignore
    assert set(operators) == set("+-*/")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "data_builders.gsm8k", *arguments, cwd=folder, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_gsm8k_command(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(LINES))
    unreachable = command(tmp_path, "preset=gsm8k", "num_valid=500")
    assert unreachable.returncode == 2
    assert unreachable.stderr.startswith("error: The data set could not be read from 'openai/gsm8k'")
    assert unreachable.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]
    done = command(tmp_path, "train=train.txt", "arithmetic=drop", "out_dir=here")
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 6
    assert len(read(tmp_path / "here" / "gsm8k_train.json")) == 4
