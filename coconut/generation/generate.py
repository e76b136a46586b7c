"""Think, then speak: batched, cached.

Shapes: B questions, T columns of the prompts, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut.data.sequences import slot_ids
from coconut.data.tokenization import SpecialIds, encode_questions
from coconut.generation.options import PASSTHROUGH, settings
from coconut.generation.thoughts import StopCriterion, think
from coconut.methods import Reasoning, Slot
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class Generated:
    """B answers; several to one question stand together.

    `tokens` (B, N): new tokens, padded after their end. `lengths` (B,): without the end-of-sequence token.
    `cut` (B,): whether the limit ended the answer. `num_thoughts` (B,): latent thoughts before it.
    `thoughts` (B, K, D): what was fed as thoughts, K for the row that had most; zeros after a row's last.
    `modes`: of a hybrid model, how each was answered, else empty texts; `mode_log_probs`: how likely that was, None
    where it was forced. `log_probs`, if asked for: of each answer's tokens, the end of the sequence among them, in
    float32.
    """

    tokens: Tensor
    lengths: Tensor
    truncated: Tensor
    num_thoughts: Tensor
    texts: list[str]
    thoughts: Tensor
    modes: list[str]
    mode_log_probs: list[float | None]
    log_probs: list[Tensor] | None = None

    def completion_ids(self, row: int) -> list[int]:
        """The tokens of an answer, with the end of the sequence unless it was cut off."""
        ended = not self.truncated[row] and int(self.lengths[row]) < self.tokens.shape[1]
        return self.tokens[row, : int(self.lengths[row]) + ended].tolist()


def forward_passes(new_tokens: int, cut: bool, num_thoughts: int, mode: str) -> int:
    """Of an answer, one after the other: for prefix, thoughts and tokens, and of a hybrid model one for its mode."""
    return new_tokens + (not cut) + num_thoughts + (num_thoughts > 0) + bool(mode)


@torch.no_grad()
def generate(
    lm: LatentLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    num_thoughts: int | Sequence[int] | Tensor | None = None,
    thoughts: Tensor | None = None,
    thought_noise: float = 0.0,
    stop: StopCriterion | None = None,
    mode: str | Sequence[str] | None = None,
    prefix_ids: Tensor | None = None,
    log_probs: bool = False,
    **options: Any,
) -> Generated:
    """Answer questions (B, T) of any lengths, padded on either side.

    The prompt format and the number of thoughts are those of `lm.reasoning`; `num_thoughts` overrides the
    latter, for all questions or (B,) for each. `thoughts` (B, K, D) are fed in place of the model's own, K of
    them to every question; `stop` ends the thoughts of each row by itself, after at least one and at most
    `num_thoughts` of them (see `think`). Thoughts run in the model's cache, from which Hugging Face generation
    goes on, greedily by default.

    `thought_noise`: the standard deviation of Gaussian noise that is added to each number of the model's own thoughts
    before they are fed, drawn from torch's generator as sampled words are. Every answer then has its own thoughts;
    what comes back are those that were fed, whose log-probability is known (coconut.rewards.thoughts).

    A hybrid model first says its mode, whose control token is its own first one; `mode` forces it, for all or each.
    `begun` (B, W): what each answer begins with, after its thoughts; what comes back is what follows.
    With `log_probs` it is kept how likely each word was, at the temperature, among those that may be said.

    `options` are those of transformers' generate that say which words are chosen and where an answer ends
    (`options.py`), one by one or in a `generation_config`, and `streamer` (one question; the prompt is put to it
    too, so make it with skip_prompt=True), `stopping_criteria`, `logits_processor`, `prefix_allowed_tokens_fn`. What
    they leave open is off, whatever the base model's own settings are. The added tokens are never produced, and an
    answer ends with the tokenizer's end of a sequence. With num_return_sequences=n each question is read and thought
    about once (with noise n times) and answered n times; its answers stand together. A model answers for one thread
    at a time.

    Raises ValueError if there is no question, if one fills the whole context, if thoughts are asked of a method
    that has none, if `thoughts` or `num_thoughts` have another shape, for noise below 0 or with given thoughts, for a
    mode that is none, for an option that is not among these, for several answers without do_sample or noise, or for
    several to one streamer.
    """
    asked = {**options, "max_new_tokens": max_new_tokens}
    samples, options = settings(asked, lm.reasoning.max_new_tokens, len(input_ids), noisy=thought_noise != 0)
    options["log_probs"] = log_probs
    ids_BT, is_question_BT = _pad_left(input_ids.to(lm.device), attention_mask, lm.special.pad)
    if not is_question_BT.any(1).all():
        raise ValueError(f"Question {int(is_question_BT.sum(1).argmin()) + 1} is empty.")
    samples_B = torch.full((len(ids_BT),), samples)
    begun_BW = ids_BT[:, :0] if prefix_ids is None else prefix_ids.to(ids_BT)
    with eval_mode(lm):
        if not lm.reasoning.modes:
            if mode is not None:
                raise ValueError(f"mode={mode}: this model, {lm.reasoning.method}, has no modes to choose from.")
            counts_B = _how_many(lm, len(ids_BT), num_thoughts, thoughts, thought_noise, stop).to(lm.device)
            how: dict[str, Any] = {"thoughts": thoughts, "noise": thought_noise, "stop": stop}
            answers = _answers(lm, lm.reasoning, ids_BT, is_question_BT, counts_B, begun_BW, samples_B, options, **how)
        elif num_thoughts is not None or thoughts is not None or thought_noise or stop is not None:
            raise ValueError(
                "The mode says how many thoughts there are, and they are its own: leave out num_thoughts, thoughts, "
                "thought_noise and stop."
            )
        elif prefix_ids is not None and mode is None:
            raise ValueError("begun: an answer that has begun is in a mode already. Name it with mode=...")
        else:
            answers = _in_modes(lm, ids_BT, is_question_BT, mode, begun_BW, samples_B, options)
    return _together(lm, [answer for several in answers for answer in several], options)


@torch.no_grad()
def mode_log_probs(lm: LatentLM, ids_BT: Tensor, is_question_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, modes) how likely each of the model's modes is, among them, as the first token after questions; float32."""
    states_BD = think(lm, ids_BT, is_question_BT, 0).states
    controls = [lm.special.control[name] for name in lm.reasoning.modes]
    return (lm.logits(states_BD)[:, controls].float() / temperature).log_softmax(-1)


