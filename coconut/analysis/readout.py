"""What can be read out: linear probes that reconstruct the written steps from the hidden states of the slot.

Shapes: N questions that are measured, F that probes are fitted on, P = K + 1 places (the token before the slot, then
its K positions), L layers, M = P * (L + 1) states of a question, D width, R directions, C classes of tokens, T tokens
of all steps, O tokens of one step, B resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.analysis.interventions import other_questions
from coconut.analysis.linear_probes import directions, fit, where
from coconut.analysis.probes import Subject
from coconut.analysis.states import need_places, slot_states
from coconut.data.examples import Example
from coconut.data.tokenization import encode_texts
from coconut.evaluation.evaluator import wilson_interval
from coconut.generation.room import indices_that_fit
from coconut.methods import PromptFormat
from coconut.models.latent_lm import LatentLM
from coconut.runs.study import NotApplicable, Study

MAX_FITTED = 2000  # questions that probes are fitted on
HELD_OUT = 5  # one in so many of them chooses weight decays, layers and the best position
MIN_QUESTIONS = 50  # that have a token, to fit on and to measure
MAX_SHARE = 0.95  # of a token's most frequent value; what is the same in more questions is left out
MAX_OFFSETS = 6  # tokens of a step, the first ones that are not left out
MAX_TOKENS = 40  # the most frequent values of a token; all others are one class
MAX_DIRECTIONS = 256  # principal components that a probe reads
WEIGHT_DECAYS = (0.1, 0.01, 0.001)
MISSING = -1  # the class in questions without the token
RESAMPLES = 2000
SEED = 0


def readout(subject: Subject, training: Sequence[Example] | None = None) -> list[Study]:
    """The studies `readout`, a row for each step and place, and `readout_layers`, for each step, place and layer.

    For each place of the slot and each layer a softmax-linear probe on the hidden state predicts the tokens of each
    written step (unified latent probe, arXiv 2606.20075). The probes are fitted on up to MAX_FITTED of the `training`
    questions and measured on those of the subject; without `training`, on one half of these and on the other.

    `accuracy`: the share of right tokens, a mean over the step's tokens. `majority`: that of the value which is most
    frequent in the fitting questions. `information`, in nats: the mean over the tokens of max(0, entropy of the token -
    cross-entropy of the probe), both on the questions that are measured. It estimates from below the mutual information
    of state and token, since no predictor has a cross-entropy below the conditional entropy (predictive V-information,
    Xu et al., arXiv 2002.10689). `entropy`: the most that it can be.
    Controls: `other`, the same probes on the states of another question; `shuffled`, probes with the same weight decay
    fitted to the tokens of other questions (selectivity, Hewitt and Liang, arXiv 1909.03368); `pauses`, probes fitted
    at the same place after pauses in place of thoughts, None for a model of pauses. Intervals are 95 % bootstrap
    intervals over questions, of what is fitted once.

    `readout`: each place at the `layer` where the cross-entropy on held-out fitting questions is lowest, pauses at
    theirs. `over_X`: the accuracy minus that of X by pairs, for majority, other, shuffled, pauses and `before` (place
    0). `best`: the position whose held-out cross-entropy is lowest.
    `readout_layers`: `of` names the states: "thoughts" or "pauses", "other", "shuffled", and after thoughts "pauses".
    facts: `fitted_from` ("training" or "test" questions), `fitted_on`, `held_out`, `measured`; `offsets`: the measured
    tokens of each step, counted from its first; `left_out`: the others as `constant` (MAX_SHARE), `rare`
    (MIN_QUESTIONS) and `further` (MAX_OFFSETS), and the `steps` with no token left; `max_tokens`, `directions`,
    `weight_decays`.

    Raises NotApplicable if the slot is empty, for states of several widths, without written steps, and if fewer than
    MIN_QUESTIONS questions have them.
    """
    lm = subject.lm
    need_places(lm)
    fitted, measured = _questions(subject, training)
    targets, facts = _targets(lm, fitted, [subject.examples[i] for i in measured])
    fitted_ids = subject.encode(fitted)
    measured_ids = [subject.question_ids[i] for i in measured]
    own = f"{lm.reasoning.slot.noun}s"
    readings: dict[str, Readings] = {}
    P = num_directions = 0
    for of in dict.fromkeys((own, "pauses")):
        both = [slot_states(lm, ids, subject.batch_size, pauses=of == "pauses") for ids in (fitted_ids, measured_ids)]
        P = both[0].shape[1]
        with torch.autocast(lm.device.type, enabled=False):
            fitted_MFR, measured_MNR = directions(
                both[0].flatten(1, 2), both[1].flatten(1, 2), lm.device, MAX_DIRECTIONS
            )
            del both
            num_directions = fitted_MFR.shape[2]
            readings |= _read(targets, fitted_MFR, measured_MNR, of, controls=of == own)
    facts |= {
        "fitted_from": "test" if training is None else "training", "fitted_on": len(fitted),
        "held_out": 1 / HELD_OUT, "measured": len(measured), "max_tokens": MAX_TOKENS, "directions": num_directions,
        "weight_decays": list(WEIGHT_DECAYS),
    }  # fmt: skip
    rows, by_layer = _rows(targets, readings, own, P)
    return [Study("readout", rows, facts), Study("readout_layers", by_layer, facts)]


def _questions(subject: Subject, training: Sequence[Example] | None) -> tuple[list[Example], list[int]]:
    """The questions to fit on, and the indices of those to measure. No question is in both."""
    examples, random = subject.examples, np.random.default_rng(SEED)
    if training is None:
        order = random.permutation(len(examples)).tolist()
        half = len(order) // 2
        return [examples[i] for i in sorted(order[half:])], sorted(order[:half])
    asked = {example.question for example in examples}
    usable = [example for example in training if example.steps and example.question not in asked]
    chosen = random.choice(len(usable), min(MAX_FITTED, len(usable)), replace=False) if usable else []
    fitted = [usable[i] for i in sorted(chosen)]
    asked_by = subject.free or subject.lm  # the model that may take more thoughts asks each question as well
    fitting = indices_that_fit(asked_by, [example.question for example in fitted], int(bool(subject.mode)))
    fitted = [fitted[i] for i in fitting]
    return [fitted[i] for i in subject.with_this_count(fitted)], list(range(len(examples)))


# The tokens of the steps.


@dataclass(frozen=True)
class Target:
    """The token of a step (counted from 1) at an offset from the step's first.

    Its classes are the most frequent values in the fitting questions, beginning with the most frequent one, and a last
    class for all other values. MISSING is the class in questions without this token.
    """

    step: int
    offset: int
    num_classes: int
    fitted_F: Tensor
    measured_N: Tensor


def _targets(
    lm: LatentLM, fitted: Sequence[Example], measured: Sequence[Example]
) -> tuple[list[Target], dict[str, Any]]:
    """What is predicted, step by step, and facts about what is left out. Raises NotApplicable if nothing is left."""
    most = max((len(example.steps) for example in measured), default=0)
    if not most:
        raise NotApplicable("The questions have no written steps that could be read out.")
    targets: list[Target] = []
    offsets: dict[str, list[int]] = {}
    left_out: dict[str, Any] = {"constant": {}, "rare": {}, "further": {}, "steps": []}
    tokens_of = [_step_tokens(lm, examples) for examples in (fitted, measured)]
    for step in range(1, most + 1):
        kept: list[int] = []
        longest = max(len(steps[step - 1]) for steps in tokens_of[1] if len(steps) >= step)
        for offset in range(longest):
            fitted_F, measured_N = ([_token(steps, step, offset) for steps in tokens] for tokens in tokens_of)
            counts = Counter(token for token in fitted_F if token != MISSING)
            fewest = min(counts.total(), sum(token != MISSING for token in measured_N))
            if fewest < MIN_QUESTIONS:
                reason = "rare"
            elif max(counts.values()) > MAX_SHARE * counts.total():
                reason = "constant"
            elif len(kept) == MAX_OFFSETS:
                reason = "further"
            else:
                kept.append(offset)
                by_count = sorted(counts, key=lambda token: (-counts[token], token))[:MAX_TOKENS]
                class_of = {MISSING: MISSING} | {token: number for number, token in enumerate(by_count)}
                classes = (
                    torch.tensor([class_of.get(token, len(by_count)) for token in tokens])
                    for tokens in (fitted_F, measured_N)
                )
                targets.append(Target(step, offset, len(by_count) + 1, *classes))
                continue
            left_out[reason].setdefault(str(step), []).append(offset)
        if kept:
            offsets[str(step)] = kept
        else:
            left_out["steps"].append(step)
    if not targets:
        raise NotApplicable(
            f"A token of a step is read out if at least {MIN_QUESTIONS} questions have it, to fit on and to measure, "
            f"and fewer than {MAX_SHARE:.0%} of them the same one. No token is so, with {len(fitted)} questions to fit "
            f"on and {len(measured)} to measure."
        )
    return targets, {"offsets": offsets, "left_out": left_out}


def _step_tokens(lm: LatentLM, examples: Sequence[Example]) -> list[list[list[int]]]:
    """The token ids of each step of each example, as they are written in training."""
    template = lm.reasoning.format.step
    texts = [PromptFormat.fill(template, step) for example in examples for step in example.steps]
    ids = iter(encode_texts(lm.tokenizer, texts))
    return [[next(ids) for _ in example.steps] for example in examples]


def _token(steps: list[list[int]], step: int, offset: int) -> int:
    return steps[step - 1][offset] if len(steps) >= step and len(steps[step - 1]) > offset else MISSING


# The probes.


@dataclass(frozen=True)
class Readings:
    """What the probes on one kind of states say, for each of T tokens.

    `right` (T, M, N): whether they name the token. `gain` (T, M, N): the log-probability of the token beyond that of
    its frequency, nan without the token. `held_out` (T, M): the cross-entropy on held-out fitting questions.
    """

    right: np.ndarray
    gain: np.ndarray
    held_out: np.ndarray


def _read(
    targets: Sequence[Target], fitted_MFR: Tensor, measured_MNR: Tensor, of: str, *, controls: bool
) -> dict[str, Readings]:
    """Fit and measure the probes of each target. `controls`: also on other questions' states and shuffled tokens."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {of: []}
    device = fitted_MFR.device
    for number, target in enumerate(targets):
        random = np.random.default_rng([SEED, number])
        have = random.permutation(np.flatnonzero(target.fitted_F != MISSING))
        held_out, used = (torch.from_numpy(part) for part in (have[::HELD_OUT], np.delete(have, np.s_[::HELD_OUT])))
        states_MFR, classes_F = fitted_MFR[:, used.to(device)], target.fitted_F[used].to(device)
        held_MFR, held_F = fitted_MFR[:, held_out.to(device)], target.fitted_F[held_out].to(device)
        lowest_M = torch.full_like(states_MFR[:, 0, 0], torch.inf)
        decays_M, probes, chosen = lowest_M.clone(), None, None
        for decay in WEIGHT_DECAYS:
            probes = fit(states_MFR, classes_F, target.num_classes, torch.full_like(lowest_M, decay), probes)
            loss_M = -probes(held_MFR)[:, held_F, torch.arange(len(held_F))].mean(1)
            lower_M = loss_M < lowest_M
            chosen = where(lower_M, probes, chosen or probes)
            decays_M, lowest_M = decays_M.where(~lower_M, decay), lowest_M.where(~lower_M, loss_M)
        assert chosen
        indices = torch.nonzero(target.measured_N != MISSING)[:, 0]
        log_probs_MCN = chosen(measured_MNR[:, indices.to(device)]).cpu()
        held_out_M = lowest_M.cpu().numpy()
        found[of].append((*_measured(log_probs_MCN, target, indices), held_out_M))
        if controls:
            of_others = log_probs_MCN[:, :, other_questions(len(indices))]
            found.setdefault("other", []).append((*_measured(of_others, target, indices), held_out_M))
            shuffled_F = classes_F[torch.from_numpy(random.permutation(len(classes_F))).to(device)]
            shuffled = fit(states_MFR, shuffled_F, target.num_classes, decays_M)(measured_MNR[:, indices.to(device)])
            found.setdefault("shuffled", []).append((*_measured(shuffled.cpu(), target, indices), held_out_M))
    return {name: Readings(*map(np.stack, zip(*each, strict=True))) for name, each in found.items()}


