"""Reading data files, tokenization and the word-level tokenizer."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers.models import byte_level_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from coconut.data.examples import Example, read_examples
from coconut.data.tokenization import (
    add_special_tokens,
    build_word_tokenizer,
    encode_questions,
    encode_texts,
    token_ids,
    tokenize,
    unknown_words,
    written_otherwise,
)
from coconut.methods import PromptFormat

ROWS = [
    {"question": "Is Tom a cat?", "steps": ["Tom is a dog.", "Every dog is a cat."], "answer": "True", "hops": 2},
    {"question": "2 + 2 = # ?", "steps": [], "answer": "4"},
]


def examples(rows: list[dict] = ROWS) -> list[Example]:
    return [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in rows]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.json"


@pytest.mark.parametrize("text", ["\n\n".join(map(json.dumps, ROWS)), json.dumps(ROWS, indent=1)])
def test_json_list_and_lines_read_the_same(path: Path, text: str) -> None:
    path.write_text(text)
    read = read_examples(path)
    assert [(e.question, e.steps, e.answer) for e in read] == [(e.question, e.steps, e.answer) for e in examples()]
    assert read[0].meta == {"hops": 2}


GOOD = {"question": "q", "steps": ["s"], "answer": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "question": "  "}, "row 2: question is empty"),
        ({**GOOD, "answer": ""}, "row 2: answer is empty"),
        ({**GOOD, "answer": True}, "row 2: answer must be text; it is true"),
        ({**GOOD, "answer": "a\nb"}, "row 2: the answer must be one line"),
        ({**GOOD, "steps": "s"}, "row 2: steps must be a list of texts"),
        ({**GOOD, "steps": [""]}, r"row 2: step 1 of 1 is empty .*steps: \[\]"),
        ({"question": "q"}, "row 2: has no answer; its keys are: question, steps"),
        ([1, 2], "row 2: must be an object"),
        ({**GOOD, "question": "a\ud800"}, r"row 2: holds half of a surrogate pair, which is not text: 'a\\ud800'"),
        ({**GOOD, "steps": ["s", "\udfff"]}, r"row 2: holds half of a surrogate pair, which is not text: '\\udfff'"),
        ({**GOOD, "other": {"a": "\udfff"}}, "row 2: holds half of a surrogate pair"),
    ],
)
def test_malformed_row_is_named(path: Path, row: object, message: str) -> None:
    path.write_text(json.dumps([GOOD, row]))
    with pytest.raises(ValueError, match=rf"data.json has 1 bad row:\s+{message}"):
        read_examples(path)


def test_missing_steps_numeric_answers_and_line_separators_are_accepted(path: Path) -> None:
    rows = '{"question": "q", "answer": 7}\n\n{"question": "a\u2028b", "answer": -2.5, "steps": null}\n'
    path.write_text(rows, encoding="utf-8")
    read = read_examples(path)
    assert read == [Example("q", (), "7"), Example("a\u2028b", (), "-2.5")]
    assert [example.where for example in read] == ["line 1", "line 3"]


def test_all_bad_rows_are_counted(path: Path) -> None:
    path.write_text("\n".join([json.dumps(GOOD), "{broken", *[json.dumps({})] * 20]))
    with pytest.raises(ValueError, match=r"(?s)has 21 bad rows:\n  line 2: not JSON .*\{broken.*and 11 more"):
        read_examples(path)


def test_unusable_files_are_refused(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data.json does not exist.*coconut data NAME"):
        read_examples(path)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_examples(path.parent)
    for content, message in (
        (b"", "holds no example"), (b"[]", "holds no example"), (b"[{", "breaks at line 1"),
        (b'[{"question": "a"},\n {"question": "caf\xe9"}]',
         r"data\.json is not UTF-8 text .*line 2 holds 0xE9.*iconv -f LATIN1"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_examples(path)


@pytest.mark.slow
@given(st.text(min_size=1).filter(str.strip), st.lists(st.text(min_size=1), max_size=3), st.text(min_size=1))
def test_segments_are_encoded_separately(question: str, steps: list[str], answer: str) -> None:
    tokenizer = byte_level_tokenizer()
    add_special_tokens(tokenizer)
    data = tokenize([Example(question, tuple(steps), answer)], tokenizer)
    assert data.num_steps.tolist() == [len(steps)]
    texts = [f"{question}\n", *(f"{step}\n" for step in steps), f"### {answer}"]
    ends = data.bounds.tolist()
    pieces = [data.tokens[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]
    assert pieces[-1].pop() == tokenizer.eos_token_id
    assert pieces == encode_texts(tokenizer, texts)
    assert [tokenizer.decode(piece) for piece in pieces] == texts


@given(st.sampled_from(["<bot>", "<eot>", "<latent>", "<pause>", "<s>", "</s>"]), st.text(max_size=5))
def test_special_tokens_in_a_question_stay_text(token: str, around: str) -> None:
    tokenizer = byte_level_tokenizer()
    special = add_special_tokens(tokenizer)
    (ids,) = encode_texts(tokenizer, [around + token + around])
    assert not set(ids) & {*special.added, 0, 1}
    assert tokenizer.decode(ids) == around + token + around


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Half of a surrogate pair .*: 'a\\ud800'"):
        encode_texts(byte_level_tokenizer(), ["good", "a\ud800"])
    assert encode_texts(byte_level_tokenizer(), ["\U0001f600"])


def test_start_token_only_precedes_the_question() -> None:
    tokenizer = byte_level_tokenizer(start=True)
    data = tokenize(examples(), tokenizer)
    assert data.question(0)[0] == tokenizer.bos_token_id
    assert (data.tokens == tokenizer.bos_token_id).sum() == len(ROWS)
    assert (data.tokens == tokenizer.eos_token_id).sum() == len(ROWS), "and the end only after the answer"
    (asked,) = encode_questions(tokenizer, [ROWS[0]["question"]], PromptFormat())
    assert asked == data.question(0).tolist()


def test_tokens_are_cached(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    first = tokenize(examples(), tokenizer, cache_dir=tmp_path)
    (file,) = (tmp_path / "tokens").glob("*.arrow")
    written = file.stat().st_mtime_ns
    again = tokenize(examples(), tokenizer, cache_dir=tmp_path)
    assert file.stat().st_mtime_ns == written
    assert again.tokens.tolist() == first.tokens.tolist()
    tokenize(examples(ROWS[:1]), tokenizer, cache_dir=tmp_path)
    tokenize(examples(), tokenizer, PromptFormat(step="{} "), cache_dir=tmp_path)
    add_special_tokens(tokenizer)
    tokenize(examples(), tokenizer, cache_dir=tmp_path)
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) == 4


@pytest.mark.parametrize("part", ["within a batch", "between batches", "nothing", "other bytes"])
def test_damaged_token_cache_is_rebuilt(tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    many = [Example(f"{number} + 1 = ?", (), str(number + 1)) for number in range(1500)]
    tokenizer = byte_level_tokenizer()
    whole = tokenize(many, tokenizer, cache_dir=tmp_path)
    (file,) = (tmp_path / "tokens").glob("*.arrow")
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
        batches.read_next_batch()
        first = source.tell()
    cut = {"within a batch": first - 100, "between batches": first, "nothing": 0}.get(part)
    damaged = bytearray(file.read_bytes()[:cut])
    if part == "other bytes":
        damaged[damaged.index((32).to_bytes(4, "little"), 8)] = 7  # integers of seven bits, which Arrow has not
    file.write_bytes(damaged)
    again = tokenize(many, tokenizer, cache_dir=tmp_path)
    assert f"warning: the token cache {file} is damaged" in capsys.readouterr().out
    assert len(again) == 1500
    assert again.tokens.tolist() == whole.tokens.tolist()


def test_select_returns_the_chosen_rows() -> None:
    tokenizer = byte_level_tokenizer()
    data = tokenize(examples(), tokenizer)
    picked = data.select([1, 0, 1])
    assert [picked.question(i).tolist() for i in range(3)] == [data.question(i).tolist() for i in (1, 0, 1)]
    assert picked.num_steps.tolist() == [0, 2, 0]


def test_word_tokenizer_decodes_known_words() -> None:
    text = [Example("Is Tom a cat, or (not)?", ("Tom is a dog.", "0 3 | 4 7"), "True")]
    tokenizer = build_word_tokenizer(text)
    written = "Tom is a dog.\nIs Tom a cat?\n### True"
    assert tokenizer.decode(tokenizer(written)["input_ids"]) == written
    add_special_tokens(tokenizer)
    data = tokenize([Example("Is Zoe a cat?", (), "True")], tokenizer)
    assert unknown_words(data, tokenizer) == 1
    assert unknown_words(tokenize(text, tokenizer), tokenizer) == 0


WRITTEN = [
    "2.5", "-3.5", "1,234.50", "$5.00", "10:30", "O'Neil", "x-y", "(x)", "C++", "a-1", "x = 2 , y=3",
    "Tom is a cat. Is Tom (not) a dog?", "a b  c\td ", " a\n\n  b \n", "#### 4\n### 3", "# #a ##",
    "a\r\nb\u2028c\u00a0d\x85e\x0cf\x1cg", "e\u0301 中文",
]  # fmt: skip
PIECES = sorted({*" \t\n\r\u2028\u00a0\x85\x0c\x1c", *re.findall(r"\w+|#+|[^\w\s]", " ".join(WRITTEN))})
WORDS = build_word_tokenizer([Example(text, (text,), text) for text in WRITTEN])


def decoded(tokenizer: Any, *rows: list[int]) -> str:
    return tokenizer.decode([token for row in rows for token in row], clean_up_tokenization_spaces=False)


@given(st.lists(st.sampled_from(PIECES)))
def test_word_tokenizer_round_trips_texts_of_known_words(pieces: list[str]) -> None:
    text = "".join(pieces)
    [ids] = encode_texts(WORDS, [text])
    if WORDS.unk_token_id not in ids:  # as in two words that have become one
        assert decoded(WORDS, ids) == text
        streamed = [decoded(WORDS, ids[:n]) for n in range(len(ids) + 1)]
        assert all(after.startswith(before) for before, after in pairwise(streamed)), "what was streamed stays"


@pytest.mark.parametrize("text", WRITTEN)
def test_word_tokenizer_round_trips_its_training_text(text: str) -> None:
    for form in (PromptFormat(), PromptFormat("{}", "{} ; ", "### {}"), PromptFormat("Q: {}", "<{}>", "so {}.")):
        if form.step_end[-1] == " " and " " in (text[0], text[-1]):
            continue  # where steps end in a space, one at the end of another text is left out
        tokenizer = build_word_tokenizer([Example(text, (text, "x"), text)], form)
        segments = [form.step.replace("{}", text), form.step.replace("{}", "x"), form.answer.replace("{}", text)]
        assert decoded(tokenizer, *encode_texts(tokenizer, segments)) == "".join(segments)


@pytest.mark.parametrize("steps", [("<<48/2=24>>", "<<48+24=72>>"), ("a. b.", ".5 more"), ("a", " b")])
def test_word_tokenizer_keeps_the_space_that_ends_a_step(steps: tuple[str, str]) -> None:
    form = PromptFormat("{}", "{} ", "### {}")
    tokenizer = build_word_tokenizer([Example("How many?", steps, "72")], form)
    segments = [*(form.fill(form.step, step) for step in steps), form.fill(form.answer, "72")]
    assert decoded(tokenizer, *encode_texts(tokenizer, segments)) == form.written(steps, "72")


def test_word_tokenizer_omits_unneeded_spacing_tokens() -> None:
    tokenizer = build_word_tokenizer([Example("0 3 | 3 4 ? 4 or 0 from 0", ("3", "4"), "4")], PromptFormat("{}", "{} "))
    assert len(tokenizer) == len(["<pad>", "<eos>", "<unk>", "0", "3", "4", "|", "?", "or", "from", "###"])
    usual, spaced, close = encode_texts(tokenizer, ["0 3 | 3 4 ?", " 0  3\t| 3 4 ? ", "0 3|3 4?"])
    assert usual == spaced == close
    assert tokenizer.unk_token_id not in usual


def test_private_use_characters_are_unknown_words() -> None:
    text = "1\ue000 2\ue001-\ue002"
    tokenizer = build_word_tokenizer([Example(text, (), "1-2")])
    [ids] = encode_texts(tokenizer, [text])
    assert ids.count(tokenizer.unk_token_id) == 3
    assert decoded(tokenizer, encode_texts(tokenizer, ["1-2"])[0]) == "1-2"


def test_word_tokenizer_is_saved_completely(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(examples())
    special = add_special_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert add_special_tokens(again) == special
    assert encode_texts(again, ["Tom is a <bot> dog.\n"]) == encode_texts(tokenizer, ["Tom is a <bot> dog.\n"])
    WORDS.save_pretrained(tmp_path / "words")
    again = AutoTokenizer.from_pretrained(tmp_path / "words")
    for text in WRITTEN:
        assert decoded(again, again(text)["input_ids"]) == text


CHAT = """{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor -%}
{% if add_generation_prompt %}<s>me:{% endif %}"""


def test_questions_are_put_into_the_chat_template() -> None:
    tokenizer = byte_level_tokenizer(start=True)
    asked = PromptFormat(question="{}", chat=True)
    with pytest.raises(ValueError, match="no chat template"):
        encode_questions(tokenizer, ["Is Tom a cat?"], asked)
    tokenizer.chat_template = CHAT
    (ids,) = encode_questions(tokenizer, ["Is <s> a cat?"], asked)
    assert tokenizer.decode(ids) == "<s>user: Is <s> a cat?</s><s>me:"
    start, end = token_ids(tokenizer, ["<s>", "</s>"])
    assert [i for i in ids if i in (start, end)] == [start, end, start], "the question's own stays text"
    data = tokenize([Example("Is <s> a cat?", ("Yes.",), "cat")], tokenizer, asked)
    assert data.question(0).tolist() == ids
    plain = tokenize([Example("Is <s> a cat?", ("Yes.",), "cat")], tokenizer, PromptFormat(question="{}"))
    assert plain.question(0).tolist() != ids
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[0].content }}"
    with pytest.raises(ValueError, match="contains the question 2 times"):
        encode_questions(tokenizer, ["Is Tom a cat?"], asked)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('the first message must be of the system') }}", "the first message must be of the system"),
        ("{{ messages[1].content }}", "UndefinedError: list object has no element 1"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
    ],
)
def test_failing_chat_template_is_reported(template: str, message: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.name_or_path = "someone/instruct"
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"(?s)chat template of someone/instruct .*{message}.*chat_template"):
        encode_questions(tokenizer, ["Is Tom a cat?"], PromptFormat(chat=True))


@given(
    st.lists(st.text(alphabet=" acTom?\n", min_size=1), min_size=1, max_size=3),
    st.sampled_from(["{}", "{} ", "{}\n", "{}\n\n", "{} ."]),
    st.sampled_from(["{} ", "{}\n", " {}."]),
)
def test_places_where_tokens_differ_from_those_of_the_whole_text(texts: list[str], question: str, step: str) -> None:
    tokenizer = byte_level_tokenizer()
    form = PromptFormat(question, step, "a {}")
    example = Example(texts[0], tuple(texts[1:]), "cat")
    segments = [question.replace("{}", texts[0]), *(step.replace("{}", text) for text in texts[1:]), "a cat"]
    apart, whole = encode_texts(tokenizer, segments), encode_texts(tokenizer, ["".join(segments)])[0]
    apart = [token for ids in apart for token in ids]
    places = written_otherwise([example], tokenizer, form)
    assert len(places) == (apart != whole)
    for ours, theirs in places:
        assert "".join(ours) == "".join(theirs)
        assert ours != theirs
        assert "".join(ours) in "".join(segments)


def test_a_space_at_the_end_of_a_part_is_joined_in_running_text() -> None:
    tokenizer = byte_level_tokenizer()
    asked = Example("How many?", ("Tom is a cat.",), "4")
    [(ours, theirs)] = written_otherwise([asked], tokenizer, PromptFormat("{} ", "{}\n", "### {}"))
    assert (ours[0], theirs[0][:2]) == (" ", " T")
    assert not written_otherwise([asked], tokenizer, PromptFormat("{}\n", "{}\n", "### {}"))
    assert not written_otherwise([], tokenizer, PromptFormat())
