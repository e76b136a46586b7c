"""Terms of the loss: equal to a slow reading of each, for any split of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.family_table import FAMILIES, Family, base_of, new_tokenizer
from helpers.models import build, byte_level_tokenizer, in_float64, relative
from helpers.processes import together
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from coconut.config import EngineConfig, EngineKind, OptimizerConfig, Precision
from coconut.data.batching import Batch, micro_batches
from coconut.data.examples import Example
from coconut.data.sequences import EpochView, Layout
from coconut.data.tokenization import encode_answers, tokenize
from coconut.engine.base import Engine, TermSums, total_statistics, trainable_parameters
from coconut.engine.factory import make_engine
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.methods import (
    At,
    Curriculum,
    Plan,
    Projector,
    PromptFormat,
    Reasoning,
    Slot,
    Source,
    Term,
    Update,
    get_method,
    plan,
)
from coconut.models.latent_lm import LatentLM
from coconut.objectives.training_model import TrainingModel

FORMAT = PromptFormat("{}", "{} a", "b {}")
METHODS = ("codi", "pause_codi", "pccot", "kava", "mux", "lotus", "sim_cot_codi", "sim_cot")
OF_WORDS = ("soft_coconut", "lt_tuning", "colar", "c_mtp")  # whose thoughts are made of words' embeddings


def examples(count: int = 40) -> list[Example]:
    """Chains of one to five steps, with words that the small models' tokenizer has."""
    random = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(map(str, random.integers(0, 40, random.integers(least, most))))

    return [Example(words(2, 9), tuple(words(1, 4) for _ in range(1 + k % 5)), words(1, 3)) for k in range(count)]


Options = dict[str, dict[str, Any]]  # of terms
NO_OPTIONS: Options = {}


def stages(method: str, options: Options = NO_OPTIONS, slot: dict[str, Any] | None = None, **weights: float) -> Plan:
    curriculum = Curriculum(
        thoughts_per_step=2, max_stage=2, extra_stage=True, stage0_length=1, stage_length=1, total_length=4,
        num_thoughts=3 if get_method(method).fixed_length else None,
    )  # fmt: skip
    slots = {
        "codi": {"width": 12}, "sim_cot_codi": {"width": 12}, "pccot": {"iterations": 2},
        "lt_tuning": {"layer": 1, "top_k": 5}, "colar": {"width": 12}, "c_mtp": {"width": 12},
    }  # fmt: skip
    return plan(method, curriculum, weights, slot or slots.get(method), options)


def trained(
    method: str, family: str = "gpt2", dtype: torch.dtype = torch.float64, options: Options = NO_OPTIONS,
    slot: dict[str, Any] | None = None, **weights: float,
) -> TrainingModel:  # fmt: skip
    """A model with the terms of this method, in the form of its last stage."""
    its = stages(method, options, slot, **weights)
    last = its.stages[-1].form.slot
    lm = build(family, torch.float32, slot=last, num_thoughts=its.stages[-1].form.slot_length, format=FORMAT)
    lm.add_rates(last.max_group, "random")
    lm = lm.to(dtype)
    module = TrainingModel(lm, its).to(dtype)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return module.train()


def view_of(module: TrainingModel, method: str, count: int = 40, stage: int = -1) -> EpochView:
    its = stages(method, NO_OPTIONS, None, **{term.name: term.weight for term in module.terms})
    its = replace(its, terms=module.terms)
    data = tokenize(examples(count), module.lm.tokenizer, FORMAT)
    return EpochView(data, its, its.stages[stage], module.lm.special, seed=0, epoch=0)


