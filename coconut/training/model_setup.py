"""Make the model that a run starts from: pretrained, new, or from another run."""

from __future__ import annotations

from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from coconut.config import WORDS, EngineConfig, ModelConfig, Precision, TrainConfig
from coconut.data.examples import Example
from coconut.data.tokenization import build_word_tokenizer
from coconut.methods import Slot
from coconut.models.latent_lm import LatentLM
from coconut.runs.loading import starting_point
from coconut.utils.console import log
from coconut.utils.pretrained import explain_load_errors, load_pretrained


def make_model(config: TrainConfig, examples: list[Example]) -> LatentLM:
    """The model that a new run starts from. Raises ValueError if it cannot be made or loaded."""
    lm, source = _starting_model(config, examples)
    if lm.gates:
        raise ValueError(
            f"{source} mixes what it expects into its words, which only coconut rl trains. Go on with coconut rl, or "
            "start from the model that it began with."
        )
    lora = config.model.lora
    first = config.plan().stages[0]
    if first.in_turn:
        own = lm.feedback.slot
        if own.in_parallel or own.merges:
            how = "merges its thoughts from the chain" if own.merges else "computes its thoughts all at once"
            raise ValueError(
                f"{source} {how} ({own.describe()}), and the modes of {config.method} feed hidden states back, one "
                "after the other. Start from a run with sequential thoughts."
            )
        lm.add_modes([form.mode for form in first.in_turn], config.model.new_token_init)
    lm.add_rates(first.form.slot.max_group, config.model.new_token_init)
    _set_feedback(lm, first.form.slot, config)
    if lm.adapter and lora.rank and lora != lm.adapter.settings:
        raise ValueError(
            f"{source} has LoRA already, {lm.adapter.settings}, and the configuration has {lora}. Leave "
            "model.lora out to go on with its own, or merge it first: "
            "LatentLM.from_pretrained(FOLDER).merged().save_pretrained(OTHER)."
        )
    if lora.rank and not lm.adapter:
        lm.add_lora(lora, source)
    return lm


def _set_feedback(lm: LatentLM, slot: Slot, config: TrainConfig) -> None:
    """Give a model that has no thoughts yet the projector and update of this slot.

    Raises ValueError if it has learned to think otherwise.
    """
    own = lm.feedback.slot

    def rule(of: Slot) -> tuple[Any, ...]:
        whole = {"width": of.width or lm.thought_size, "source": None}
        return tuple((asdict(of) | whole).values())

    if not slot.thinks or rule(slot) == rule(own):
        return
    if config.init and any(form.slot.thinks and form.num_thoughts for form in lm.reasoning.forms()):
        raise ValueError(
            f"init={config.init} has learned to think with {own.describe()}, and {config.method} has "
            f"{slot.describe()}. What differs is set by model.projector, model.projector_width, model.update, "
            "model.iterations, model.group, model.content and its numbers, or curriculum.thoughts_per_step. Or start "
            "from a run without thoughts."
        )
    lm.feedback = lm.new_feedback(slot)
    lm.reasoning = replace(lm.reasoning, slot=slot)


def apply_engine_options(lm: LatentLM, engine: EngineConfig) -> LatentLM:
    """Set the switches of the model's acceleration. Raises ValueError if the model does not support one of them."""
    if engine.cuda_graphs and lm.feedback.slot.in_parallel:
        raise ValueError(
            "engine.cuda_graphs=true records passes with one thought each, and the thoughts of this method are updated "
            "all at once. Set engine.cuda_graphs=false."
        )
    if engine.cuda_graphs and lm.feedback.has_weights:
        raise ValueError(
            "engine.cuda_graphs=true records the model's layers alone, but the projector "
            f"{lm.feedback.slot.projector.value} stands between its passes. Set engine.cuda_graphs=false."
        )
    if engine.cuda_graphs and lm.feedback.slot.weights[1]:
        raise ValueError(
            "engine.cuda_graphs=true records the model's layers alone, but the head makes mixtures of words between "
            "the passes. Set engine.cuda_graphs=false."
        )
    lm.acceleration.mechanisms = engine.mechanisms
    lm.acceleration.activation_checkpointing = engine.activation_checkpointing
    lm.acceleration.cuda_graphs = engine.cuda_graphs
    return lm


def _starting_model(config: TrainConfig, examples: list[Example]) -> tuple[LatentLM, str]:
    """The model before LoRA, and the name or folder of its weights."""
    if config.init:
        path = starting_point(config.init)
        log(f"Model, weights and tokenizer are those of {path}, not those of model.*")
        lm = LatentLM.from_pretrained(path, config.model.attention)
        if not lm.adapter:  # what is trained beside the base stays in float32
            lm.base.to(dtype=_dtype(config))  # pyright: ignore
        return lm, str(path)
    from transformers import AutoConfig, AutoModelForCausalLM

    model = config.model
    if model.base:
        if (Path(model.base) / "adapter_config.json").is_file():
            raise ValueError(
                f"model.base={model.base} holds LoRA weights and no model. Go on with them with init={model.base}, or "
                "merge them first: LatentLM.from_pretrained(FOLDER).merged().save_pretrained(OTHER)."
            )
        with explain_load_errors(model.base, "model.base"):
            base = load_pretrained(
                AutoModelForCausalLM, model.base, dtype=_dtype(config), attn_implementation=model.attention
            )
        return LatentLM.from_base(base, _tokenizer(model, config, examples), init=model.new_token_init), model.base
    tokenizer = _tokenizer(model, config, examples)
    settings = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **model.architecture,
    }
    try:
        architecture = AutoConfig.for_model(settings.pop("model_type"), **settings)
        _refuse_unknown(model.architecture, architecture)
        base = AutoModelForCausalLM.from_config(architecture, attn_implementation=model.attention)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"No model can be made from model.architecture={model.architecture}: {error}") from error
    return LatentLM.from_base(base, tokenizer, init=model.new_token_init), ""


def _dtype(config: TrainConfig) -> torch.dtype:
    """Float32, but bfloat16 for frozen weights under LoRA that are only used in bfloat16."""
    use_bfloat16 = config.model.lora.rank and config.engine.precision is Precision.bfloat16
    return torch.bfloat16 if use_bfloat16 else torch.float32


def _refuse_unknown(settings: dict[str, Any], architecture: Any) -> None:
    """Raise ValueError for keys that the architecture does not have, which transformers would ignore."""
    known = set(type(architecture)().to_dict()) | set(architecture.attribute_map)
    for key in settings:
        if key not in known:
            near = get_close_matches(key, known, n=3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{settings['model_type']} has no {key}{meant}")


def _tokenizer(model: ModelConfig, config: TrainConfig, examples: list[Example]) -> Any:
    from transformers import AutoTokenizer

    name = model.tokenizer or model.base
    if name == WORDS:
        return build_word_tokenizer(examples, config.data.format)
    with explain_load_errors(str(name), "model.tokenizer" if model.tokenizer else "model.base"):
        return load_pretrained(AutoTokenizer, name)