def _in_modes(
    lm: LatentLM,
    ids_BT: Tensor,
    is_question_BT: Tensor,
    mode: str | Sequence[str] | None,
    begun_BW: Tensor,
    samples_B: Tensor,
    options: dict[str, Any],
) -> list[list[_Answer]]:
    """As `_answers`, after the control token of a mode: the model's own choice, or the one that is forced."""
    modes, B, most = lm.reasoning.modes, len(ids_BT), int(samples_B.max())
    temperature = options.get("temperature") or 1.0
    log_probs_BM = mode_log_probs(lm, ids_BT, is_question_BT, temperature) if mode is None else None
    if log_probs_BM is None:
        forced = [mode] * B if isinstance(mode, str) else list(mode or ())
        if len(forced) != B or not set(forced) <= set(modes):
            raise ValueError(f"mode={mode} is not one of {', '.join(modes)}, or one of them for each of {B} questions.")
        chosen_BS = torch.tensor([[modes.index(name)] for name in forced]).expand(B, most)
    elif options.get("do_sample"):
        chosen_BS = torch.multinomial(log_probs_BM.exp(), most, replacement=True).cpu()
    else:
        chosen_BS = log_probs_BM.argmax(-1, keepdim=True).cpu().expand(B, most)
    answers: list[list[_Answer]] = [[] for _ in range(B)]
    for number, name in enumerate(modes):
        times_B = (chosen_BS == number).sum(1)
        rows = times_B.nonzero()[:, 0]
        if not len(rows):
            continue
        control_R1 = torch.full((len(rows), 1), lm.special.control[name], device=ids_BT.device)
        prompts = torch.cat([ids_BT[rows], control_R1], dim=1)
        is_token = torch.cat([is_question_BT[rows], torch.ones_like(control_R1, dtype=torch.bool)], dim=1)
        reasoning = lm.reasoning.in_mode(name)
        counts_R = torch.full((len(rows),), reasoning.num_thoughts, device=ids_BT.device)
        found = _answers(lm, reasoning, prompts, is_token, counts_R, begun_BW[rows], times_B[rows], options)
        for row, several in zip(rows.tolist(), found, strict=True):
            how_likely = None if log_probs_BM is None else float(log_probs_BM[row, number])
            for answer in several:
                answer.mode, answer.mode_log_prob = name, how_likely
            answers[row] += several
    return answers