def update(module: TrainingModel, parts: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of an update, and the gradients of their sum, as an engine computes them."""
    module.zero_grad()
    terms = TermSums(module.loss, parts, World())
    given = total_statistics(module.loss, module, parts, World(), torch.device("cpu"))
    for part in parts:
        terms.add(module.loss.sums(module, part, *given)).backward()
    return terms.means(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# --- the slow reading: one example at a time, without padding, without a cache --------------------------


@dataclass
class Flat:
    """One sequence, run alone: the states (T, D) of all layers, the thoughts as fed, the states before them after each
    iteration, log-probabilities (T, V).
    """

    item: Layout
    layers: list[Tensor]
    fed: Tensor
    before: list[Tensor]
    keys_values: list[tuple[Tensor, Tensor]]  # of each layer, (H, T, d)
    attention: list[Tensor]  # of each layer, (Q, T, T)
    log_probs: Tensor
    head: Any


def flat_run(lm: LatentLM, item: Layout) -> Flat:
    ids = torch.from_numpy(item.ids.astype(np.int64))
    embeds = list(lm.base.get_input_embeddings()(ids))
    thoughts = [t for t, token in enumerate(ids.tolist()) if token == lm.latent_id]
    tokens, slot, before = list(embeds), lm.feedback.slot, []
    blocks = -(-len(thoughts) // slot.iterations_per) if slot.iterations_per else 1
    for updated in [thoughts] * slot.iterations * blocks if slot.in_parallel else [[t] for t in thoughts]:
        states_TD = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None]).last_hidden_state[0]
        if slot.in_parallel:
            before.append(states_TD[[t - 1 for t in thoughts]])
        for t in updated:
            state = states_TD[t if slot.update is Update.loop else t - 1]
            embeds[t] = flat_projection(lm, state) + (tokens[t] if slot.update is Update.loop else 0)
    out = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None], output_hidden_states=True, use_cache=True)
    lm.base.set_attn_implementation("eager")
    attention = lm.base.base_model(inputs_embeds=torch.stack(embeds)[None], output_attentions=True).attentions
    lm.base.set_attn_implementation("sdpa")
    fed = torch.stack([embeds[t] for t in thoughts]) if thoughts else torch.zeros(0)
    before.append(out.hidden_states[-1][0][[t - 1 for t in thoughts]])
    head: Any = lm.base.get_output_embeddings()
    layers = [states[0] for states in out.hidden_states]
    cached = [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]
    weights = [of_layer[0] for of_layer in attention]
    return Flat(item, layers, fed, before, cached, weights, head(layers[-1]).log_softmax(-1), head)


def flat_projection(lm: LatentLM, state: Tensor) -> Tensor:
    if not lm.feedback.has_weights:
        return state
    parts: Any = lm.feedback.projector
    hidden = F.gelu(state @ parts[0].weight.T + parts[0].bias) @ parts[2].weight.T + parts[2].bias
    state = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
    return state * parts[3].weight + parts[3].bias


def slow_tokens(term: Term, objective: Any, rows: list[dict[str, Flat]]) -> Tensor:
    log_probs = [
        row.log_probs[t - 1, int(row.item.ids[t])]
        for row in (row[term.of] for row in rows)
        for t in range(row.item.num_prompt, len(row.item.ids))
    ]
    return -torch.stack(log_probs).mean()


def slow_states(term: Term, objective: Any, rows: list[dict[str, Flat]]) -> Tensor:
    def at_prompt(form: str) -> Tensor:
        read, first = [row[form] for row in rows], term.options["first_layer"]
        layers = [row.layers[first:] for row in read]
        return torch.stack(
            [
                torch.stack([states[row.item.answer_prompt] for states in of])
                for row, of in zip(read, layers, strict=True)
            ]
        )

    student_NLD, teacher_NLD = at_prompt(term.of), at_prompt(term.to).detach()
    gap = student_NLD - teacher_NLD
    distance = torch.where(gap.abs() < 1, gap**2 / 2, gap.abs() - 0.5).mean(2)
    deviation_L = torch.stack([teacher_NLD[:, layer].std() for layer in range(teacher_NLD.shape[1])])
    return (distance / deviation_L).mean()


def slow_steps(term: Term, objective: Any, rows: list[dict[str, Flat]]) -> Tensor:
    decoder, c, losses = objective.decoder, objective.thoughts_per_step, []
    for row in (row[term.of] for row in rows):
        for group, step in enumerate(row.item.spans):
            if len(step):
                ids = torch.from_numpy(step.astype(np.int64))
                inputs = torch.cat([row.fed[group * c : group * c + c], decoder.get_input_embeddings()(ids)])
                scores = decoder(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
                losses.append(-torch.stack([scores[c - 1 + i, token] for i, token in enumerate(ids)]).mean())
    return torch.stack(losses).mean()


def slow_spans(term: Term, objective: Any, rows: list[dict[str, Flat]]) -> Tensor:
    losses = []
    for row in (row[term.of] for row in rows):
        for number, span in enumerate(row.item.spans):
            target_V = torch.zeros(row.log_probs.shape[1], dtype=torch.float64)
            for place, word in enumerate(span):
                target_V[int(word)] += term.options["rho"] ** place
            if not len(span):
                continue
            c = objective.thoughts_per_span
            loops = objective.slot.iterations * (1 + number * c // objective.thoughts_per_step)
            run = loops if term.options.get("iteration") == "own" else -1
            read = row.fed if term.at is At.thoughts else row.before[run]
            for state_D in read[number * c : number * c + c]:
                log_probs_V = (row.head(state_D) / term.options["temperature"]).log_softmax(-1)
                losses.append(F.kl_div(log_probs_V, target_V / target_V.sum(), reduction="sum"))
    return torch.stack(losses).mean()


def slow_cache(term: Term, objective: Any, rows: list[dict[str, Flat]]) -> Tensor:
    total = torch.zeros(())
    for row in rows:
        student, teacher = row[term.of], row[term.to]
        chain = teacher.item.chain.tolist()
        thoughts = range(student.item.slot_start, student.item.slot_start + len(student.fed))
        layers = len(student.keys_values)
        for ours, theirs, weights in zip(student.keys_values, teacher.keys_values, teacher.attention, strict=True):
            heads = ours[0].shape[0]
            for head in range(heads):
                kept = chain
                if term.options["compression"] == "rkv" and len(chain) > len(thoughts):
                    scores = slow_rkv(
                        theirs[0][head].detach(), weights.detach(), head, heads, chain, term.options["importance"]
                    )
                    kept = sorted(sorted(chain, key=lambda t: -scores[t])[: len(thoughts)])
                pairs = list(zip(thoughts, kept, strict=False))
                for one, other in zip(ours, theirs, strict=True):
                    for thought, token in pairs:
                        gap = (one[head, thought] - other[head, token].detach()).abs()
                        distance = {"l1": gap, "mse": gap**2, "smooth_l1": torch.where(gap < 1, gap**2 / 2, gap - 0.5)}
                        mean = distance[term.options["distance"]].mean()
                        total = total + mean / (2 * len(pairs) * layers * heads * len(rows))
    return total


def slow_rkv(
    keys: Tensor, weights: Tensor, head: int, heads: int, chain: list[int], importance: float
) -> dict[int, float]:
    """The score of each token of a chain in one head of one layer. `weights` (Q, T, T)"""
    share = weights.shape[0] // heads
    own = weights[head * share : (head + 1) * share, chain[-1] + 1 :].mean((0, 1))
    attention = {t: float(own[t] / own[chain].sum()) for t in chain}
    cosine = {
        t: float(np.mean([F.cosine_similarity(keys[t], keys[u], dim=0).item() for u in chain if u != t] or [0.0]))
        for t in chain
    }
    total = sum(np.exp(value) for value in cosine.values())
    return {t: importance * attention[t] + (1 - importance) * (1 - np.exp(cosine[t]) / total) for t in chain}


SLOW_TERMS = {  # by objective
    "tokens": slow_tokens, "states": slow_states, "steps": slow_steps, "spans": slow_spans, "cache": slow_cache,
}  # fmt: skip


def flat_terms(module: TrainingModel, view: EpochView) -> dict[str, Tensor]:
    rows = [
        {name: flat_run(module.lm, item) for name, item in zip(view.names, view.layouts(index), strict=True)}
        for index in range(len(view))
    ]
    return {term.name: SLOW_TERMS[term.objective](term, module.objectives[term.name], rows) for term in module.terms}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_terms_and_gradients_equal_a_slow_reading(method: str, family: str) -> None:
    module = trained(method, family, teacher=0.5, states=20.0) if method == "codi" else trained(method, family)
    equals_a_slow_reading(module, method, family)


@pytest.mark.parametrize(
    ("method", "options", "slot"),
    [
        ("lotus", {"spans": {"iteration": "own"}}, None),
        ("lotus", {"spans": {"iteration": "own", "spans": "steps"}}, {"iterations": 2, "projector": Projector.mlp_ln}),
        ("lotus", {"spans": {"rho": 0.5, "spans": "even"}}, {"update": Update.sequential}),
        ("mux", {"spans": {"spans": "even", "temperature": 2.0}}, {"update": Update.jacobi, "iterations": 2}),
        ("mux", {"spans": {"spans": "tokens"}}, {"update": Update.loop, "iterations": 1}),
        ("mux", {"spans": {"spans": "steps"}}, None),
        ("kava", {"cache": {"compression": "uniform", "distance": "l1"}}, None),
        ("kava", {"cache": {"compression": "random", "distance": "mse"}}, {"update": Update.sequential}),
        ("kava", {"cache": {"importance": 1.0}}, {"update": Update.loop, "iterations": 1}),
    ],
)  # fmt: skip
def test_every_option_equals_a_slow_reading(method: str, options: Options, slot: dict[str, Any] | None) -> None:
    equals_a_slow_reading(trained(method, options=options, slot=slot), method, "gpt2")


def equals_a_slow_reading(module: TrainingModel, method: str, family: str) -> None:
    if family == "llama":
        in_float64(module)  # pyright: ignore[reportArgumentType]
    view = view_of(module, method, 15)
    slow = flat_terms(module, view)
    module.zero_grad()
    torch.stack([term.weight * slow[term.name] for term in module.terms]).sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    for size in (1, 7, 40):
        means, gradients = update(module, list(micro_batches(view, np.arange(len(view)), size)))
        torch.testing.assert_close(means, torch.stack([slow[term.name] for term in module.terms]), rtol=1e-12, atol=0)
        assert gradients.keys() == expected.keys()
        scale = max(float(g.norm()) for g in expected.values())
        for name, gradient in gradients.items():
            assert float((gradient - expected[name]).norm()) < 1e-12 * scale * 10, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_both_paths_read_the_same_states_and_thoughts(family: str) -> None:
    module = trained("sim_cot_codi", family)
    (batch,) = micro_batches(view_of(module, "sim_cot_codi", 12), np.arange(12), 12)
    cached = module._run(batch)
    module.lm.forward = lambda *args, **kw: LatentLM.forward(  # pyright: ignore
        module.lm, *args, **{**kw, "use_cache": False}
    )
    recomputed = module._run(batch)
    for name in ("target_logits", "states", "thoughts"):
        torch.testing.assert_close(getattr(cached, name), getattr(recomputed, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", OF_WORDS)
def test_an_update_is_the_same_in_any_split(method: str) -> None:
    module = trained(method)
    view = view_of(module, method, 12)
    means, expected = update(module, list(micro_batches(view, np.arange(12), 12)))
    for size in (1, 2):
        same, gradients = update(module, list(micro_batches(view, np.arange(12), size)))
        torch.testing.assert_close(same, means, rtol=1e-11, atol=0)
        assert relative(gradients, expected) < 1e-9


@pytest.mark.parametrize("method", ["kava", "sim_cot_codi", *OF_WORDS])
def test_every_term_is_computed_in_float32_under_autocast(method: str) -> None:
    module = trained(method, dtype=torch.float32)
    (batch,) = micro_batches(view_of(module, method, 12), np.arange(12), 12)
    expected = module(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = module._run(batch)
        assert output.target_logits is not None
        assert output.target_logits.dtype is torch.bfloat16
        terms = [objective(module.lm, output, batch, None) for objective in module.objectives.values()]
    assert {term.dtype for term in terms} == {torch.float32}
    torch.testing.assert_close(torch.stack(terms), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("option", ["off", "activation_checkpointing"])
@pytest.mark.parametrize("method", ["sim_cot_codi", *OF_WORDS])
def test_acceleration_changes_no_term(method: str, option: str) -> None:
    module = trained(method)
    parts = list(micro_batches(view_of(module, method, 12), np.arange(12), 5))
    means, gradients = update(module, parts)
    if option == "off":
        module.lm.acceleration.mechanisms = frozenset()
    else:
        module.lm.acceleration.activation_checkpointing = True
    same_means, same_gradients = update(module, parts)
    torch.testing.assert_close(means, same_means, rtol=1e-9, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-6, atol=1e-10)


def test_measuring_the_update_leaves_the_random_generators_alone() -> None:
    module = trained("codi")
    parts = list(micro_batches(view_of(module, "codi", 12), np.arange(12), 5))
    before = torch.get_rng_state()
    total_statistics(module.loss, module, parts, World(), torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())


def test_without_its_terms_a_method_is_its_host() -> None:
    host = plan("without_curriculum", Curriculum(max_stage=2, extra_stage=True))
    bare = plan("codi", Curriculum(max_stage=2), {"teacher": 0, "states": 0}, {"projector": Projector.none})
    assert bare.terms == host.terms
    ours, theirs = bare.stages[0].form, host.stages[0].form
    assert replace(ours, thoughts_per_step=theirs.thoughts_per_step) == theirs
    assert bare.stages[0].together == (ours,), "no teacher is read"
    curriculum = Curriculum(max_stage=2, mixing_probability=0.1)
    assert replace(plan("sim_cot", curriculum, {"steps": 0}), method="coconut") == plan("coconut", curriculum)
    pauses = plan("pause_codi", curriculum, {"teacher": 0, "states": 0}).stages[0].form
    theirs = plan("pause", curriculum).stages[0].form
    assert replace(pauses, thoughts_per_step=theirs.thoughts_per_step) == theirs
    for method, term, host in (("sim_cot_codi", "steps", "codi"), ("mux", "spans", "codi"), ("kava", "cache", "pccot")):
        without = plan(method, curriculum, {term: 0}, {"projector": Projector.mlp_ln})
        assert replace(without, method=host) == plan(host, curriculum, slot={"projector": Projector.mlp_ln})
    in_sequence = plan("lotus", curriculum, {"spans": 0}, {"update": Update.sequential})
    assert replace(in_sequence, method="coconut") == plan("coconut", curriculum)


def test_a_decoder_of_fewer_layers_begins_as_the_models_first_ones() -> None:
    curriculum = Curriculum(max_stage=2, total_length=20)
    lm = build("llama")
    small: Any = TrainingModel(lm, plan("sim_cot", curriculum, options={"steps": {"layers": 1}}))
    decoder = small.objectives["steps"].decoder
    assert decoder.config.num_hidden_layers == 1
    theirs = lm.base.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in decoder.state_dict().items())
    assert not {id(weight) for weight in decoder.parameters()} & {id(weight) for weight in lm.parameters()}
    with pytest.raises(ValueError, match="has 3 layers, and the model 2"):
        TrainingModel(lm, plan("sim_cot", curriculum, options={"steps": {"layers": 3}}))


def test_states_of_two_widths_are_not_compared() -> None:
    (family,) = (family for family in FAMILIES if family.name == "OPT 350M")
    lm = LatentLM.from_base(base_of(family), new_tokenizer())
    with pytest.raises(ValueError, match="are 32 wide in its layers and 16 at its end"):
        TrainingModel(lm, plan("codi", Curriculum(num_thoughts=3)))


def test_training_modules_are_saved_beside_the_model_and_not_in_it(tmp_path: Any) -> None:
    module = trained("sim_cot_codi", dtype=torch.float32)
    module.save_pretrained(tmp_path)
    again = TrainingModel(LatentLM.from_pretrained(tmp_path), stages("sim_cot_codi"))
    again.load_training_modules(tmp_path)
    theirs = again.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in module.state_dict().items())
    assert again.lm.feedback.has_weights


def with_digits_apart() -> PreTrainedTokenizerFast:
    """Writes a space as a token of its own before a digit, as Llama's first tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])  # pyright: ignore
    tokenizer.train_from_iterator(["The answer is: ### cat 0123456789 ."] * 9, trainers.BpeTrainer(vocab_size=90))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["words", "bytes", "digits"])
