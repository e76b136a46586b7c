"""The added tokens, and the tokenization of examples segment by segment.

Shapes: N examples; token arrays are flat, see `TokenizedData`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.data.datasets import cache_folder
from coconut.data.examples import Example
from coconut.data.word_tokenizer import word_level
from coconut.methods import PromptFormat, parse_mode
from coconut.utils.console import log
from coconut.utils.files import lone_surrogate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# --- tokens ---------------------------------------------------------------------------------------

ADDED_TOKENS = ("<bot>", "<eot>", "<latent>", "<pause>")


def rate_tokens(max_group: int) -> list[str]:
    """The tokens that say how many tokens of the chain a thought is merged from, 1 to `max_group`."""
    return [f"<rate_{group}>" for group in range(1, max_group + 1)]


@dataclass(frozen=True)
class SpecialIds:
    """Token ids: the four added tokens, end of sequence, padding, each mode's control token, `<rate_1>` and so on."""

    bot: int
    eot: int
    latent: int
    pause: int
    eos: int
    pad: int
    control: dict[str, int] = field(default_factory=dict)
    rates: list[int] = field(default_factory=list)

    @property
    def added(self) -> list[int]:
        return [self.bot, self.eot, self.latent, self.pause, *self.control.values(), *self.rates]


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """Add those of `<bot>`, `<eot>`, `<latent>`, `<pause>` that the tokenizer lacks, and return all ids.

    Raises ValueError if the tokenizer is not a fast one or has no end-of-sequence token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer; load one with a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could never learn to stop. "
            'Set one, for example tokenizer.eos_token = "</s>".'
        )
    add_as_special(tokenizer, ADDED_TOKENS)
    eos: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    bot, eot, latent, pause = token_ids(tokenizer, ADDED_TOKENS)
    return SpecialIds(bot, eot, latent, pause, eos, pad)


def add_as_special(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> None:
    """Add special tokens, which `encode_texts` never produces. Existing tokens become special and keep their ids."""
    from tokenizers import AddedToken

    added: list[Any] = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)


def add_control_tokens(tokenizer: PreTrainedTokenizerFast, special: SpecialIds, modes: Sequence[str]) -> SpecialIds:
    """Add those control tokens of these modes that the tokenizer lacks, and return all ids."""
    tokens = [parse_mode(name).token for name in modes]
    add_as_special(tokenizer, tokens)
    return replace(special, control={**special.control, **dict(zip(modes, token_ids(tokenizer, tokens), strict=True))})


def add_rate_tokens(tokenizer: PreTrainedTokenizerFast, special: SpecialIds, max_group: int) -> SpecialIds:
    """Add those tokens of the rates 1 to `max_group` that the tokenizer lacks, and return all ids."""
    tokens = rate_tokens(max(max_group, len(special.rates)))
    add_as_special(tokenizer, tokens)
    return replace(special, rates=token_ids(tokenizer, tokens))


def token_ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    """The id of each token."""
    ids: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    return ids


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text. The name of a special token inside a text is encoded as ordinary text.

    Raises ValueError for half of a surrogate pair, which UTF-8 cannot encode.
    """
    return _encode(tokenizer, texts)["input_ids"] if texts else []


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], **options: Any) -> Any:
    try:
        return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, **options)
    except TypeError:
        if (broken := lone_surrogate(list(texts))) is None:
            raise
        raise ValueError(f"Half of a surrogate pair cannot be encoded: {broken!a}") from None


