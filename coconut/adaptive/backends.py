"""Backends that answer questions (a LatentLM, any causal LM, or a function), and the log of their answers.

A backend answers a batch of questions with the same settings and yields replies as they are done. `collect_answers`
asks it only for what is not in the log yet, so that an interrupted command resumes.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from coconut.adaptive.config import FunctionConfig
from coconut.adaptive.space import Settings, Space
from coconut.data.tokenization import encode_questions
from coconut.generation.generate import Generated, longest_first, pad_rows
from coconut.generation.room import room_for_question
from coconut.methods import PromptFormat
from coconut.models.latent_lm import LatentLM
from coconut.utils.console import progress_bar
from coconut.utils.files import explain_full_disk
from coconut.utils.pretrained import explain_load_errors, load_pretrained
from coconut.utils.torch_utils import seeded

CHUNK = 256  # questions of one call of a backend; a model's replies to them are logged together
SAMPLED = ("temperature", "top_p", "samples", "max_new_tokens")  # settings of every model backend


@dataclass(frozen=True)
class Reply:
    """The reply to one question: one text, or several samples, of which a judge takes the majority answer.

    passes: sequential forward passes, summed over the samples; a prompt or thoughts shared by samples count once.
    num_thoughts, modes, completion_ids: one for each text, where known; completion_ids has the end of the sequence
        unless the text was truncated.
    truncated: whether any text was ended by the token limit.
    """

    texts: tuple[str, ...]
    passes: float = 0.0
    num_thoughts: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    completion_ids: tuple[tuple[int, ...], ...] = ()
    truncated: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reply:
        converted = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{**converted, "completion_ids": tuple(map(tuple, values["completion_ids"]))})


class Backend(Protocol):
    """A source of answers. `name` identifies it in the log; `setting_names` are the settings that it accepts."""

    name: str
    setting_names: frozenset[str]

    def __call__(
        self, questions: Sequence[str], settings: Settings, seed: Sequence[int], /
    ) -> Iterator[Mapping[int, Reply]]:
        """Yield replies, by the indices of their questions, when done. Sampling depends on the arguments alone."""
        ...

    def fits(self, questions: Sequence[str], settings: Settings, /) -> list[bool]:
        """For each question, whether it leaves room for an answer in the model's context."""
        ...


class LatentBackend:
    """A LatentLM. Its settings: num_thoughts, mode, prefix (text before the question), and those of sampling."""

    setting_names = frozenset({"num_thoughts", "mode", "prefix", *SAMPLED})

    def __init__(self, lm: LatentLM, name: str, batch_size: int = 64, max_new_tokens: int | None = None):
        self.lm, self.name, self.batch_size, self.max_new_tokens = lm, name, batch_size, max_new_tokens

    def rows(self, questions: Sequence[str], settings: Settings) -> list[list[int]]:
        """The token ids of the questions, as prompts."""
        prefix = str(settings.get("prefix", ""))
        prompts = [f"{prefix} {question}" if prefix else question for question in questions]
        return encode_questions(self.lm.tokenizer, prompts, self.lm.reasoning.format)

    def fits(self, questions: Sequence[str], settings: Settings) -> list[bool]:
        room = room_for_question(self.lm, settings.get("num_thoughts"), settings.get("mode"))
        return [len(row) <= room for row in self.rows(questions, settings)]

    def __call__(self, questions: Sequence[str], settings: Settings, seed: Sequence[int]) -> Iterator[dict[int, Reply]]:
        rows, samples, options = self.rows(questions, settings), *generation_options(settings, self.max_new_tokens)
        options |= {key: settings[key] for key in ("num_thoughts", "mode") if settings.get(key) is not None}
        replies: dict[int, Reply] = {}
        with _seeded(seed, self.lm.device):
            for indices in longest_first(rows, self.batch_size):
                out = self.lm.generate(*pad_rows([rows[i] for i in indices], self.lm.special.pad), **options)
                replies |= {i: _reply(out, range(row * samples, (row + 1) * samples)) for row, i in enumerate(indices)}
        yield replies


