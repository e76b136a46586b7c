"""Who answers: a model that thinks, any causal language model, or a function; and how answers are kept.

A backend is asked many questions with the same settings, and hands back what it has as it comes. `answers` asks it
everything that is not in the log yet, so that nothing is asked twice, whatever stopped the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from coconut.adaptive.config import FunctionConfig
from coconut.adaptive.space import Settings, Space
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import room_for_question
from coconut.generation.generate import Generated, forward_passes, longest_first, pad_rows
from coconut.methods import PromptFormat
from coconut.utils.console import progress_bar
from coconut.utils.files import explain_full_disk
from coconut.utils.pretrained import explain_load_errors, load_pretrained
from coconut.utils.torch_utils import seeded

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

CHUNK = 256  # questions of one call; a model's answers to them are kept together
SAMPLED = ("temperature", "top_p", "samples", "max_new_tokens")  # settings of every model


@dataclass(frozen=True)
class Reply:
    """What came of a question. Several `texts` are samples, of which a judge takes the answer with most votes.

    `passes`: forward passes one after the other, over all samples; what is read or thought once for all counts once.
    Of each text, where it is known: `said`, its tokens with the end of the sequence unless it was cut off; how many
    thoughts came before it; its mode. `cut`: whether a limit ended any of them.
    """

    texts: tuple[str, ...]
    passes: float = 0.0
    num_thoughts: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    completion_ids: tuple[tuple[int, ...], ...] = ()
    truncated: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reply:
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**{**told, "completion_ids": tuple(map(tuple, values["completion_ids"]))})


class Backend(Protocol):
    """`name` tells it from others in the log of answers; `takes` are the settings that it knows."""

    name: str
    takes: frozenset[str]

    def __call__(
        self, questions: Sequence[str], settings: Settings, seed: Sequence[int], /
    ) -> Iterator[Mapping[int, Reply]]:
        """Replies by the places of their questions, as they come. What is sampled depends on the arguments alone."""
        ...

    def fits(self, questions: Sequence[str], settings: Settings, /) -> list[bool]:
        """Which of the questions leave room for an answer."""
        ...


class LatentBackend:
    """A LatentLM. Settings: num_thoughts, mode, prefix (text before the question), and those of sampling."""

    takes = frozenset({"num_thoughts", "mode", "prefix", *SAMPLED})

    def __init__(self, lm: LatentLM, name: str, batch_size: int = 64, max_new_tokens: int | None = None):
        self.lm, self.name, self.batch_size = lm, name, batch_size
        self.max_new_tokens = max_new_tokens

    def rows(self, questions: Sequence[str], settings: Settings) -> list[list[int]]:
        """The questions as they are asked, in tokens."""
        prefix = str(settings.get("prefix", ""))
        asked = [f"{prefix} {question}" if prefix else question for question in questions]
        return encode_questions(self.lm.tokenizer, asked, self.lm.reasoning.format)

    def fits(self, questions: Sequence[str], settings: Settings) -> list[bool]:
        room = room_for_question(self.lm, settings.get("num_thoughts"), settings.get("mode"))
        return [len(row) <= room for row in self.rows(questions, settings)]

    def __call__(self, questions: Sequence[str], settings: Settings, seed: Sequence[int]) -> Iterator[dict[int, Reply]]:
        rows, samples, options = self.rows(questions, settings), *generation(settings, self.max_new_tokens)
        options |= {key: settings[key] for key in ("num_thoughts", "mode") if settings.get(key) is not None}
        found: dict[int, Reply] = {}
        with _seeded(seed, self.lm.device):
            for places in longest_first(rows, self.batch_size):
                out = self.lm.generate(*pad_rows([rows[i] for i in places], self.lm.special.pad), **options)
                found |= {i: _reply(out, range(row * samples, (row + 1) * samples)) for row, i in enumerate(places)}
        yield found


def generation(settings: Settings, limit: int | None) -> tuple[int, dict[str, Any]]:
    """How many samples, and the options of generation: greedy at temperature 0."""
    temperature, samples = float(settings.get("temperature", 0)), int(settings.get("samples", 1))
    options: dict[str, Any] = {"max_new_tokens": settings.get("max_new_tokens", limit), "num_return_sequences": samples}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_p": float(settings.get("top_p", 1))}
    return samples, options


@contextlib.contextmanager
def _seeded(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Sampling in here depends on these numbers alone, and no other sampling on it."""
    digest = hashlib.blake2b(repr(list(seed)).encode(), digest_size=7).digest()
    with seeded(int.from_bytes(digest), device):
        yield


def _reply(out: Generated, rows: range) -> Reply:
    """Of the samples to one question in these rows.

    Its prompt, with the thoughts in it, is read once for all samples of a mode, and gives the first token of each.
    """
    thoughts, modes = tuple(int(out.num_thoughts[row]) for row in rows), tuple(out.modes[row] for row in rows)
    further = sum(forward_passes(int(out.lengths[row]), bool(out.truncated[row]), 0, "") - 1 for row in rows)
    prompts = sum(forward_passes(1, True, count, "") for count, _ in set(zip(thoughts, modes, strict=True)))
    return Reply(
        texts=tuple(out.texts[row].strip() for row in rows),
        passes=any(modes) + prompts + further,
        num_thoughts=thoughts,
        modes=modes,
        completion_ids=tuple(tuple(out.completion_ids(row)) for row in rows),
        truncated=any(bool(out.truncated[row]) for row in rows),
    )