def encode_answers(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[str], prompt_format: PromptFormat
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each answer as in training, and how many precede the first with a character of the answer itself.

    The last of those is the answer's prompt token: from its hidden state the answer is predicted. With a tokenizer
    that joins a word to the space before it (GPT-2) it is the mark's last token, with one that writes a space of its
    own (Llama before a digit) the space. There is none if the format has no text before the answer.
    """
    if not answers:
        return [], []
    before, _ = prompt_format.answer.split("{}")
    texts = [PromptFormat.fill(prompt_format.answer, answer) for answer in answers]
    encoded = _encode(tokenizer, texts, return_offsets_mapping=True)
    marks = [sum(end <= len(before) for _, end in spans) for spans in encoded["offset_mapping"]]
    eos: Any = tokenizer.eos_token_id
    return [[*ids, eos] for ids in encoded["input_ids"]], marks


def answer_mark_ids(tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat) -> list[int]:
    """Token ids of the text before an answer, without the white space and the tokens that reach into what follows it.

    A model that has learned to write answers goes on as after the whole text, whether a tokenizer joins the space to
    the answer or not. Empty if the format has no mark.
    """
    before = prompt_format.answer.split("{}")[0]
    encoded = _encode(tokenizer, [before + "0"], return_offsets_mapping=True)
    spans = zip(encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True)
    return [token for token, (_, end) in spans if end <= len(before.rstrip())]


def encode_questions(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], prompt_format: PromptFormat
) -> list[list[int]]:
    """Token ids of questions as a model reads them: in the chat template, or after the tokenizer's start tokens."""
    before, after = around_questions(tokenizer, prompt_format)
    texts = [PromptFormat.fill(prompt_format.question, question) for question in questions]
    return [before + ids + after for ids in encode_texts(tokenizer, texts)]


def around_questions(tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat) -> tuple[list[int], list[int]]:
    """Token ids before and after every question: the chat template's, or the tokenizer's start tokens.

    Raises ValueError if the chat template is missing, fails, or does not contain the question exactly once.
    """
    if not prompt_format.chat:
        return _start_ids(tokenizer), []
    before, after = _around_messages(tokenizer, ["user"])
    return before, after


def encode_chat(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[tuple[str, str]], prompt_format: PromptFormat
) -> list[int]:
    """Token ids of a conversation, pairs of role and text, in the tokenizer's chat template, up to the answer.

    Of a single user's message they are those of `encode_questions`. The name of a special token inside a message is
    encoded as ordinary text. Raises ValueError as `around_questions` does.
    """
    around = _around_messages(tokenizer, [role for role, _ in messages])
    texts = [PromptFormat.fill(prompt_format.question, text) if role == "user" else text for role, text in messages]
    inside = [*encode_texts(tokenizer, texts), []]
    return [token for before, ids in zip(around, inside, strict=True) for token in (*before, *ids)]


def _around_messages(tokenizer: PreTrainedTokenizerFast, roles: Sequence[str]) -> list[list[int]]:
    """Token ids of the chat template before each of the messages of these roles, and after the last."""
    if not tokenizer.chat_template:
        raise ValueError(
            "data.format.chat=true, but the tokenizer has no chat template. Use that of an instruct model."
        )
    placeholders = [
        f"[the {'question' if role == 'user' else role} stands here{' ' * n}]" for n, role in enumerate(roles)
    ]
    messages = [{"role": role, "content": text} for role, text in zip(roles, placeholders, strict=True)]
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template's own code raises
        what = "a single user message" if len(roles) == 1 else f"messages of {', '.join(roles)}"
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path or 'the tokenizer'} fails for {what} with "
            f"{type(error).__name__}: {error}\nFix the template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json) in a copy of the folder, or set data.format.chat=false."
        ) from error
    parts, rest = [], text
    for role, placeholder in zip(roles, placeholders, strict=True):
        if text.count(placeholder) != 1 or placeholder not in rest:
            name = "question" if role == "user" else f"message of {role}"
            raise ValueError(
                f"The tokenizer's chat template contains the {name} {text.count(placeholder)} times, not once and in "
                f"its place: {text!r}"
            )
        before, rest = rest.split(placeholder)
        parts.append(before)
    return [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (*parts, rest)]