def _measured(log_probs_MCN: Tensor, target: Target, indices: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`right` and `gain` (M, N) of Readings, nan for questions without the token. `indices`: the others."""
    classes = target.measured_N[indices]
    named_MN = log_probs_MCN[:, :-1].argmax(1)  # the last class names no token
    frequencies_C = torch.bincount(classes, minlength=target.num_classes) / len(classes)
    gain_MN = log_probs_MCN[:, classes, torch.arange(len(classes))] - frequencies_C[classes].log()
    both = np.full((2, len(gain_MN), len(target.measured_N)), np.nan, np.float32)
    both[0][:, indices], both[1][:, indices] = named_MN == classes, gain_MN
    return both[0], both[1]


# The rows.


def _rows(
    targets: Sequence[Target], readings: dict[str, Readings], own: str, P: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `readout`, and those of `readout_layers`."""
    N = len(targets[0].measured_N)
    weights_BN = np.random.default_rng(SEED).multinomial(N, np.full(N, 1 / N), size=RESAMPLES).astype(np.float64)
    rows: list[dict[str, Any]] = []
    by_layer: list[dict[str, Any]] = []
    for step, numbered in groupby(range(len(targets)), key=lambda t: targets[t].step):
        tokens = list(numbered)
        right = {of: _by_place(each.right[tokens], P) for of, each in readings.items()}
        gain = {of: _by_place(each.gain[tokens], P) for of, each in readings.items()}
        held_out = {of: _by_place(each.held_out[tokens, :, None], P)[..., 0].mean(0) for of, each in readings.items()}
        for of in readings:
            accuracy, information = _mean(right[of], weights_BN), _mean(gain[of], weights_BN, least=0.0)
            for place, layer in np.ndindex(*held_out[of].shape):
                by_layer.append({
                    "of": of, "step": step, "place": place, "layer": layer,
                    **_bounds("accuracy", accuracy, place, layer), **_bounds("information", information, place, layer),
                })  # fmt: skip

        layer_P = {of: held_out[of].argmin(1) for of in readings}
        at_layer = {of: right[of][:, np.arange(P), layer_P[of]] for of in readings}  # (O, P, N)
        accuracy = _mean(at_layer[own], weights_BN)
        information = _mean(gain[own][:, np.arange(P), layer_P[own]], weights_BN, least=0.0)
        majority_ON = np.stack([_majority(targets[t]) for t in tokens])
        references = {
            "majority": np.repeat(majority_ON[:, None], P, axis=1), "other": at_layer["other"],
            "shuffled": at_layer["shuffled"], "before": np.repeat(at_layer[own][:, :1], P, axis=1),
            "pauses": at_layer["pauses"] if own != "pauses" else None,
        }  # fmt: skip
        against = {
            name: (_mean(values, weights_BN)[0], _mean(at_layer[own] - values, weights_BN, lowest=-1.0))
            for name, values in references.items()
            if values is not None
        }
        best = 1 + int(held_out[own].min(1)[1:].argmin())
        entropy = float(np.mean([_entropy(targets[t]) for t in tokens]))
        for place in range(P):
            row: dict[str, Any] = {
                "step": step, "place": place, "layer": int(layer_P[own][place]), "best": place == best,
                "questions": int((~np.isnan(majority_ON)).any(0).sum()), "tokens": len(tokens),
                **_bounds("accuracy", accuracy, place), "entropy": entropy,
                **_bounds("information", information, place),
            }  # fmt: skip
            for name in references:
                mean_P, over = against.get(name, (None, None))
                if place == 0 and name in ("before", "pauses"):  # the same state
                    mean_P = over = None
                row[name] = None if mean_P is None else float(mean_P[place])
                row |= _bounds(f"over_{name}", over, place)
            rows.append(row)
    return rows, by_layer


def _by_place(values_OMN: np.ndarray, P: int) -> np.ndarray:
    """(O, P, L + 1, N)"""
    return values_OMN.reshape(len(values_OMN), P, -1, values_OMN.shape[2])


def _majority(target: Target) -> np.ndarray:
    """(N,) whether the token has the value that is most frequent in the fitting questions, nan without the token."""
    classes = target.measured_N.numpy()
    return np.where(classes == MISSING, np.nan, classes == 0)


def _entropy(target: Target) -> float:
    classes = target.measured_N[target.measured_N != MISSING]
    return float(torch.special.entr(torch.bincount(classes) / len(classes)).sum())


def _mean(
    values: np.ndarray, weights_BN: np.ndarray, *, least: float | None = None, lowest: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over tokens of the means over questions, with the ends of its bootstrap interval.

    `values` (O, ..., N) are nan in questions without the token. `least`: the means over questions are at least this.
    Without it the values are accuracies or differences of them, of at least `lowest`: where the bootstrap has no width,
    the interval is as wide as Wilson's of a share of 0.
    """
    has_ON = ~np.isnan(values.reshape(len(values), -1, values.shape[-1])[:, 0])
    shape, filled = values.shape[1:-1], np.nan_to_num(values).reshape(len(values), -1, values.shape[-1])
    drawn_BOX = np.stack([weights_BN @ each.T for each in filled], axis=1) / (weights_BN @ has_ON.T)[..., None]
    mean_OX = filled.sum(-1) / has_ON.sum(-1, keepdims=True)
    if least is not None:
        drawn_BOX, mean_OX = np.maximum(drawn_BOX, least), np.maximum(mean_OX, least)
    mean_X = mean_OX.mean(0)
    low_X, high_X = np.quantile(drawn_BOX.mean(1), (0.025, 0.975), axis=0)
    if least is None:
        wilson_width = wilson_interval(0, int(has_ON.any(0).sum()))[1]
        has_no_width = high_X - low_X < 1e-9
        low_X = np.where(has_no_width, np.maximum(mean_X - wilson_width, lowest), low_X)
        high_X = np.where(has_no_width, np.minimum(mean_X + wilson_width, 1.0), high_X)
    return mean_X.reshape(shape), low_X.reshape(shape), high_X.reshape(shape)


def _bounds(name: str, values: tuple[np.ndarray, ...] | None, *index: int) -> dict[str, float | None]:
    """The entries of a row: `low` and `high` for the accuracy, NAME_low and NAME_high otherwise."""
    ends = ("low", "high") if name == "accuracy" else (f"{name}_low", f"{name}_high")
    found = (None, None, None) if values is None else (float(each[index]) for each in values)
    return dict(zip((name, *ends), found, strict=True))
