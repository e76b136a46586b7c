"""Answer questions in a batch: think into a KV cache, then decode with Hugging Face generation.

Shapes: B questions, T columns of the prompts, W columns of a given prefix, K thoughts, N new tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import SpecialIds, encode_questions
from coconut.generation.config import SoftThinking
from coconut.generation.gated_words import GatedDecoding
from coconut.generation.keyed_random import Key, KeyedSampling, Stream, choose, uniform
from coconut.generation.options import PASSTHROUGH, generation_settings, refuse_unkeyed
from coconut.generation.soft_thinking import SoftThoughts
from coconut.generation.thoughts import NO_NOISE, StopCriterion, ThoughtNoise, think
from coconut.generation.watching import Watcher, Watching
from coconut.methods import Reasoning, Slot, Update
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass
class Generated:
    """B answers; several to one question are adjacent.

    `tokens` (B, N): new tokens, padded at their end. `lengths` (B,): without the end-of-sequence token. `truncated`
    (B,): whether the limit ended the answer. `num_thoughts` (B,): latent thoughts before it. `passes` (B,): sequential
    forward passes, for the prompt, thoughts, tokens, and a hybrid model's choice. `thoughts` (B, K, D): what was fed as
    thoughts, zero after a row's last. `thought_means` (B, K, D): of noisy thoughts, the model's own before noise and
    dropout; None without noise. `modes`: the mode of each answer of a hybrid model, otherwise empty texts.
    `mode_log_probs`: its log-probability, None where it was forced. `log_probs`, with log_probs=True: of each answer's
    tokens, including the end of the sequence, in float32. `expected`, with log_probs=True for a model with gates: of
    each answer (G, D), what they mixed into its first G words; its other words were fed as they are.
    """

    tokens: Tensor
    lengths: Tensor
    truncated: Tensor
    num_thoughts: Tensor
    passes: Tensor
    texts: list[str]
    thoughts: Tensor
    modes: list[str]
    mode_log_probs: list[float | None]
    log_probs: list[Tensor] | None = None
    thought_means: Tensor | None = None
    expected: list[Tensor] | None = None

    def completion_ids(self, row: int) -> list[int]:
        """The tokens of an answer, with the end of the sequence unless it was truncated."""
        ended = not self.truncated[row] and int(self.lengths[row]) < self.tokens.shape[1]
        return self.tokens[row, : int(self.lengths[row]) + ended].tolist()


def forward_passes(new_tokens: int, truncated: bool, slot: Slot, num_thoughts: int, mode: str) -> int:
    """Sequential forward passes of an answer: the prompt, thoughts, tokens, and a hybrid model's choice of mode."""
    return new_tokens + (not truncated) + slot.passes_before_answer(num_thoughts) + bool(mode)


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
    thought_dropout: float = 0.0,
    stop: StopCriterion | None = None,
    soft_thinking: SoftThinking | None = None,
    mode: str | Sequence[str] | None = None,
    prefix_ids: Tensor | None = None,
    log_probs: bool = False,
    random_keys: Sequence[Key] | None = None,
    watchers: Sequence[Watcher] | None = None,
    **options: Any,
) -> Generated:
    """Answer questions (B, T) of any lengths, padded on either side.

    Decoding is greedy by default. Added tokens are never produced, and an answer ends with the tokenizer's
    end-of-sequence token.

    Thoughts. The prompt format and the number of thoughts come from `lm.reasoning`; `num_thoughts` overrides the
    number, for all questions or (B,) for each. Where a model ends its thoughts itself (CoLaR, C-MTP), it is the most.
    `thoughts` (B, K, D) are fed in place of the model's own. `stop` ends the thoughts of each row after at least one
    and at most `num_thoughts` of them (`think`). `thought_noise`: the standard deviation of Gaussian noise that is
    added to the model's own thoughts before they are fed. `thought_dropout`: the probability with which each of their
    numbers is dropped before that (`ThoughtNoise`). With either, every answer has its own thoughts, and the thoughts
    that were fed are returned. With noise so are the model's own before both, and their log-probability is known
    (coconut.completions.noisy_thoughts).

    Soft Thinking. With `soft_thinking` a model that writes its chain is fed mixtures of words in its place. The mark of
    the answer is then given: it stands in `texts`, and not among the `tokens`. These thoughts are counted and returned
    as others are.

    Modes. A hybrid model first chooses a mode by its control token; `mode` forces one, for all questions or for each.

    Answers. `prefix_ids` (B, W): tokens that each answer begins with, after its thoughts. They are not returned.
    `log_probs=True` records the log-probability of each token at the temperature, among the tokens that are allowed.
    A model with gates mixes what it expected into each word until the answer mark; it takes no prefix.
    With num_return_sequences=n each question runs through prompt and thoughts once (with noise or dropout n times) and
    is answered n times.

    Randomness comes from torch's generator, so that an answer depends on its batch. With `random_keys` it comes from
    the answer's own key, a few whole numbers of 0 or more: (B * num_return_sequences) keys, those of one question
    adjacent. An answer then depends on its question and key alone (up to rounding). Of the settings that choose tokens
    at random, temperature, top_k and top_p are supported with keys.

    `watchers`, one for each answer in the order of the keys, see its tokens one by one as they are chosen, and may end
    it. They go with `random_keys`.

    `options` are those of transformers' generate that choose tokens and end answers (`options.py`), one by one or in a
    `generation_config`; and `streamer` (for one question; it also gets the prompt, so set skip_prompt=True),
    `stopping_criteria`, `logits_processor`, `prefix_allowed_tokens_fn`. The base model's own generation settings are
    ignored. Not thread-safe: a model answers for one thread at a time.

    Raises ValueError if there is no question, if a question fills the whole context, for thoughts of a method that has
    none, for `thoughts` or `num_thoughts` of a wrong shape, for noise below 0, for dropout outside of 0 to below 1, for
    either with given thoughts, for Soft Thinking with thoughts, modes or gates of the model's own, with a prefix, or
    without an answer's mark, for an unknown mode or option, for a prefix of a model with gates, for several answers
    without do_sample, noise or dropout, for several to one streamer, for a number of `random_keys` or `watchers` other
    than that of the answers, or for watchers without keys.
    """
    requested, noise = {**options, "max_new_tokens": max_new_tokens}, ThoughtNoise(thought_noise, thought_dropout)
    samples, options = generation_settings(requested, lm.reasoning.max_new_tokens, len(input_ids), noisy=bool(noise))
    options["log_probs"] = log_probs
    ids_BT, is_question_BT = _pad_left(input_ids.to(lm.device), attention_mask, lm.special.pad)
    if not is_question_BT.any(1).all():
        raise ValueError(f"Question {int(is_question_BT.sum(1).argmin()) + 1} is empty.")
    samples_B = torch.full((len(ids_BT),), samples)
    own = None
    if random_keys is not None:
        refuse_unkeyed(options, len(random_keys), len(ids_BT) * samples)
    if watchers is not None and len(watchers) != len(random_keys or ()):
        raise ValueError(
            f"There are {len(watchers)} watchers for {len(random_keys or ())} random_keys. Give one of each for each "
            "answer."
        )
    if random_keys is not None:
        flat_own = [_Own(*pair) for pair in zip(random_keys, watchers or [None] * len(random_keys), strict=True)]
        own = [flat_own[first : first + samples] for first in range(0, len(flat_own), samples)]
    if prefix_ids is not None and lm.gates:
        raise ValueError(
            "prefix_ids: this model mixes what it expected into each word that it writes, and of words that were given "
            "it expected nothing. Leave prefix_ids out."
        )
    prefix_BW = ids_BT[:, :0] if prefix_ids is None else prefix_ids.to(ids_BT)
    soft = None
    if soft_thinking and soft_thinking.max_thoughts:
        if prefix_ids is not None:
            raise ValueError("prefix_ids and soft_thinking are both given, and both begin the answer. Leave one out.")
        soft = SoftThoughts(lm, soft_thinking)
        prefix_BW = torch.tensor(soft.mark, device=lm.device).expand(len(ids_BT), -1)
    with eval_mode(lm):
        if not lm.reasoning.modes:
            if mode is not None:
                raise ValueError(f"mode={mode}: this model, {lm.reasoning.method}, has no modes to choose from.")
            counts_B = _slot_lengths(lm, len(ids_BT), num_thoughts, thoughts, noise, stop).to(lm.device)
            thinking: dict[str, Any] = {
                "thoughts": thoughts, "noise": noise, "stop": stop, "soft": soft and soft.settings,
            }  # fmt: skip
            batch = ids_BT, is_question_BT, counts_B, prefix_BW, samples_B, own
            answers = _answers(lm, lm.reasoning, *batch, options, **thinking)
        elif num_thoughts is not None or thoughts is not None or noise or stop is not None:
            raise ValueError(
                "A hybrid model's mode sets the number of its thoughts, and they are its own: leave out num_thoughts, "
                "thoughts, thought_noise, thought_dropout and stop."
            )
        elif prefix_ids is not None and mode is None:
            raise ValueError("prefix_ids: an answer that has begun is in a mode already. Name it with mode=...")
        else:
            answers = _answers_in_modes(lm, ids_BT, is_question_BT, mode, prefix_BW, samples_B, own, options)
    flat = [answer for several in answers for answer in several]
    return _collate(lm, flat, options, noisy=thought_noise != 0, mark=soft and soft.mark)