def _start_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that the tokenizer puts before a text, without an end-of-sequence token that it puts after it."""
    encoded: Any = tokenizer("", add_special_tokens=True)["input_ids"]
    ids = list(encoded)
    if ids and ids[-1] == tokenizer.eos_token_id and (len(ids) > 1 or tokenizer.bos_token_id != ids[-1]):
        ids.pop()
    return ids


@dataclass(frozen=True)
class TokenizedData:
    """The tokens of N examples in flat arrays.

    `tokens`: all token ids, one example after the other; each is question, steps, answer with the end-of-sequence
    token. `bounds`: the end of each segment in `tokens`; example i has the segments `first[i] .. first[i + 1] - 1`.
    `starts`: the start of each example in `tokens`, (N + 1,). `answer_marks` (N,): how many tokens of the answer's
    segment precede the answer itself (`encode_answers`).
    """

    tokens: np.ndarray
    bounds: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    answer_marks: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def num_steps(self) -> np.ndarray:
        """(N,) number of steps of each example."""
        return np.diff(self.first) - 2

    @property
    def question_lengths(self) -> np.ndarray:
        """(N,) number of tokens of each question."""
        return self.bounds[self.first[:-1]] - self.starts[:-1]

    def question(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.bounds[self.first[index]]]

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedData:
        """The examples at these indices, in this order."""
        rows = [self.tokens[self.starts[i] : self.starts[i + 1]] for i in indices]
        lengths = [np.diff(self.bounds[self.first[i] : self.first[i + 1]], prepend=self.starts[i]) for i in indices]
        return TokenizedData.from_lists(rows, lengths, self.answer_marks[np.asarray(indices, np.int64)])

    @classmethod
    def from_lists(
        cls, tokens: Sequence[Any], lengths: Sequence[Any], answer_marks: np.ndarray | None = None
    ) -> TokenizedData:
        """Build from lists. `tokens[i]`: all ids of example i; `lengths[i]`: the length of each of its segments.

        Without `answer_marks` no answer has tokens before it.
        """
        if not len(tokens):
            empty = np.zeros(0, np.int64)
            return cls(empty.astype(np.int32), empty, np.zeros(1, np.int64), np.zeros(1, np.int64), empty)
        return cls.from_flat(
            np.concatenate([np.asarray(row, np.int32) for row in tokens]),
            np.array([len(row) for row in tokens]),
            np.concatenate([np.asarray(row, np.int64) for row in lengths]),
            np.array([len(row) for row in lengths]),
            np.zeros(len(tokens), np.int64) if answer_marks is None else answer_marks,
        )

    @classmethod
    def from_flat(
        cls,
        tokens: np.ndarray,
        num_tokens: np.ndarray,
        lengths: np.ndarray,
        num_segments: np.ndarray,
        answer_marks: np.ndarray,
    ) -> TokenizedData:
        return cls(
            tokens=tokens,
            bounds=np.cumsum(lengths, dtype=np.int64),
            first=np.concatenate([[0], np.cumsum(num_segments, dtype=np.int64)]),
            starts=np.concatenate([[0], np.cumsum(num_tokens, dtype=np.int64)]),
            answer_marks=answer_marks.astype(np.int64),
        )


CACHE_FORMAT = 2  # of the token cache; counts up when its columns change


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    prompt_format: PromptFormat | None = None,
    cache_dir: Path | str | None = None,
) -> TokenizedData:
    """Encode every segment by itself. The result is cached on disk, in Arrow files of `datasets` under `cache_dir`."""
    import datasets

    prompt_format = prompt_format or PromptFormat()
    (before, after), eos = around_questions(tokenizer, prompt_format), tokenizer.eos_token_id

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts: list[str] = []
        for question, steps, answer in zip(batch["question"], batch["steps"], batch["answer"], strict=True):
            texts.extend(_segments(question, steps, answer, prompt_format)[:-1])
        ids = iter(encode_texts(tokenizer, texts))
        answers, marks = encode_answers(tokenizer, batch["answer"], prompt_format)
        rows, lengths = [], []
        for steps, answer in zip(batch["steps"], answers, strict=True):
            segments = [before + next(ids) + after, *(next(ids) for _ in steps), answer]
            rows.append([token for segment in segments for token in segment])
            lengths.append([len(segment) for segment in segments])
        return {"tokens": rows, "lengths": lengths, "answer_mark": marks}

    content = hashlib.sha256(json.dumps(asdict(prompt_format)).encode())
    content.update(tokenizer.backend_tokenizer.to_str().encode())
    rows = [[e.question, e.steps, e.answer] for e in examples]
    content.update(json.dumps([CACHE_FORMAT, before, after, eos, rows]).encode())
    key = content.hexdigest()[:32]
    file = cache_folder(cache_dir, "tokens") / f"{key}.arrow"
    if file.is_file() and not _has_rows(file, len(examples)):
        log(f"warning: the token cache {file} is damaged; the data are tokenized again.")
        file.unlink()

    text = datasets.Features(
        question=datasets.Value("string"),
        steps=datasets.List(datasets.Value("string")),
        answer=datasets.Value("string"),
    )
    integers = datasets.List(datasets.Value("int32"))
    with _quiet_datasets(datasets, quiet=len(examples) < 20_000):
        encoded = datasets.Dataset.from_dict(
            {
                "question": [e.question for e in examples],
                "steps": [list(e.steps) for e in examples],
                "answer": [e.answer for e in examples],
            },
            features=text,
        ).map(
            encode,
            batched=True,
            remove_columns=["question", "steps", "answer"],
            features=datasets.Features(tokens=integers, lengths=integers, answer_mark=datasets.Value("int32")),
            cache_file_name=str(file),
            new_fingerprint=key,
            desc="tokenizing",
        )
    table = encoded.data.table.combine_chunks()
    tokens, lengths, marks = (table.column(name).combine_chunks() for name in ("tokens", "lengths", "answer_mark"))
    return TokenizedData.from_flat(
        tokens.flatten().to_numpy(),
        tokens.value_lengths().to_numpy(),
        lengths.flatten().to_numpy(),
        lengths.value_lengths().to_numpy(),
        marks.to_numpy(),
    )


def _has_rows(file: Path, rows: int) -> bool:
    """Whether an Arrow file is complete: one that was cut off between two batches is readable, but has fewer rows."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
            return sum(batch.num_rows for batch in batches) == rows
    except (OSError, pyarrow.ArrowException):
        return False