class CausalModelBackend:
    """Any causal language model of Hugging Face. What it reads is `prompt`, filled with the question and settings.

    A model with a chat template is told it as what a user says. Of its own generation settings only where a text ends
    is kept. Each of several samples reads the prompt by itself.
    """

    def __init__(self, place: str, prompt: str, device: torch.device, batch_size: int = 64,
                 max_new_tokens: int | None = None):  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        fields = _fields(prompt)
        with explain_load_errors(place, "base"):
            self.model = load_pretrained(AutoModelForCausalLM, place).to(device).eval()
            self.tokenizer = load_pretrained(AutoTokenizer, place)
        self.prompt, self.batch_size, self.max_new_tokens = prompt, batch_size, max_new_tokens or 128
        self.name = f"{place} {prompt}"
        self.takes = frozenset({*SAMPLED, *fields} - {"question"})
        self.form = PromptFormat(question="{}", chat=bool(self.tokenizer.chat_template))
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.model.generation_config = GenerationConfig()  # it would fill in what is not asked for
        self.ends = list(ends) if isinstance(ends, list) else [ends]
        pad = self.tokenizer.pad_token_id
        self.pad = self.ends[0] if pad is None else pad

    def rows(self, questions: Sequence[str], settings: Settings) -> list[list[int]]:
        """What it reads, in tokens."""
        asked = [self.prompt.format(question=question, **settings) for question in questions]
        return encode_questions(self.tokenizer, asked, self.form)

    def fits(self, questions: Sequence[str], settings: Settings) -> list[bool]:
        context = getattr(self.model.config, "max_position_embeddings", None)
        limit = settings.get("max_new_tokens", self.max_new_tokens)
        return [context is None or len(row) + limit <= context for row in self.rows(questions, settings)]

    def __call__(self, questions: Sequence[str], settings: Settings, seed: Sequence[int]) -> Iterator[dict[int, Reply]]:
        from transformers import GenerationConfig

        samples, options = generation(settings, self.max_new_tokens)
        rows = self.rows(questions, settings)
        asked = GenerationConfig(**{"do_sample": False, **options}, eos_token_id=self.ends, pad_token_id=self.pad)
        if asked.do_sample:
            asked.top_k = 0
        found: dict[int, Reply] = {}
        with _seeded(seed, self.model.device), torch.no_grad():
            for places in longest_first(rows, self.batch_size):
                ids, mask = (t.to(self.model.device) for t in pad_rows([rows[i] for i in places], self.pad))
                out = self.model.generate(ids, attention_mask=mask, generation_config=asked)
                said = [self._until_end(row) for row in out[:, ids.shape[1] :].tolist()]
                for row, i in enumerate(places):
                    its = said[row * samples : (row + 1) * samples]
                    texts = self.tokenizer.batch_decode(its, skip_special_tokens=True)
                    cut = any(one[-1] not in self.ends for one in its)
                    told = tuple(text.strip() for text in texts)
                    found[i] = Reply(told, sum(map(len, its)), completion_ids=tuple(map(tuple, its)), truncated=cut)
        yield found

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids) - 1) + 1]


def _fields(prompt: str) -> set[str]:
    """What is to be filled into it. Raises ValueError if the question is not, or if a brace is no field's."""
    try:
        fields = {name for _, name, *_ in string.Formatter().parse(prompt) if name is not None}
        good = all(name.isidentifier() for name in fields)
    except ValueError:
        good, fields = False, set()
    if not good:
        raise ValueError(
            f"prompt is {prompt!r}; braces hold names of settings. Write {{{{ and }}}} for braces themselves."
        )
    if "question" not in fields:
        raise ValueError(f"prompt is {prompt!r}; the question must stand in it: {{question}}.")
    return fields


def fit_all(backend: Backend, questions: Sequence[str], space: Space) -> list[bool]:
    """Which of the questions leave room for an answer in every configuration."""
    columns = [backend.fits(questions, space.settings(number)) for number in range(len(space))]
    return [all(row) for row in zip(*columns, strict=True)]


class Failed(ValueError):
    """A function did not answer, as often as it was tried."""