@torch.no_grad()
def mode_log_probs(lm: LatentLM, ids_BT: Tensor, is_question_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, modes) float32 log-probability of each mode, among the model's modes, as the first token of an answer."""
    states_BD = think(lm, ids_BT, is_question_BT, 0).states
    controls = [lm.special.control[name] for name in lm.reasoning.modes]
    return (lm.logits(states_BD)[:, controls].float() / temperature).log_softmax(-1)


def _answers_in_modes(
    lm: LatentLM,
    ids_BT: Tensor,
    is_question_BT: Tensor,
    mode: str | Sequence[str] | None,
    prefix_BW: Tensor,
    samples_B: Tensor,
    own: list[list[_Own]] | None,
    options: dict[str, Any],
) -> list[list[_Answer]]:
    """`_answers` after the control token of a mode, which the model chooses or `mode` forces."""
    modes, B, most = lm.reasoning.modes, len(ids_BT), int(samples_B.max())
    temperature = options.get("temperature") or 1.0
    log_probs_BM = mode_log_probs(lm, ids_BT, is_question_BT, temperature) if mode is None else None
    if log_probs_BM is None:
        forced = [mode] * B if isinstance(mode, str) else list(mode or ())
        if len(forced) != B or not set(forced) <= set(modes):
            raise ValueError(f"mode={mode} is not one of {', '.join(modes)}, or one of them for each of {B} questions.")
        chosen_BS = torch.tensor([[modes.index(name)] for name in forced]).expand(B, most)
    elif options.get("do_sample") and own is not None:
        uniform_BS = uniform([each.key for several in own for each in several], Stream.mode, 1).view(B, most)
        chosen_BS = torch.stack([choose(log_probs_BM, uniform_B) for uniform_B in uniform_BS.unbind(1)], dim=1).cpu()
    elif options.get("do_sample"):
        chosen_BS = torch.multinomial(log_probs_BM.exp(), most, replacement=True).cpu()
    else:
        chosen_BS = log_probs_BM.argmax(-1, keepdim=True).cpu().expand(B, most)
    answers: list[dict[int, _Answer]] = [{} for _ in range(B)]  # of each question, by the number of the sample
    for number, name in enumerate(modes):
        is_chosen_BS = chosen_BS == number
        times_B = is_chosen_BS.sum(1)
        rows = times_B.nonzero()[:, 0]
        if not len(rows):
            continue
        control_R1 = torch.full((len(rows), 1), lm.special.control[name], device=ids_BT.device)
        prompts = torch.cat([ids_BT[rows], control_R1], dim=1)
        is_token = torch.cat([is_question_BT[rows], torch.ones_like(control_R1, dtype=torch.bool)], dim=1)
        reasoning = lm.reasoning.in_mode(name)
        counts_R = torch.full((len(rows),), reasoning.num_thoughts, device=ids_BT.device)
        places = [is_chosen_BS[row].nonzero()[:, 0].tolist() for row in rows.tolist()]
        of_mode = None
        if own is not None:
            of_mode = [[own[row][place] for place in those] for row, those in zip(rows.tolist(), places, strict=True)]
        new = _answers(lm, reasoning, prompts, is_token, counts_R, prefix_BW[rows], times_B[rows], of_mode, options)
        for row, those, several in zip(rows.tolist(), places, new, strict=True):
            log_prob = None if log_probs_BM is None else float(log_probs_BM[row, number])
            for place, answer in zip(those, several, strict=True):
                answer.mode, answer.mode_log_prob = name, log_prob
                answers[row][place] = answer
    return [[by_sample[place] for place in sorted(by_sample)] for by_sample in answers]