def _answers(
    lm: LatentLM,
    reasoning: Reasoning,
    ids_BT: Tensor,
    is_question_BT: Tensor,
    counts_B: Tensor,
    begun_BW: Tensor,
    samples_B: Tensor,
    options: dict[str, Any],
    *,
    thoughts: Tensor | None = None,
    noise: float = 0.0,
    stop: StopCriterion | None = None,
) -> list[list[_Answer]]:
    """For each of the questions (B, T), padded on the left, so many answers, with so many tokens in the slot."""
    in_slot_B = len(slot_ids(reasoning, lm.special, 0)) + counts_B * (reasoning.slot is not Slot.none)
    lengths_B = is_question_BT.sum(1)
    in_slot_B = in_slot_B + begun_BW.shape[1]
    room_B = lm.max_sequence_length - lengths_B - in_slot_B
    if (room_B < 1).any():
        row = int(room_B.argmin())
        raise ValueError(
            f"Question {row + 1} has {int(lengths_B[row])} tokens; with {int(in_slot_B[row])} more before the answer "
            f"it leaves no room in the model's context of {lm.max_sequence_length} tokens. Ask something shorter"
            + (", or with fewer thoughts." if counts_B[row] else ".")
        )
    limits_B = room_B.clamp(max=options["max_new_tokens"])
    kinds_BC = torch.stack([limits_B, counts_B], dim=1)  # one, unless rows differ or the context cuts answers short
    answers: list[list[_Answer]] = [[] for _ in ids_BT]
    for limit, count in kinds_BC.unique(dim=0).tolist():
        rows = ((limits_B == limit) & (counts_B == count)).nonzero()[:, 0]
        samples_R = samples_B[rows.cpu()]
        if noise:
            rows = rows.repeat_interleave(samples_R.to(rows.device))
            samples_R = torch.ones(len(rows), dtype=torch.long)
        width = int(lengths_B[rows].max())
        ids, is_token = ids_BT[rows, -width:], is_question_BT[rows, -width:]
        given = None if thoughts is None else thoughts.to(lm.device)[rows]
        limited = {**options, "max_new_tokens": limit}
        begun = begun_BW[rows]
        found = _think_and_decode(lm, reasoning, ids, is_token, count, given, noise, stop, begun, samples_R, limited)
        for row, several in zip(rows.tolist(), found, strict=True):
            answers[row] += several
    return answers