def _segments(question: str, steps: Sequence[str], answer: str, prompt_format: PromptFormat) -> list[str]:
    """The texts of an example's segments: question, steps, answer."""
    fill = PromptFormat.fill
    chain = [fill(prompt_format.step, step) for step in steps]
    return [fill(prompt_format.question, question), *chain, fill(prompt_format.answer, answer)]


class _quiet_datasets:
    """Turn off the progress bar of `datasets`, for small data sets."""

    def __init__(self, datasets: Any, quiet: bool):
        self.datasets, self.quiet = datasets, quiet

    def __enter__(self) -> None:
        self.was_on = self.datasets.utils.logging.is_progress_bar_enabled()
        if self.quiet:
            self.datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if self.was_on:
            self.datasets.enable_progress_bars()


def written_otherwise(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, prompt_format: PromptFormat
) -> list[tuple[list[str], list[str]]]:
    """The places where tokens differ because question, steps and answer are encoded each by itself.

    For each example whose tokens differ from those of its whole text, at the first place of difference: the tokens of
    the segments and those of the whole, as text, up to where the two agree again.
    """
    segments = [_segments(e.question, e.steps, e.answer, prompt_format) for e in examples]
    wholes = _encode(tokenizer, ["".join(each) for each in segments], return_offsets_mapping=True) if segments else {}
    places = []
    for each, whole in zip(segments, wholes.get("offset_mapping", ()), strict=True):
        starts = accumulate(map(len, each), initial=0)
        parts = _encode(tokenizer, each, return_offsets_mapping=True)["offset_mapping"]
        apart = [(start + a, start + b) for start, spans in zip(starts, parts, strict=False) for a, b in spans]
        text, ends = "".join(each), sorted({end for _, end in apart} & {end for _, end in whole})
        for begin, end in pairwise([0, *ends]):
            ours, theirs = ([text[a:b] for a, b in spans if begin <= a < end] for spans in (apart, whole))
            if ours != theirs:
                places.append((ours, theirs))
                break
    return places


def unknown_words(data: TokenizedData, tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of unknown tokens in the data. 0 for byte-level tokenizers."""
    unknown = unknown_id(tokenizer)
    return 0 if unknown is None else int((data.tokens == unknown).sum())


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of the unknown token; None if the tokenizer can encode every text."""
    unknown: Any = tokenizer.unk_token_id
    return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown


def unknown_in(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The words of a text that the tokenizer encodes as unknown."""
    encoded: Any = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    unknown = unknown_id(tokenizer)
    return list(dict.fromkeys(text[start:end] for token, (start, end) in spans if token == unknown))


def build_word_tokenizer(examples: Iterable[Example], prompt_format: PromptFormat | None = None) -> Any:
    """A word-level tokenizer with the words of the examples, the most frequent first (see `word_tokenizer`)."""
    from transformers import PreTrainedTokenizerFast

    form = prompt_format or PromptFormat()
    segments = [_segments(example.question, example.steps, example.answer, form) for example in examples]
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level(segments, open_end=form.step_end.endswith(" ")),
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
    )  # fmt: skip