def _answers(
    lm: LatentLM,
    reasoning: Reasoning,
    ids_BT: Tensor,
    is_question_BT: Tensor,
    counts_B: Tensor,
    prefix_BW: Tensor,
    samples_B: Tensor,
    own: list[list[_Own]] | None,
    options: dict[str, Any],
    *,
    thoughts: Tensor | None = None,
    noise: ThoughtNoise = NO_NOISE,
    stop: StopCriterion | None = None,
    soft: SoftThinking | None = None,
) -> list[list[_Answer]]:
    """`samples_B` answers to each of the questions (B, T), padded on the left, with `counts_B` tokens in the slot.

    Questions are answered together if they have as many tokens in the slot and the same limit of new tokens.
    """
    in_slot_B = torch.zeros_like(counts_B) if reasoning.slot.is_empty else counts_B
    before_answer_B = len(slot_with_markers(reasoning, lm.special, 0)) + in_slot_B
    lengths_B = is_question_BT.sum(1)
    before_answer_B = before_answer_B + prefix_BW.shape[1] + (soft.max_thoughts if soft else 0)
    free_B = lm.max_sequence_length - lengths_B - before_answer_B
    if (free_B < 1).any():
        row = int(free_B.argmin())
        raise ValueError(
            f"Question {row + 1} has {int(lengths_B[row])} tokens; with {int(before_answer_B[row])} more before the "
            "answer "
            f"it leaves no room in the model's context of {lm.max_sequence_length} tokens. Ask something shorter"
            + (", or with fewer thoughts." if counts_B[row] or soft else ".")
        )
    limits_B = free_B.clamp(max=options["max_new_tokens"])
    groups_BC = torch.stack([limits_B, counts_B], dim=1)
    answers: list[list[_Answer]] = [[] for _ in ids_BT]
    for limit, count in groups_BC.unique(dim=0).tolist():
        rows = ((limits_B == limit) & (counts_B == count)).nonzero()[:, 0]
        samples_R = samples_B[rows.cpu()]
        own_R = None if own is None else [own[row] for row in rows.tolist()]
        if noise:
            own_R = own_R and [[each] for several in own_R for each in several]
            rows = rows.repeat_interleave(samples_R.to(rows.device))
            samples_R = torch.ones(len(rows), dtype=torch.long)
        width = int(lengths_B[rows].max())
        ids, is_token = ids_BT[rows, -width:], is_question_BT[rows, -width:]
        fed = None if thoughts is None else thoughts.to(lm.device)[rows]
        limited = {**options, "max_new_tokens": limit}
        prefix = prefix_BW[rows]
        thinking: dict[str, Any] = {"thoughts": fed, "noise": noise, "stop": stop, "soft": soft}
        new = _think_and_decode(lm, reasoning, ids, is_token, count, prefix, samples_R, own_R, limited, **thinking)
        for row, several in zip(rows.tolist(), new, strict=True):
            answers[row] += several
    return answers