def _together(lm: LatentLM, answers: list[_Answer], options: dict[str, Any]) -> Generated:
    special = lm.special
    may_stop = bool(options.keys() & {"stop_strings", "stopping_criteria"})
    tokens, fed = [answer.tokens for answer in answers], [answer.thoughts for answer in answers]
    lengths = [_length(row, special, may_stop) for row in tokens]
    widest = max(map(len, tokens))
    texts = [
        str(lm.tokenizer.decode(row[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for row, length in zip(tokens, lengths, strict=True)
    ]
    ends = options.get("stop_strings", ())
    ends = [ends] if isinstance(ends, str) else ends
    cut = [
        length == answer.limit and not any(end in text for end in ends)
        for length, answer, text in zip(lengths, answers, texts, strict=True)
    ]
    return Generated(
        tokens=torch.tensor([row + [special.pad] * (widest - len(row)) for row in tokens]),
        lengths=torch.tensor(lengths),
        truncated=torch.tensor(cut),
        num_thoughts=torch.tensor([len(row) for row in fed]),
        texts=texts,
        thoughts=torch.nn.utils.rnn.pad_sequence(fed, batch_first=True),
        modes=[answer.mode for answer in answers],
        mode_log_probs=[answer.mode_log_prob for answer in answers],
        log_probs=[answer.log_probs[: length + 1] for answer, length in zip(answers, lengths, strict=True)]
        if options["log_probs"]
        else None,
    )


def _how_many(
    lm: LatentLM,
    questions: int,
    num_thoughts: int | Sequence[int] | Tensor | None,
    thoughts: Tensor | None,
    noise: float,
    stop: StopCriterion | None,
) -> Tensor:
    """(B,) tokens in the slot, at most. Raises ValueError if what is asked of it does not fit the method or itself."""
    table: Any = lm.base.get_input_embeddings()
    reasoning, hidden = lm.reasoning, table.weight.shape[1]
    asked = None if num_thoughts is None else torch.as_tensor(num_thoughts)
    if asked is not None and (asked.shape not in ((), (questions,)) or asked.is_floating_point() or (asked < 0).any()):
        raise ValueError(
            f"num_thoughts is {num_thoughts}; it must be a number, or one for each of {questions} questions."
        )
    if reasoning.slot is Slot.none and asked is not None and asked.any():
        raise ValueError(f"{reasoning.method} has neither thoughts nor pauses; leave out num_thoughts={num_thoughts}.")
    if reasoning.slot is not Slot.thought and (thoughts is not None or noise or stop is not None):
        raise ValueError(f"{reasoning.method} has no latent thoughts to replace, to make noisy or to stop.")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"thought_noise is {noise}; it must be a standard deviation, 0 or more.")
    if noise and thoughts is not None:
        raise ValueError(f"thought_noise={noise} is for the model's own thoughts: given ones are fed as they are.")
    if thoughts is None:
        return (torch.tensor(reasoning.num_thoughts) if asked is None else asked).expand(questions)
    fits = thoughts.dim() == 3 and len(thoughts) == questions and thoughts.shape[2] == hidden
    if not fits or (asked is not None and (asked != thoughts.shape[1]).any()):
        raise ValueError(
            f"thoughts has the shape {tuple(thoughts.shape)}, for {questions} questions, states of {hidden} numbers "
            f"and num_thoughts={num_thoughts}. It must be (questions, thoughts, hidden); leave num_thoughts out."
        )
    return torch.tensor(thoughts.shape[1]).expand(questions)


@dataclass
class _Answer:
    tokens: list[int]
    thoughts: Tensor  # (K, D)
    limit: int
    log_probs: Tensor
    mode: str = ""
    mode_log_prob: float | None = None


def _length(row: list[int], special: SpecialIds, may_stop: bool) -> int:
    """Tokens before the end; one that a stopping string ended is followed by padding."""
    if special.eos in row:
        return row.index(special.eos)
    while may_stop and row and row[-1] == special.pad:
        row = row[:-1]
    return len(row)


def _think_and_decode(
    lm: LatentLM,
    reasoning: Reasoning,
    ids_BT: Tensor,
    is_question_BT: Tensor,
    count: int,
    thoughts: Tensor | None,
    noise: float,
    stop: StopCriterion | None,
    begun_BW: Tensor,
    samples_B: Tensor,
    options: dict[str, Any],
) -> list[list[_Answer]]:
    """So many answers to each of the questions, which are padded on the left."""
    B, T = ids_BT.shape
    slot = torch.from_numpy(slot_ids(reasoning, lm.special, count)).long().to(lm.device)
    prompt_BT = torch.cat([ids_BT, slot.expand(B, -1), begun_BW], dim=1)
    is_token_BT = torch.cat([is_question_BT, torch.ones_like(prompt_BT[:, T:], dtype=torch.bool)], dim=1)
    if reasoning.slot is not Slot.thought:
        count = 0
    prefix = T + 1 if count else prompt_BT.shape[1] - 1  # with <bot>, or all but the last
    limit = options["max_new_tokens"]
    room = 1 + begun_BW.shape[1] + limit
    if not prefix:  # a question of one token, and nothing after it
        table: Any = lm.base.get_input_embeddings()
        nothing = torch.zeros(0, table.embedding_dim)
        found = _decode(lm, prompt_BT, is_token_BT, lm.new_cache(room), samples_B, options)
        return [[_Answer(new, nothing, limit, likely) for new, likely in several] for several in found]
    how: dict[str, Any] = {"thoughts": thoughts, "noise": noise, "stop": stop, "room": room}
    thinking = think(lm, prompt_BT[:, :prefix], is_token_BT[:, :prefix], count, **how)
    answers: dict[int, list[_Answer]] = {}
    for n in thinking.counts.unique().tolist():  # one, unless rows stop by themselves
        rows = (thinking.counts == n).nonzero()[:, 0]
        cache = thinking.cache
        if len(rows) < B:  # a cache cannot be cut where a model looks through a sliding window, so they think again
            given = thinking.thoughts[rows]
            cache = think(lm, prompt_BT[rows, :prefix], is_token_BT[rows, :prefix], n, thoughts=given, room=room).cache
        columns = [*range(prefix + n), *range(prefix + count, prompt_BT.shape[1])]  # with <eot>, and what has begun
        prompts, masks = prompt_BT[rows][:, columns], is_token_BT[rows][:, columns]
        _read_on(lm, prompts[:, :-1], masks[:, :-1], cache, prefix + n)
        for row, several in zip(
            rows.tolist(), _decode(lm, prompts, masks, cache, samples_B[rows.cpu()], options), strict=True
        ):
            fed = thinking.thoughts[row, :n].float().cpu()
            answers[row] = [_Answer(new, fed, limit, likely) for new, likely in several]
    return [answers[row] for row in range(B)]


def _read_on(lm: LatentLM, ids_BT: Tensor, is_token_BT: Tensor, cache: Any, read: int) -> None:
    """Put all columns into the cache, which holds the first so many."""
    if read == ids_BT.shape[1]:
        return
    embeds_BTD = lm.base.get_input_embeddings()(ids_BT[:, read:])
    positions_BT = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
    lm.hidden_states(embeds_BTD, is_token_BT, positions_BT[:, read:], cache, num_skipped=embeds_BTD.shape[1] - 1)


def _decode(
    lm: LatentLM, prompt_BT: Tensor, is_token_BT: Tensor, cache: Any, samples_B: Tensor, options: dict[str, Any]
) -> list[list[tuple[list[int], Tensor]]]:
    """By question, so many times the tokens after its prompt, of which the cache holds all but the last column.

    With them their log-probabilities, if they are asked for.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    if (samples_B != 1).any():
        again = torch.arange(len(samples_B)).repeat_interleave(samples_B).to(prompt_BT.device)
        cache.batch_select_indices(again)
        prompt_BT, is_token_BT = prompt_BT[again], is_token_BT[again]
    special = lm.special
    handed_on = {name: options[name] for name in PASSTHROUGH if name in options}
    options = {name: value for name, value in options.items() if name not in PASSTHROUGH}
    suppressed = options.pop("suppress_tokens", ())
    recorder = _Recorder(options.get("temperature") or 1.0) if options.pop("log_probs") else None
    if recorder:
        handed_on["logits_processor"] = LogitsProcessorList([*handed_on.get("logits_processor", ()), recorder])
    every_token = {"top_k": 0} if options.get("do_sample") else {}  # transformers' own default is the 50 likeliest
    config = GenerationConfig(
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        **{"do_sample": False, **every_token, **options},
        suppress_tokens=[*special.added, *suppressed],
    )
    base: Any = lm.base
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        with lm.acceleration.decoding():
            sequences = base.generate(
                input_ids=prompt_BT,
                attention_mask=is_token_BT.long(),
                generation_config=config,
                tokenizer=lm.tokenizer,
                **{lm.cache_argument: cache},
                **handed_on,
            )
    finally:
        base.generation_config = own
    new = sequences[:, prompt_BT.shape[1] :]
    likely = recorder.of(new) if recorder else new.new_zeros(len(new), 0)
    each = list(zip(new.tolist(), likely.cpu(), strict=True))
    ends = samples_B.cumsum(0).tolist()
    return [each[end - count : end] for end, count in zip(ends, samples_B.tolist(), strict=True)]


class _Recorder:
    """How likely the tokens are that are said: handed to transformers as the last of its processors of scores."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.log_probs_BV: Tensor | None = None
        self.found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.log_probs_BV is not None:
            self.found.append(self.log_probs_BV.gather(1, input_ids[:, -1:]))
        self.log_probs_BV = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def of(self, new_BN: Tensor) -> Tensor:
        """(B, N)"""
        assert self.log_probs_BV is not None
        return torch.cat([*self.found, self.log_probs_BV.gather(1, new_BN[:, -1:])], dim=1)


def _pad_left(input_ids: Tensor, attention_mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """The same rows with their padding on the left, as narrow as the longest allows."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    is_token, order = attention_mask.to(input_ids.device).bool().sort(dim=1, stable=True)
    width = int(is_token.sum(1).max())
    ids = torch.where(is_token, input_ids.gather(1, order), pad)
    return ids[:, -width:], is_token[:, -width:]


def answer(lm: LatentLM, questions: list[str], **options: Any) -> Generated:
    """Answer questions given as text, in one batch; `options` as for `generate`."""
    if isinstance(questions, str) or not questions:
        raise ValueError(f"questions is {questions!r}; it must be a list of texts, with one at least.")
    rows = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    return generate(lm, *pad_rows(rows, lm.special.pad), **options)


def longest_first(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """The places of rows in batches of like lengths, the longest first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def pad_rows(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) of rows of any lengths, padded on the left."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def logit_lens(lm: LatentLM, thoughts: Tensor, count: int = 3) -> list[list[tuple[str, float]]]:
    """What the model's head makes of each of the thoughts (N, D): the likeliest tokens and their probabilities."""
    logits_NV = lm.logits(thoughts.to(lm.device, lm.base.dtype)).float()
    values, ids = logits_NV.softmax(-1).topk(min(count, logits_NV.shape[-1]))
    texts = ([str(lm.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in row] for row in ids.tolist())
    return [list(zip(row, of_row, strict=True)) for row, of_row in zip(texts, values.tolist(), strict=True)]