def test_the_prompt_token_is_the_last_one_before_the_answers_first(kind: str) -> None:
    makers = {"words": lambda: build("gpt2").tokenizer, "bytes": byte_level_tokenizer, "digits": with_digits_apart}
    tokenizer = makers[kind]()
    template, answer = ("b {}", "4 5") if kind == "words" else ("The answer is: {} .", "42")
    form = PromptFormat(answer=template)
    text = form.fill(template, answer)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    _, (count,) = encode_answers(tokenizer, [answer], form)
    (_, end), (start, stop) = encoded["offset_mapping"][count - 1 : count + 1]
    assert not text[end:start].strip()
    assert end <= text.index(answer) < stop
    if kind == "digits":
        assert tokenizer.convert_ids_to_tokens(encoded["input_ids"])[count - 1] == "▁", "the space, after the colon"
    assert encode_answers(tokenizer, [answer], PromptFormat(answer="{}"))[1] == [0]


@pytest.mark.parametrize(
    ("method", "options", "slot", "message"),
    [
        ("mux", {"rho": 0}, None, "rho is 0.0; it must be above 0"),
        ("mux", {"temperature": -1}, None, "temperature is -1.0; it must be above 0"),
        ("mux", {"spans": "words"}, None, "spans is 'words'; it is one of steps, tokens, even, random"),
        ("lotus", {"iteration": "first"}, None, "iteration is 'first'; it is last or own"),
        ("lotus", {"iteration": "own"}, {"update": Update.sequential}, "not updated once for each step"),
        ("kava", {"compression": "best"}, None, "compression is 'best'; it is one of rkv, uniform, random"),
        ("kava", {"importance": 2}, None, "importance is 2.0; it must be between 0 and 1"),
        ("kava", {"distance": "l2"}, None, "distance is 'l2'; it is one of l1, smooth_l1, mse"),
        ("mux", {"steps": 1}, None, "has no option steps. Its options: spans, rho, temperature"),
        ("mux", {"rho": "abc"}, None, "term_options.spans.rho is 'abc'; it must be a number"),
        ("mux", {"temperature": float("inf")}, None, "temperature is inf; it must be a number"),
        ("kava", {"importance": None}, None, "importance is None; it must be a number"),
        ("kava", {"distance": ["l1"]}, None, "distance is .'l1'.; it must be a name"),
        ("sim_cot", {"layers": "abc"}, None, "layers is 'abc'; it must be a whole number"),
        ("cot", {}, {"update": Update.loop}, "slot of this method holds nothing. Leave out model.update"),
        ("pause", {}, {"update": Update.loop, "iterations": 3}, "slot of this method holds pause. Leave out"),
        ("codi", {}, {"update": Update.jacobi}, "model.update=jacobi .* Set model.iterations"),
        ("pccot", {}, {"update": Update.sequential, "iterations": 2}, r"computed one after the other\. Leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(method: str, options: Any, slot: dict[str, Any] | None, message: str) -> None:
    curriculum = Curriculum(num_thoughts=3 if get_method(method).fixed_length else None)
    term = get_method(method).terms[-1].name
    with pytest.raises(ValueError, match=message):
        TrainingModel(build("gpt2"), plan(method, curriculum, {}, slot, {term: options} if options else {}))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_keys_and_values_are_compared_in_every_family_without_windows(family: Family) -> None:
    """For any split of the update and on both paths."""
    torch.manual_seed(0)
    has_two_widths = "word_embed_proj_dim" in family.sizes and family.sizes["word_embed_proj_dim"] != 32
    its = stages("kava", states=float(not has_two_widths))
    form = its.stages[0].form
    lm = LatentLM.from_base(base_of(family), new_tokenizer(), reasoning=Reasoning(slot=form.slot, format=FORMAT))
    if "sliding_window" in family.sizes:
        with pytest.raises(ValueError, match=f"{family.model_type} has layers that keep only part of them"):
            TrainingModel(lm, its)
        return
    module = TrainingModel(lm, its).eval()
    view = view_of(module, "kava", 9)
    whole, parts, recomputed = (list(micro_batches(view, np.arange(9), size)) for size in (9, 2, 9))
    means, gradients = update(module, whole)
    for others, options in ((parts, {}), (recomputed, {"use_cache": False})):
        lm.forward = lambda *args, options=options, **kw: LatentLM.forward(lm, *args, **kw, **options)  # pyright: ignore
        same_means, same_gradients = update(module, others)
        torch.testing.assert_close(same_means, means, rtol=1e-5, atol=0)
        for name, gradient in gradients.items():
            assert float((gradient - same_gradients[name]).norm()) < 1e-4 * float(gradient.norm()) + 1e-6, name


# --- engines --------------------------------------------------------------------------------------------

ENGINE = EngineConfig(device="cpu", threads=1, timeout=120)
CONFIGS = [ENGINE, *(replace(ENGINE, kind=EngineKind.deepspeed, zero_stage=stage) for stage in range(4))]
SHARDED = CONFIGS[:1] + CONFIGS[2:]
BFLOAT16 = [replace(config, precision=Precision.bfloat16) for config in CONFIGS[::4]]
ENGINES_OF = {"sim_cot_codi": CONFIGS, "kava": CONFIGS[::4], "lotus": CONFIGS[::4], **dict.fromkeys(OF_WORDS, SHARDED)}


@dataclass
class Updates:
    """Loss, gradient norm and terms of each update; of the first one the gradients, on the main process."""

    numbers: list[tuple[float, ...]]
    gradients: dict[str, Tensor]


def three_updates(config: EngineConfig, world: World, method: str) -> Updates:
    """Updates of ten, two and one examples; one of two processes has no row in the last."""
    module = trained(method, dtype=torch.float32)
    view = view_of(module, method, 15)
    engine = make_engine(module, module.loss, config, OptimizerConfig(lr=1e-2, max_grad_norm=0.5), world)
    results, gradients = [], {}
    spans = ((10,), (10, 12), (14, 15))
    parts = [list(micro_batches(view, np.arange(*span), 3, world.rank, world.size)) for span in spans]
    engine.dry_run(parts[0][0])
    for update_parts in parts:
        done = engine.update(update_parts, lr=1e-2)
        gradients = gradients if results else first_gradients(engine, module)
        results.append((done.loss, done.grad_norm, *done.terms))
    with engine.full_module() as whole, TemporaryDirectory() as folder:
        if world.is_main:
            whole.save_pretrained(folder)
            again = TrainingModel(LatentLM.from_pretrained(folder), stages(method))
            again.load_training_modules(Path(folder))
            saved = again.state_dict()
            assert all(torch.equal(value, saved[name].to(value)) for name, value in whole.state_dict().items()), config
    return Updates(results, gradients)


def first_gradients(engine: Engine, module: TrainingModel) -> dict[str, Tensor]:
    """The clipped gradients of the only update so far, of which Adam's first moments are a tenth."""
    state = engine.state_dict()["optimizer"]["state"]
    names = [name for name, _ in trainable_parameters(module)]
    return {names[index]: 10 * moments["exp_avg"] for index, moments in state.items() if moments["exp_avg"].any()}


def update_before_thoughts(config: EngineConfig, world: World) -> tuple[float, ...]:
    """Loss and gradient norm of an update of stage 0, in which projector and decoder have nothing to do."""
    its = replace(stages("sim_cot"), stages=stages("sim_cot").stages[:1])
    lm = build("gpt2", torch.float32, slot=Slot(Source.thought, Projector.mlp_ln), format=FORMAT)
    module = TrainingModel(lm, its).train()
    view = EpochView(tokenize(examples(6), lm.tokenizer, FORMAT), its, its.stages[0], lm.special, seed=0, epoch=0)
    engine = make_engine(module, module.loss, config, OptimizerConfig(lr=1e-2, weight_decay=0.5), world)
    parts = list(micro_batches(view, np.arange(6), 6, world.rank, world.size))
    engine.dry_run(parts[0])
    before = {name: weight.detach().clone() for name, weight in module.objectives.named_parameters()}
    done = engine.update(parts, lr=1e-2)
    if not config.zero_stage:
        assert all(torch.equal(weight, before[name]) for name, weight in module.objectives.named_parameters())
    return done.loss, done.grad_norm


def check_engines() -> None:
    expected = {method: three_updates(ENGINE, World(), method) for method in ENGINES_OF}
    idle = update_before_thoughts(ENGINE, World())
    with init_distributed(ENGINE) as world:
        for method, configs in ENGINES_OF.items():
            for config in configs:
                found = three_updates(config, world, method)
                for ours, theirs in zip(found.numbers, expected[method].numbers, strict=True):
                    assert ours == pytest.approx(theirs, rel=2e-5), (method, config)
                if world.is_main:
                    assert relative(found.gradients, expected[method].gradients) < 1e-5, (method, config)
        for method in OF_WORDS:
            for config in BFLOAT16:
                found, theirs = three_updates(config, world, method), expected[method]
                losses = [row[0] for row in theirs.numbers]
                assert [row[0] for row in found.numbers] == pytest.approx(losses, rel=0.01), (method, config)
                if world.is_main:
                    assert relative(found.gradients, theirs.gradients) < 0.05, (method, config)
        for config in CONFIGS:
            assert update_before_thoughts(config, world) == pytest.approx(idle, rel=2e-5), config


@pytest.mark.slow
def test_two_processes_and_every_zero_stage_equal_one_process() -> None:
    together(check_engines, seconds=300)