def _collate(
    lm: LatentLM, answers: list[_Answer], options: dict[str, Any], noisy: bool, mark: list[int] | None = None
) -> Generated:  # fmt: skip
    """`noisy`: whether thoughts have means. `mark`: token ids that Soft Thinking has given before each answer."""
    special = lm.special
    may_stop = bool(options.keys() & {"stop_strings", "stopping_criteria"})
    tokens, fed = [answer.tokens for answer in answers], [answer.thoughts for answer in answers]
    lengths = [_length(row, special, may_stop) for row in tokens]
    widest = max(map(len, tokens))
    texts = [
        str(
            lm.tokenizer.decode(
                [*(mark or ()), *row[:length]], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        for row, length in zip(tokens, lengths, strict=True)
    ]
    truncated = [
        length == answer.limit and not any(text_end in text for text_end in _stop_strings(options))
        for length, answer, text in zip(lengths, answers, texts, strict=True)
    ]
    return Generated(
        tokens=torch.tensor([row + [special.pad] * (widest - len(row)) for row in tokens]),
        lengths=torch.tensor(lengths),
        truncated=torch.tensor(truncated),
        num_thoughts=torch.tensor([len(row) for row in fed]),
        passes=torch.tensor(
            [
                forward_passes(length, ended, lm.reasoning.in_mode(answer.mode).slot, len(answer.thoughts), answer.mode)
                + (0 if mark is None else len(answer.thoughts) + 1)
                for length, ended, answer in zip(lengths, truncated, answers, strict=True)
            ]
        ),
        texts=texts,
        thoughts=torch.nn.utils.rnn.pad_sequence(fed, batch_first=True),
        modes=[answer.mode for answer in answers],
        mode_log_probs=[answer.mode_log_prob for answer in answers],
        log_probs=[answer.log_probs[: length + 1] for answer, length in zip(answers, lengths, strict=True)]
        if options["log_probs"]
        else None,
        thought_means=torch.nn.utils.rnn.pad_sequence([answer.means for answer in answers], batch_first=True)
        if noisy
        else None,
        expected=[
            answer.expected[: length - cut] for answer, length, cut in zip(answers, lengths, truncated, strict=True)
        ]
        if options["log_probs"] and lm.gates
        else None,
    )


def _slot_lengths(
    lm: LatentLM,
    num_questions: int,
    num_thoughts: int | Sequence[int] | Tensor | None,
    thoughts: Tensor | None,
    noise: ThoughtNoise,
    stop: StopCriterion | None,
) -> Tensor:
    """(B,) the largest number of tokens in the slot. Raises ValueError for arguments that do not fit the method."""
    table: Any = lm.base.get_input_embeddings()
    reasoning, hidden = lm.reasoning, table.weight.shape[1]
    counts = None if num_thoughts is None else torch.as_tensor(num_thoughts)
    shapes = ((), (num_questions,))
    if counts is not None and (counts.shape not in shapes or counts.is_floating_point() or (counts < 0).any()):
        raise ValueError(
            f"num_thoughts is {num_thoughts}; it must be a number, or one for each of {num_questions} questions."
        )
    if reasoning.slot.is_empty and counts is not None and counts.any():
        raise ValueError(f"{reasoning.method} has neither thoughts nor pauses; leave out num_thoughts={num_thoughts}.")
    if not reasoning.slot.thinks and (thoughts is not None or noise or stop is not None):
        raise ValueError(f"{reasoning.method} has no latent thoughts to replace, to make noisy or to stop.")
    if reasoning.slot.merges and stop is not None:
        raise ValueError(f"{reasoning.method} ends its thoughts itself. Leave out stop, or set num_thoughts, the most.")
    if reasoning.slot.in_parallel and stop is not None:
        raise ValueError(
            f"The thoughts of {reasoning.method} are computed all at once, so that stopping early saves nothing. Leave "
            "out stop, or set num_thoughts."
        )
    if not 0 <= noise.std < float("inf"):
        raise ValueError(f"thought_noise is {noise.std}; it must be a standard deviation, 0 or more.")
    if not 0 <= noise.dropout < 1:
        raise ValueError(f"thought_dropout is {noise.dropout}; it must be a probability, 0 or more and below 1.")
    if noise and thoughts is not None:
        name, value = ("thought_noise", noise.std) if noise.std else ("thought_dropout", noise.dropout)
        raise ValueError(f"{name}={value} is for the model's own thoughts: given ones are fed as they are.")
    if thoughts is None:
        return (torch.tensor(reasoning.num_thoughts) if counts is None else counts).expand(num_questions)
    fits = thoughts.dim() == 3 and len(thoughts) == num_questions and thoughts.shape[2] == hidden
    if not fits or (counts is not None and (counts != thoughts.shape[1]).any()):
        raise ValueError(
            f"thoughts has the shape {tuple(thoughts.shape)}, for {num_questions} questions, "
            f"states of {hidden} numbers and num_thoughts={num_thoughts}. It must be (questions, thoughts, hidden); "
            "leave num_thoughts out."
        )
    return torch.tensor(thoughts.shape[1]).expand(num_questions)


def _stop_strings(options: dict[str, Any]) -> Sequence[str]:
    given = options.get("stop_strings", ())
    return [given] if isinstance(given, str) else given


class _Own(NamedTuple):
    """What one answer has of its own in the batch."""

    key: Key
    watcher: Watcher | None


@dataclass
class _Answer:
    tokens: list[int]
    thoughts: Tensor  # (K, D)
    means: Tensor  # (K, D), the thoughts without their noise
    limit: int
    log_probs: Tensor
    expected: Tensor  # (G, D)
    mode: str = ""
    mode_log_prob: float | None = None


def _length(row: list[int], special: SpecialIds, may_stop: bool) -> int:
    """The number of tokens before the end. An answer that a stop string ended is followed by padding."""
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
    prefix_BW: Tensor,
    samples_B: Tensor,
    own: list[list[_Own]] | None,
    options: dict[str, Any],
    *,
    thoughts: Tensor | None,
    noise: ThoughtNoise,
    stop: StopCriterion | None,
    soft: SoftThinking | None,
) -> list[list[_Answer]]:
    """`samples_B` answers to each of the questions, which are padded on the left."""
    B, T = ids_BT.shape
    slot = torch.from_numpy(slot_with_markers(reasoning, lm.special, count)).long().to(lm.device)
    before_soft = T + len(slot)
    if soft:  # its thoughts stand behind the slot
        count = soft.max_thoughts
        slot = torch.cat([slot, slot.new_full((count,), lm.latent_id)])
    elif not reasoning.slot.thinks:
        count = 0
    prompt_BT = torch.cat([ids_BT, slot.expand(B, -1), prefix_BW], dim=1)
    is_token_BT = torch.cat([is_question_BT, torch.ones_like(prompt_BT[:, T:], dtype=torch.bool)], dim=1)
    prefilled = T + 1 if count else prompt_BT.shape[1] - 1  # columns before the thoughts (with <bot>), or all but one
    prefilled = before_soft if soft else prefilled
    limit = options["max_new_tokens"]
    reserve = 1 + prefix_BW.shape[1] + limit
    if not prefilled:  # a question of one token, with nothing after it
        table: Any = lm.base.get_input_embeddings()
        none_KD = torch.zeros(0, table.embedding_dim)
        decoded = _decode(lm, prompt_BT, is_token_BT, lm.new_cache(reserve), samples_B, own, options)
        return [[_Answer(new, none_KD, none_KD, limit, *recorded) for new, recorded in several] for several in decoded]
    thinking: dict[str, Any] = {"thoughts": thoughts, "noise": noise, "stop": stop, "reserve": reserve}
    if noise and own is not None:
        thinking["random_keys"] = [each.key for [each] in own]
    if soft:
        thinking["soft"] = SoftThoughts(lm, soft)
    state = think(lm, prompt_BT[:, :prefilled], is_token_BT[:, :prefilled], count, **thinking)
    answers: dict[int, list[_Answer]] = {}
    for n in state.counts.unique().tolist():  # one number, unless `stop` ended rows at different ones
        rows = (state.counts == n).nonzero()[:, 0]
        cache = state.cache
        if len(rows) < B:  # with sliding windows a cache cannot be cropped, so these rows are run again
            prompts, masks = prompt_BT[rows, :prefilled], is_token_BT[rows, :prefilled]
            cache = think(lm, prompts, masks, n, thoughts=state.thoughts[rows], reserve=reserve).cache
        columns = [*range(prefilled + n), *range(prefilled + count, prompt_BT.shape[1])]  # with <eot> and the prefix
        prompts, masks = prompt_BT[rows][:, columns], is_token_BT[rows][:, columns]
        _extend_cache(lm, prompts[:, :-1], masks[:, :-1], cache, prefilled + n)
        own_R = None if own is None else [own[row] for row in rows.tolist()]
        decoded = _decode(lm, prompts, masks, cache, samples_B[rows.cpu()], own_R, options)
        for row, several in zip(rows.tolist(), decoded, strict=True):
            fed, means = (part[row, :n].float().cpu() for part in (state.thoughts, state.means))
            answers[row] = [_Answer(new, fed, means, limit, *recorded) for new, recorded in several]
    return [answers[row] for row in range(B)]


def _extend_cache(lm: LatentLM, ids_BT: Tensor, is_token_BT: Tensor, cache: Any, num_cached: int) -> None:
    """Run the columns after the first `num_cached`, which the cache holds, into the cache."""
    if num_cached == ids_BT.shape[1]:
        return
    embeds_BTD = lm.base.get_input_embeddings()(ids_BT[:, num_cached:])
    positions_BT = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)[:, num_cached:]
    lm.hidden_states(embeds_BTD, is_token_BT, positions_BT, cache, num_skipped=embeds_BTD.shape[1] - 1)