def generation_options(settings: Settings, limit: int | None) -> tuple[int, dict[str, Any]]:
    """The number of samples, and the options for `generate`; greedy at temperature 0. `limit`: default new tokens."""
    temperature, samples = float(settings.get("temperature", 0)), int(settings.get("samples", 1))
    options: dict[str, Any] = {"max_new_tokens": settings.get("max_new_tokens", limit), "num_return_sequences": samples}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": float(settings.get("top_p", 1))}
    return samples, options


def _seeded(seed: Sequence[int], device: torch.device) -> AbstractContextManager[None]:
    """Seed sampling inside this context by these numbers; the random state outside is kept."""
    return seeded(int.from_bytes(hashlib.blake2b(repr(list(seed)).encode(), digest_size=7).digest()), device)


def _reply(out: Generated, rows: range) -> Reply:
    """The reply of one question, whose samples are in these rows.

    The prompt and its thoughts are computed once for all samples of a mode, and give the first token of each.
    """
    thoughts, modes = tuple(int(out.num_thoughts[row]) for row in rows), tuple(out.modes[row] for row in rows)
    of_text = [int(out.lengths[row]) + (not out.truncated[row]) for row in rows]
    before = (int(out.passes[row]) - text - bool(out.modes[row]) for row, text in zip(rows, of_text, strict=True))
    prompt_passes = sum(1 + passes for passes, *_ in set(zip(before, thoughts, modes, strict=True)))
    further_passes = sum(of_text) - len(of_text)
    return Reply(
        texts=tuple(out.texts[row].strip() for row in rows),
        passes=any(modes) + prompt_passes + further_passes,
        num_thoughts=thoughts,
        modes=modes,
        completion_ids=tuple(tuple(out.completion_ids(row)) for row in rows),
        truncated=any(bool(out.truncated[row]) for row in rows),
    )


class CausalModelBackend:
    """Any causal language model of Hugging Face. Its prompt is `prompt`, filled with the question and settings.

    With a chat template, the prompt is a user's message. Of the model's own generation settings only the
    end-of-sequence tokens are used. Every sample counts its own prompt pass.
    """

    def __init__(self, model_name: str, prompt: str, device: torch.device, batch_size: int = 64,
                 max_new_tokens: int | None = None):  # fmt: skip
        fields = _fields(prompt)
        with explain_load_errors(model_name, "base"):
            self.model = load_pretrained(AutoModelForCausalLM, model_name).to(device).eval()
            self.tokenizer = load_pretrained(AutoTokenizer, model_name)
        self.prompt, self.batch_size, self.max_new_tokens = prompt, batch_size, max_new_tokens or 128
        self.name = f"{model_name} {prompt}"
        self.setting_names = frozenset({*SAMPLED, *fields} - {"question"})
        self.format = PromptFormat(question="{}", chat=bool(self.tokenizer.chat_template))
        eos_ids = self.model.generation_config.eos_token_id
        eos_ids = self.tokenizer.eos_token_id if eos_ids is None else eos_ids
        self.model.generation_config = GenerationConfig()  # else generate would take unset options from it
        self.eos_ids = list(eos_ids) if isinstance(eos_ids, list) else [eos_ids]
        pad = self.tokenizer.pad_token_id
        self.pad = self.eos_ids[0] if pad is None else pad

    def rows(self, questions: Sequence[str], settings: Settings) -> list[list[int]]:
        """The token ids of the filled prompts."""
        prompts = [self.prompt.format(question=question, **settings) for question in questions]
        return encode_questions(self.tokenizer, prompts, self.format)

    def fits(self, questions: Sequence[str], settings: Settings) -> list[bool]:
        context = getattr(self.model.config, "max_position_embeddings", None)
        limit = settings.get("max_new_tokens", self.max_new_tokens)
        return [context is None or len(row) + limit <= context for row in self.rows(questions, settings)]

    def __call__(self, questions: Sequence[str], settings: Settings, seed: Sequence[int]) -> Iterator[dict[int, Reply]]:
        samples, options = generation_options(settings, self.max_new_tokens)
        options |= {"top_k": 0} if "do_sample" in options else {"do_sample": False}
        generation_config = GenerationConfig(**options, eos_token_id=self.eos_ids, pad_token_id=self.pad)
        rows, replies = self.rows(questions, settings), dict[int, Reply]()
        with _seeded(seed, self.model.device), torch.no_grad():
            for indices in longest_first(rows, self.batch_size):
                ids, mask = (t.to(self.model.device) for t in pad_rows([rows[i] for i in indices], self.pad))
                out = self.model.generate(ids, attention_mask=mask, generation_config=generation_config)
                completion_ids = [self._until_end(row) for row in out[:, ids.shape[1] :].tolist()]
                texts = [text.strip() for text in self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)]
                for row, i in enumerate(indices):
                    own = slice(row * samples, (row + 1) * samples)
                    ids_of_texts = tuple(map(tuple, completion_ids[own]))
                    truncated = any(ids[-1] not in self.eos_ids for ids in ids_of_texts)
                    passes = sum(map(len, ids_of_texts))
                    replies[i] = Reply(tuple(texts[own]), passes, completion_ids=ids_of_texts, truncated=truncated)
        yield replies

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids) - 1) + 1]


