"""A LatentLM as the model `coconut` of lm-evaluation-harness (EleutherAI, version 0.4.13).

Importing this module registers the model. docs/evaluation.md says what each kind of request measures.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from coconut.config import EngineConfig, Precision
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import around_questions, encode_answers, encode_texts
from coconut.engine.base import autocast
from coconut.engine.launcher_env import read_launcher_env
from coconut.evaluation.suite import weights_digest
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.room import room_for_question
from coconut.methods import PromptFormat
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import target_log_probs
from coconut.runs.loading import load_model
from coconut.utils.console import log

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

MODEL = "coconut"
FINGERPRINT = "fingerprint of the model"  # the key under which a cache of answers names the model


class Wording(StrEnum):
    """How the text of a task becomes a prompt."""

    trained = "trained"  # a context is a question, a continuation an answer, both in the format of the training data
    raw = "raw"  # the text as it is; the names of special tokens in it are these tokens, as in a chat template


class CoconutLM(TemplateLM):
    """The model of a run or a saved one, with its thoughts between a prompt and what follows it.

    `path`: a run, a saved model, or OWNER/NAME on the hub; `checkpoint`: of a run. `format`: a `Wording`.
    `num_thoughts`, `mode`: as in `LatentLM.generate`. `max_length`: of prompt, thoughts and answer together, by default
    the model's context. `device`: without CUDA, a name of a CUDA device counts as "auto", since the harness passes
    cuda:0 where none was named. Raises ValueError for settings that do not exist or do not fit the model, and under a
    launcher of several processes.
    """

    def __init__(
        self, path: str = "", checkpoint: str | int = "best", *, format: str = Wording.trained,
        num_thoughts: int | None = None, mode: str | None = None, max_length: int | None = None,
        batch_size: int | str = 64, device: str | None = None, precision: str = Precision.float32, **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        _refuse_several_processes()
        _refuse_wrong_names(path, unknown)
        self.wording, self.precision = (
            _member(kind, name, given)
            for kind, name, given in ((Wording, "format", format), (Precision, "precision", precision))
        )
        self.batch_size = _whole("batch_size", batch_size)
        self.lm = load_model(str(path), str(checkpoint), EngineConfig(device=_usable(device)))
        self.num_thoughts, self.mode = _fitting(self.lm, num_thoughts, mode)
        context = self.lm.max_sequence_length
        self.max_length = context if max_length is None else min(_whole("max_length", max_length), context)
        self.room = room_for_question(self.lm, self.num_thoughts, mode) - (context - self.max_length)
        self._shortened = 0  # prompts since the last warning
        self.tokenizer = self.lm.tokenizer
        self._device = self.lm.device

    @property
    def eot_token_id(self) -> int:
        return self.lm.special.eos

    @property
    def prefix_token_id(self) -> int:
        start: Any = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    # --- what the harness tells models and settings apart by ------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """A name for the prompts that the harness caches; it differs wherever answers may."""
        return f"{MODEL}-{self.fingerprint}"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides an answer: the weights, the reasoning, and the settings."""
        facts = [
            weights_digest(self.lm), self.num_thoughts, self.mode, self.max_length, self.wording, self.precision,
            self.tokenizer.chat_template,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the arguments."""
        return {
            "weights": self.lm.base.name_or_path,
            "model_num_parameters": sum(weight.numel() for weight in self.lm.parameters()),
            "reasoning": self.lm.reasoning.as_dict(),
            "fingerprint": self.fingerprint,
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take part in --use_cache, whose keys are requests alone. Raises ValueError if another model filled it."""
        super().set_cache_hook(cache_hook)
        cache: Any = cache_hook.dbdict
        if cache is None:
            return
        if not len(cache):
            cache[FINGERPRINT] = self.fingerprint
        if cache.get(FINGERPRINT) != self.fingerprint:
            raise ValueError(
                f"The cache {cache.filename} holds answers of another model, of another checkpoint or with other "
                "settings. Name another file with --use_cache."
            )

    # --- prompts --------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as a prompt. Raises ValueError if the prompt would be put into the trained format again."""
        if self.wording is Wording.trained:
            raise ValueError(
                "--apply_chat_template writes whole prompts, and format=trained would put them into the model's own "
                f"format, {self.lm.reasoning.format}. Leave one of them out: add format=raw to --model_args, or do "
                "without the template."
            )
        text: Any = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text as it is, by default after the tokenizer's start tokens.

        Raises ValueError if the text names one of the tokens that this package adds.
        """
        encoded: Any = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        if ours := set(encoded) & set(self.lm.special.added):
            raise ValueError(
                f"The text {string!r} names {self.tokenizer.convert_ids_to_tokens(sorted(ours))}, which this package "
                "puts between prompt and answer itself. Use format=trained, which reads them as ordinary text."
            )
        start = [] if add_special_tokens is False else around_questions(self.tokenizer, PromptFormat())[0]
        return encoded if encoded[: len(start)] == start else [*start, *encoded]

    def _prompt(self, context: str, room: int) -> list[int]:
        """Token ids of a context, of at most `room` tokens."""
        if self.wording is Wording.raw:
            return self._cut(self.tok_encode(context), room)
        form = self.lm.reasoning.format
        before, after = around_questions(self.tokenizer, form)
        ids = encode_texts(self.tokenizer, [PromptFormat.fill(form.question, context)])[0]
        return before + self._cut(ids, room - len(before) - len(after)) + after

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The last `room` of these token ids, as the harness does with long prompts. Raises ValueError without room."""
        if room < 1:
            raise ValueError(
                f"max_length={self.max_length} leaves no token for a prompt: thoughts, answer and format take "
                f"{self.max_length - room}. Raise it, or take a model with a longer context."
            )
        self._shortened += len(ids) > room
        return ids[-room:]

    def _warn_of_shortened(self) -> None:
        if self._shortened:
            log(f"warning: {self._shortened} prompts lose their beginning, since max_length is {self.max_length}.")
        self._shortened = 0

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids up to the continuation, with the thoughts' latent tokens, and those of the continuation."""
        reasoning = self.lm.reasoning.in_mode(self.mode or "")
        if self.lm.reasoning.modes and not self.mode:
            raise ValueError(
                "How likely a hybrid model finds a continuation depends on its mode. Add mode=NAME to --model_args, "
                f"one of {', '.join(self.lm.reasoning.modes)}."
            )
        if self.lm.gates:
            raise ValueError(
                "This model mixes what it expected into the words that it writes, so that a given continuation has no "
                "probability of its own. Choose tasks whose answers are generated."
            )
        if reasoning.slot.merges and self.num_thoughts is None:
            raise ValueError(
                f"{reasoning.method} ends its thoughts itself, so that a given continuation stands after no fixed "
                "number of them. Add num_thoughts=N to --model_args, or choose tasks whose answers are generated."
            )
        count = reasoning.num_thoughts if self.num_thoughts is None else self.num_thoughts
        control = [self.lm.special.control[self.mode]] if self.mode else []
        slot = [*control, *slot_with_markers(reasoning, self.lm.special, count).tolist()]
        if self.wording is Wording.trained:
            answers, marks = encode_answers(self.tokenizer, [continuation.strip()], reasoning.format)
            slot, answer = slot + answers[0][: marks[0]], answers[0][marks[0] :]
        elif slot:
            answer = self.tok_encode(continuation, add_special_tokens=False)
        else:  # text that goes on: the harness's own way to part its tokens
            prompt, answer = super()._encode_pair(context, continuation)
            return self._cut(prompt, self.max_length - len(answer)), answer
        return self._prompt(context, self.max_length - len(slot) - len(answer)) + slot, answer

    # --- requests -------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers' texts up to a stop string. Raises ValueError for options that `LatentLM.generate` lacks."""
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        prompts = [self._prompt(request.args[0], self.room) for request in requests]
        self._warn_of_shortened()
        for i, request in enumerate(requests):
            given: Any = request.args
            options: Any = normalize_gen_kwargs(given[1], self.lm.reasoning.max_new_tokens)
            limit = min(options.pop("max_gen_toks"), self.room + 1 - len(prompts[i]))
            groups[json.dumps(options, sort_keys=True), limit].append(i)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for (written, limit), members in groups.items():
                options = json.loads(written)
                until = [text for text in options.pop("until", []) if text]
                if not options["do_sample"]:
                    options.pop("temperature", None)
                options |= {"stop_strings": until or None, "max_new_tokens": limit}
                for positions in longest_first([prompts[i] for i in members], self.batch_size):
                    indices = [members[position] for position in positions]
                    ids, mask = pad_rows([prompts[i] for i in indices], self.lm.special.pad)
                    with autocast(self.lm.device, self.precision):
                        out = self.lm.generate(ids, mask, num_thoughts=self.num_thoughts, mode=self.mode, **options)
                    for i, text in zip(indices, out.texts, strict=True):
                        texts[i] = postprocess_generated_text(text, until, None)
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(indices))
        return [texts[i] for i in range(len(requests))]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (request, prompt, continuation): the continuation's log-probability, and whether it is greedy.

        Greedy as in generation, where added tokens are never produced.
        """
        self._warn_of_shortened()
        rows = [prompt + continuation for _, prompt, continuation in requests]
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(rows), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for indices in longest_first(rows, self.batch_size):
                ids, mask = pad_rows([rows[i] for i in indices], self.lm.special.pad)
                starts = torch.tensor([ids.shape[1] - len(requests[i][2]) for i in indices])
                labels = ids.masked_fill(torch.arange(ids.shape[1]) < starts[:, None], -100)
                for i, score in zip(indices, self._scores(ids, mask, labels), strict=True):
                    scores[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(len(indices))
        return [scores[i] for i in range(len(rows))]

    def _scores(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, bool]]:
        ids, mask, labels = (tensor.to(self.lm.device) for tensor in (ids, mask, labels))
        with autocast(self.lm.device, self.precision):
            out: Any = self.lm(ids, mask, labels=labels, return_target_logits=True)
        log_probs = target_log_probs(out.target_logits, out.targets).double()
        out.target_logits[:, self.lm.special.added] = -torch.inf
        missed = (out.target_logits.argmax(-1) != out.targets).double()
        sums, misses = (
            torch.zeros(len(ids), dtype=torch.float64, device=ids.device).index_add(0, out.target_rows, values).tolist()
            for values in (log_probs, missed)
        )
        return [(total, not count) for total, count in zip(sums, misses, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts as plain text, in windows of the context, without thoughts or format."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


register_model(MODEL)(CoconutLM)  # as a decorator it would hide the type


def _refuse_several_processes() -> None:
    info = read_launcher_env()
    if info.size > 1:
        raise ValueError(
            f"The model coconut runs lm-evaluation-harness in one process, but this is one of {info.size}. "
            f"{info.advice}"
        )


def _refuse_wrong_names(path: str, unknown: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(CoconutLM).parameters if name != "unknown"]
    if unknown:
        raise ValueError(f"The model coconut has no argument {', '.join(unknown)}, only {', '.join(known)}.")
    if not path:
        raise ValueError("No model is named. Add --model_args path=PATH: a run, a saved model, or OWNER/NAME.")


def _usable(device: str | None) -> str:
    without = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
    return "auto" if without or not device else device


def _member(kind: type[StrEnum], name: str, given: str) -> Any:
    try:
        return kind(given)
    except ValueError:
        raise ValueError(f"{name} is {given!r}; it is one of {', '.join(kind)}.") from None


def _whole(name: str, given: int | str) -> int:
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"{name} is {given!r}; it must be a whole number of at least 1.")
    return int(given)


def _fitting(lm: LatentLM, num_thoughts: int | None, mode: str | None) -> tuple[int | None, str | None]:
    """The two settings, if the model has what they are about; otherwise ValueError."""
    reasoning = lm.reasoning
    if mode is not None and mode not in reasoning.modes:
        raise ValueError(f"mode={mode}: {reasoning.method} has {', '.join(reasoning.modes) or 'no modes'}.")
    if num_thoughts is not None and reasoning.modes:
        raise ValueError(f"num_thoughts={num_thoughts}: a hybrid model's mode sets the number of its thoughts.")
    if num_thoughts and reasoning.slot.is_empty:
        raise ValueError(f"num_thoughts={num_thoughts}: {reasoning.method} has neither thoughts nor pauses.")
    if num_thoughts is not None and num_thoughts < 0:
        raise ValueError(f"num_thoughts is {num_thoughts}; it must be at least 0.")
    return num_thoughts, mode