def _decode(
    lm: LatentLM, prompt_BT: Tensor, is_token_BT: Tensor, cache: Any, samples_B: Tensor, own: list[list[_Own]] | None,
    options: dict[str, Any],
) -> list[list[tuple[list[int], tuple[Tensor, Tensor]]]]:  # fmt: skip
    """For each prompt `samples_B` times: its new tokens; if options["log_probs"], their log-probabilities and what
    gates mixed into them (G, D).

    The cache holds all columns of the prompts but the last.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from coconut.generation.stop_strings import StopStrings

    if (samples_B != 1).any():
        repeated = torch.arange(len(samples_B)).repeat_interleave(samples_B).to(prompt_BT.device)
        cache.batch_select_indices(repeated)
        prompt_BT, is_token_BT = prompt_BT[repeated], is_token_BT[repeated]
    special = lm.special
    passed_through = {name: options[name] for name in PASSTHROUGH if name in options}
    if texts := _stop_strings(options):
        criteria = passed_through.get("stopping_criteria", ())
        stops = StopStrings(lm.tokenizer, texts, prompt_BT.shape[1])
        passed_through["stopping_criteria"] = StoppingCriteriaList([*criteria, stops])
    flat_own = [each for several in own or () for each in several]
    watching = None
    if watchers := [each.watcher for each in flat_own if each.watcher]:
        others = passed_through.get("stopping_criteria", ())
        watching = Watching(watchers, special.eos, prompt_BT.shape[1], others)
        passed_through["stopping_criteria"] = StoppingCriteriaList([watching])
    options = {name: value for name, value in options.items() if name not in {*PASSTHROUGH, "stop_strings"}}
    suppressed = options.pop("suppress_tokens", ())
    recorder = _Recorder(options.get("temperature") or 1.0) if options.pop("log_probs") else None
    gated = GatedDecoding(lm, len(prompt_BT)) if lm.gates else None
    added: list[Any] = [part for part in (gated, recorder) if part]
    if flat_own and options.pop("do_sample", False):
        settings = {name: options.pop(name) for name in KeyedSampling.SETTINGS if name in options}
        keys = [each.key for each in flat_own]
        added.append(KeyedSampling(keys, prompt_BT.shape[1], options["max_new_tokens"], **settings))
    if added:
        processors = passed_through.get("logits_processor", ())
        passed_through["logits_processor"] = LogitsProcessorList([*processors, *added])
    every_token = {"top_k": 0} if options.get("do_sample") else {}  # transformers' default is 50
    config = GenerationConfig(
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        **{"do_sample": False, **every_token, **options},
        suppress_tokens=[*special.added, *suppressed],
    )
    base: Any = lm.base
    original, base.generation_config = base.generation_config, GenerationConfig()
    try:
        with lm.acceleration.decoding(), gated or nullcontext():
            sequences = base.generate(
                input_ids=prompt_BT,
                attention_mask=is_token_BT.long(),
                generation_config=config,
                **{lm.cache_argument: cache},
                **passed_through,
            )
    finally:
        base.generation_config = original
    new = sequences[:, prompt_BT.shape[1] :]
    log_probs = recorder.log_probs(new) if recorder else new.new_zeros(len(new), 0)
    expected = gated.expected() if gated and recorder else [log_probs.new_zeros(0, 0)] * len(new)
    tokens = new.tolist()
    if watching:
        tokens = [row[:length] for row, length in zip(tokens, watching.lengths, strict=True)]
    rows = list(zip(tokens, zip(log_probs.cpu(), expected, strict=True), strict=True))
    ends = samples_B.cumsum(0).tolist()
    return [rows[end - count : end] for end, count in zip(ends, samples_B.tolist(), strict=True)]


class _Recorder:
    """Records the log-probabilities of generated tokens. transformers calls it as the last logits processor."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._last_BV: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last_BV is not None:
            self._chosen.append(self._last_BV.gather(1, input_ids[:, -1:]))
        self._last_BV = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def log_probs(self, new_BN: Tensor) -> Tensor:
        """(B, N) of the new tokens."""
        assert self._last_BV is not None
        return torch.cat([*self._chosen, self._last_BV.gather(1, new_BN[:, -1:])], dim=1)