def _fields(prompt: str) -> set[str]:
    """The names of a prompt's fields. Raises ValueError if `question` is missing, or for braces that hold no name."""
    try:
        fields = {name for _, name, *_ in string.Formatter().parse(prompt) if name is not None}
    except ValueError:
        fields = {""}
    if not all(map(str.isidentifier, fields)):
        raise ValueError(
            f"prompt is {prompt!r}; braces must hold names of settings. Write {{{{ and }}}} for literal braces."
        )
    if "question" not in fields:
        raise ValueError(f"prompt is {prompt!r}; it must contain {{question}}.")
    return fields


def fit_all(backend: Backend, questions: Sequence[str], space: Space) -> list[bool]:
    """For each question, whether it leaves room for an answer in every configuration of the space."""
    columns = [backend.fits(questions, space.settings(number)) for number in range(len(space))]
    return [all(row) for row in zip(*columns, strict=True)]


class FunctionBackend:
    """Any function from a question and its settings to a text or a Reply, such as a call of an API.

    It is called from several threads, and again after an error. The words of a text count as its passes.
    """

    def __init__(self, function: Callable[[str, Settings], str | Reply], name: str, config: FunctionConfig,
                 takes: frozenset[str]):  # fmt: skip
        self.function, self.name, self.config, self.setting_names = function, name, config, takes

    def fits(self, questions: Sequence[str], settings: Settings) -> list[bool]:
        return [True] * len(questions)

    def __call__(self, questions: Sequence[str], settings: Settings, seed: Sequence[int]) -> Iterator[dict[int, Reply]]:
        pool = ThreadPoolExecutor(self.config.workers)
        failure: BaseException | None = None
        try:
            pending = {pool.submit(self._reply, question, settings): i for i, question in enumerate(questions)}
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    index = pending.pop(future)
                    if error := future.exception():
                        failure = failure or error
                        pending = {other: i for other, i in pending.items() if not other.cancel()}
                    else:
                        yield {index: future.result()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure:
            raise failure

    def _reply(self, question: str, settings: Settings) -> Reply:
        """Raises ValueError if the function failed in all its attempts, or returned no text."""
        result = self._call_with_retries(question, settings)
        if isinstance(result, str):
            return Reply((result,), len(result.split()))
        if not isinstance(result, Reply) or not result.texts:
            raise ValueError(
                f"{self.name} gave {result!r} for {question!r}; it must return a text or a Reply with texts."
            )
        return result

    def _call_with_retries(self, question: str, settings: Settings) -> Any:
        tries = self.config.tries
        for attempt in range(tries):
            try:
                return self.function(question, dict(settings))
            except Exception as error:
                if attempt + 1 == tries:
                    times, why = f"{tries} times" if tries > 1 else "once", f"{type(error).__name__}: {error}"
                    message = f"{self.name} failed {times} on {question!r}, the last time with {why}"
                    raise ValueError(message) from error
            time.sleep(self.config.wait * 2**attempt * random.uniform(0.75, 1.25))


def refuse_unknown(space: Space, backend: Backend) -> None:
    """Raise ValueError for settings of the space that the backend does not accept, for a field of the prompt that the
    space does not set, and for several samples without a temperature.
    """
    if unknown := space.keys - backend.setting_names:
        raise ValueError(
            f"The space sets {', '.join(sorted(unknown))}, which {backend.name} does not accept. It accepts "
            f"{', '.join(sorted(backend.setting_names))}."
        )
    if isinstance(backend, CausalModelBackend) and (missing := backend.setting_names - set(SAMPLED) - space.keys):
        raise ValueError(
            f"The prompt contains {{{min(missing)}}}, which the space does not set. Add +space.{min(missing)}=[...]."
        )
    for number in range(len(space) if not isinstance(backend, FunctionBackend) else 0):
        settings = space.settings(number)
        if settings.get("samples", 1) > 1 and not settings.get("temperature"):
            raise ValueError(
                f"{space.label(number)}: {settings['samples']} samples without a temperature are identical. Set both "
                "in one dimension: {greedy: {temperature: 0}, vote: {temperature: 1, samples: 5}}."
            )


def collect_answers(
    backend: Backend, questions: Sequence[str], space: Space, log: Path, *, seed: int = 0, chunk: int = CHUNK
) -> list[list[Reply]]:
    """The reply to each question in each configuration of the space, from the log if it is there.

    New replies are appended to the log, a line of JSON each. The key is a hash of backend, question, settings and seed,
    so that replies stay valid when other configurations of the space change. Raises ValueError if the backend fails;
    replies so far stay in the log.
    """
    refuse_unknown(space, backend)
    logged, each_settings = read_log(log), [space.settings(number) for number in range(len(space))]
    keys = [[_key(backend.name, question, settings, seed) for settings in each_settings] for question in questions]
    needed = {key for row in keys for key in row}
    total, num_done = len(needed), len(needed & logged.keys())
    log.parent.mkdir(parents=True, exist_ok=True)
    progress = progress_bar("asking", total, num_done)
    with explain_full_disk(log), log.open("a", encoding="utf-8") as file, progress as bar:
        if file.tell() and not log.read_bytes().endswith(b"\n"):
            file.write("\n")  # end a line that a killed process left unfinished
        for number, settings in enumerate(each_settings):
            for first in range(0, len(questions), chunk):
                part = range(first, min(first + chunk, len(questions)))
                indices = list({keys[i][number]: i for i in part if keys[i][number] not in logged}.values())
                if not indices:
                    continue
                stream = (seed, first, int(_key("", "", settings, 0), 16))
                try:
                    for replies in backend([questions[i] for i in indices], settings, stream):
                        new = {keys[indices[index]][number]: reply for index, reply in replies.items()}
                        rows = ({"key": key, **asdict(reply)} for key, reply in new.items())
                        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                        file.flush()
                        logged |= new
                        num_done += len(new)
                        bar(num_done, space.label(number))
                except Exception as error:
                    raise ValueError(
                        f"With {space.label(number)}: {error}\n{num_done:,} of {total:,} answers are in {log}; the "
                        "same command resumes from there."
                    ) from error
    return [[logged[key] for key in row] for row in keys]


def _key(name: str, question: str, settings: Settings, seed: int) -> str:
    key_text = json.dumps([name, question, settings, seed], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(key_text.encode()).hexdigest()[:24]


def read_log(log: Path) -> dict[str, Reply]:
    """The replies in a log by their keys. A line that a killed process left unfinished is skipped."""
    replies: dict[str, Reply] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            key = row.pop("key")
            replies[key] = Reply.from_dict(row)
    return replies