class FunctionBackend:
    """Any function from a question and its settings to a text, or to a Reply: an API model, for instance.

    It is called from several threads. A text's passes are counted as its words.
    """

    def __init__(self, function: Callable[[str, Settings], str | Reply], name: str, config: FunctionConfig,
                 takes: frozenset[str]):  # fmt: skip
        self.function, self.name, self.config, self.takes = function, name, config, takes

    def fits(self, questions: Sequence[str], settings: Settings) -> list[bool]:
        return [True] * len(questions)

    def __call__(self, questions: Sequence[str], settings: Settings, seed: Sequence[int]) -> Iterator[dict[int, Reply]]:
        pool = ThreadPoolExecutor(self.config.workers)
        failure: BaseException | None = None
        try:
            pending = {pool.submit(self._reply, question, settings): i for i, question in enumerate(questions)}
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    place = pending.pop(future)
                    if error := future.exception():
                        failure = failure or error
                        pending = {other: i for other, i in pending.items() if not other.cancel()}
                    else:
                        yield {place: future.result()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure:
            raise failure

    def _reply(self, question: str, settings: Settings) -> Reply:
        found = self._tried(question, settings)
        if isinstance(found, str):
            return Reply((found,), len(found.split()))
        if not isinstance(found, Reply) or not found.texts:
            raise Failed(f"{self.name} gave {found!r} for {question!r}; it must give a text.")
        return found

    def _tried(self, question: str, settings: Settings) -> Any:
        for attempt in range(1, self.config.tries):
            with contextlib.suppress(Exception):
                return self.function(question, dict(settings))
            time.sleep(self.config.wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        try:
            return self.function(question, dict(settings))
        except Exception as error:
            tries = self.config.tries
            times = f"{tries} times" if tries > 1 else "once"
            told = f"{type(error).__name__}: {error}"
            raise Failed(f"{self.name} failed {times} on {question!r}, the last time with {told}") from error


def refuse_unknown(space: Space, backend: Backend) -> None:
    """Raises ValueError for a setting in the space that the backend does not know, or that its prompt lacks, and for
    samples without a temperature.
    """
    if unknown := space.keys - backend.takes:
        raise ValueError(
            f"The space sets {', '.join(sorted(unknown))}, which means nothing here. {backend.name} takes "
            f"{', '.join(sorted(backend.takes))}."
        )
    if isinstance(backend, CausalModelBackend) and (open_ := backend.takes - set(SAMPLED) - space.keys):
        raise ValueError(f"The prompt has {{{min(open_)}}} in it, and no dimension of the space gives it a value.")
    for number in range(len(space) if not isinstance(backend, FunctionBackend) else 0):
        settings = space.settings(number)
        if settings.get("samples", 1) > 1 and not settings.get("temperature"):
            raise ValueError(
                f"{space.label(number)}: {settings['samples']} samples without a temperature are the same answer so "
                "often. Let one dimension set both: {greedy: {temperature: 0}, vote: {temperature: 1, samples: 5}}."
            )


def answers(
    backend: Backend, questions: Sequence[str], space: Space, log: Path, *, seed: int = 0, chunk: int = CHUNK
) -> list[list[Reply]]:
    """What comes of each question in each configuration, from the log or asked now, and then in the log.

    The log is a line of JSON for each answer, under a key of backend, question, settings and seed: an answer is found
    again when the space has changed around it. Raises ValueError if the backend fails; what came before is kept.
    """
    refuse_unknown(space, backend)
    known = read_log(log)
    keys = [
        [_key(backend.name, question, space.settings(c), seed) for c in range(len(space))] for question in questions
    ]
    wanted = len({key for row in keys for key in row})
    log.parent.mkdir(parents=True, exist_ok=True)

    def done() -> int:
        return len({key for row in keys for key in row if key in known})

    with (
        explain_full_disk(log),
        log.open("a", encoding="utf-8") as file,
        progress_bar("asking", wanted, have := done()) as bar,
    ):
        if file.tell() and not log.read_bytes().endswith(b"\n"):
            file.write("\n")  # after a line that was cut off
        for number in range(len(space)):
            settings = space.settings(number)
            for first in range(0, len(questions), chunk):
                part = range(first, min(first + chunk, len(questions)))
                places = list({keys[i][number]: i for i in part if keys[i][number] not in known}.values())
                if not places:
                    continue
                stream = (seed, first, int(_key("", "", settings, 0), 16))
                try:
                    for found in backend([questions[i] for i in places], settings, stream):
                        new = {keys[places[place]][number]: reply for place, reply in found.items()}
                        file.write("".join(_line(key, reply) for key, reply in new.items()))
                        file.flush()
                        known |= new
                        have += len(new)
                        bar(have, space.label(number))
                except Exception as error:
                    raise ValueError(
                        f"With {space.label(number)}: {error}\n{done():,} of {wanted:,} answers are kept in {log}; "
                        "the same command goes on from there."
                    ) from error
    return [[known[key] for key in row] for row in keys]


def _key(name: str, question: str, settings: Settings, seed: int) -> str:
    told = json.dumps([name, question, settings, seed], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(told.encode()).hexdigest()[:24]


def _line(key: str, reply: Reply) -> str:
    return json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"


def read_log(log: Path) -> dict[str, Reply]:
    """The answers in it. A line that a killed process left unfinished is none."""
    found: dict[str, Reply] = {}
    if log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            key = row.pop("key")
            found[key] = Reply.from_dict(row)
    return found