def _pad_left(input_ids: Tensor, attention_mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor]:
    """The same rows with their padding on the left, as narrow as the longest allows."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    is_token, order = attention_mask.to(input_ids.device).bool().sort(dim=1, stable=True)
    width = int(is_token.sum(1).max())
    ids = torch.where(is_token, input_ids.gather(1, order), pad)
    return ids[:, -width:], is_token[:, -width:]


def answer(lm: LatentLM, questions: list[str], **options: Any) -> Generated:
    """Answer questions given as text in one batch. `options`: those of `generate`."""
    if isinstance(questions, str) or not questions:
        raise ValueError(f"questions is {questions!r}; it must be a list of texts, with one at least.")
    rows = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    return generate(lm, *pad_rows(rows, lm.special.pad), **options)


def longest_first(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar lengths, the longest first."""
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
    """Apply the head to thoughts (N, D): the `count` most probable tokens of each, with their probabilities.

    A projector's thoughts are read as they are fed: they are compared with the rows of the head, which no training has
    made them fit. Thoughts that are updated in loops are read without the embedding of the latent token that is added
    to their states. Raises ValueError for thoughts that are mixtures of words' input embeddings, which the head does
    not read.
    """
    refuse_logit_lens(lm)
    states_ND = thoughts.to(lm.device, lm.base.dtype)
    if lm.feedback.slot.update is Update.loop:
        states_ND = states_ND - lm.base.get_input_embeddings()(torch.tensor(lm.latent_id, device=lm.device))
    return likeliest_tokens(lm, lm.logits(states_ND), count)


def likeliest_tokens(lm: LatentLM, logits_NV: Tensor, count: int) -> list[list[tuple[str, float]]]:
    """The `count` most probable tokens of each row, with their probabilities."""
    values, ids = logits_NV.float().softmax(-1).topk(min(count, logits_NV.shape[-1]))
    texts = ([str(lm.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in row] for row in ids.tolist())
    return [list(zip(*pair, strict=True)) for pair in zip(texts, values.tolist(), strict=True)]


def refuse_logit_lens(lm: LatentLM) -> None:
    """Raise ValueError for a model whose thoughts are not states that its head reads (see `logit_lens`)."""
    if not lm.feedback.slot.read_by_head:
        raise ValueError(
            f"The thoughts of {lm.reasoning.method} are made of words' input embeddings ({lm.feedback.slot.describe()})"
            ", not states that the head reads, so there is no logit lens on them. Leave it out (show_thoughts=false)."
        )
