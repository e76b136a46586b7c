"""Load checkpoints of released code as a LatentLM: Coconut, CODI, and SIM-CoT on either (`coconut.hub.releases`).

The names and formats are data; LoRA corrections are merged in `coconut.hub.released_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.hub.released_lora import LoraWeights, count
from coconut.hub.releases import Release, identify
from coconut.methods import Reasoning
from coconut.utils.console import log
from coconut.utils.pretrained import explain_load_errors, load_pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.models.latent_lm import LatentLM


def from_released(
    file: Path | str, base: str, reasoning: Reasoning, tokenizer: str = "", attention: str | None = None,
    lora_alpha: float | None = None,
) -> LatentLM:  # fmt: skip
    """Load a checkpoint of released code: a file, or a folder, that holds the state dict of its wrapper.

    `base`: the model it was trained from, for its config and (without `tokenizer`) its tokenizer; its weights are not
    read. The file has no settings of inference, so `reasoning` gives them (`coconut.hub.releases.released_reasoning`);
    of a projector the width is the file's. LoRA corrections are merged into the weights: W + scale * B A. The scale
    follows from peft's adapter_config.json beside the file, or from `lora_alpha`. The embeddings of the three added
    tokens are the file's. Weights are in float32, in float64 if the file has such. A step decoder is left out, as it is
    in exports, and a line of the log says so.

    Raises FileNotFoundError, or ValueError if the file contains anything but tensors, if it does not match the base,
    the method or `lora_alpha`, or if the scale of its LoRA is not known.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from coconut.hub.state_dicts import read_weights
    from coconut.models.latent_lm import LatentLM

    place = Path(file)
    weights = read_weights(place)
    release = identify(weights)
    if reasoning.method not in release.methods:
        raise ValueError(
            f"{place} has the names of {release.title}, which does not train {reasoning.method}. Set "
            f"method={' or '.join(release.methods)}."
        )
    parts = _Parts.of(weights, release)
    parts.log_left_out(place)
    with explain_load_errors(base, "base"):
        config = load_pretrained(AutoConfig, base)
    with explain_load_errors(tokenizer or base, "tokenizer" if tokenizer else "base"):
        tokens = load_pretrained(AutoTokenizer, tokenizer or base)
    rows = _num_embeddings(config, parts.model.weights, place)
    _name_last_rows(tokens, release, rows, config.get_text_config(decoder=True).vocab_size, reasoning, place, base)
    config.get_text_config(decoder=True).vocab_size = rows
    dtype = torch.float32
    for weight in weights.values():
        if weight.is_floating_point():
            dtype = torch.promote_types(dtype, weight.dtype)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    advice = (
        f"Its names are those of {release.title}. Name the model that it was trained from, base=NAME, and compare the "
        "file with the published one."
    )
    parts.lora.merge_into(parts.model.weights, model, place, lora_alpha, advice)
    parts.model.load_into(model, place, advice)
    slot = reasoning.slot
    if release.projector and (hidden := parts.projector.weights.get("0.weight")) is not None:
        slot = replace(slot, width=len(hidden))
    lm = LatentLM.from_base(model, tokens, reasoning=replace(reasoning, slot=slot))
    lm.feedback.to(dtype)
    parts.projector.load_into(lm.feedback.projector, place, advice)
    return lm


@dataclass
class _Part:
    """Weights by their names in a module of ours. `prefixes`: of names in the file, by those of ours that they replace.

    `names`: the file's own name of each weight.
    """

    prefixes: dict[str, str]
    weights: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, weight: Tensor, in_file: str) -> None:
        self.weights[name], self.names[name] = weight, in_file

    def in_file(self, name: str) -> str:
        """The file's name of a weight, also of one that it lacks."""
        ours = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        return self.names.get(name, self.prefixes.get(ours, "") + name.removeprefix(ours))

    def load_into(self, module: Any, place: Path, advice: str) -> None:
        """Load exactly the weights of a module; of tied ones a single name suffices.

        Raises ValueError unless names and shapes are the module's and tied weights are equal.
        """
        import torch

        own, held = module.state_dict(), dict[int, str]()
        wrong: list[str] = []
        for name, weight in self.weights.items():
            if name not in own:
                continue
            first = held.setdefault(own[name].data_ptr(), name)
            if weight.shape != own[name].shape:
                shapes = f"{tuple(weight.shape)} there and {tuple(own[name].shape)} here"
                wrong.append(f"{self.in_file(name)} is {shapes}")
            elif not torch.equal(self.weights[first], weight):
                wrong.append(f"{self.in_file(first)} and {self.in_file(name)} differ, which are one weight here")
        missing = [name for name, weight in own.items() if name not in self.weights and weight.data_ptr() not in held]
        others = [name for name in self.weights if name not in own]
        counts = [count(map(self.in_file, missing), "missing"), count(map(self.in_file, others), "too many")]
        wrong = [*counts, *wrong[:3]]
        if any(wrong):
            raise ValueError(f"The weights in {place} do not fit: {', '.join(filter(None, wrong))}. {advice}")
        module.load_state_dict(self.weights, strict=False)


@dataclass
class _Parts:
    """The weights of a file. `left_out`: the names of those that are not loaded, by what they are."""

    model: _Part
    projector: _Part
    lora: LoraWeights
    left_out: dict[str, list[str]]

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], release: Release) -> _Parts:
        found = [match.group() for name in weights if (match := release.model.match(name))]
        prefix = max(found, key=len, default="")
        model, lora = _Part({"": prefix}), LoraWeights(prefix)
        projector = _Part({ours: theirs for theirs, ours in release.projector.items()})
        left_out: dict[str, list[str]] = {}
        for name, weight in weights.items():
            left = next((start for start in release.left_out if name.startswith(start)), None)
            theirs = next((start for start in release.projector if name.startswith(start)), None)
            if left is not None:
                left_out.setdefault(release.left_out[left], []).append(name)
            elif theirs is not None:
                projector.add(release.projector[theirs] + name.removeprefix(theirs), weight, name)
            elif not name.startswith(prefix):
                model.add(f"/{name}", weight, name)  # no weight of ours has such a name, so it is refused
            elif not lora.takes(own := name.removeprefix(prefix), weight):
                model.add(lora.plain_name(own), weight, name)
        return cls(model, projector, lora, left_out)

    def log_left_out(self, place: Path) -> None:
        for what, names in self.left_out.items():
            if what:
                log(f"{place}: {what} is left out, which inference does not use: {names[0]} and {len(names) - 1} more.")


def _name_last_rows(
    tokens: Any, release: Release, rows: int, of_base: int, reasoning: Reasoning, place: Path, base: str
) -> None:
    """Give the tokenizer the release's tokens, whose embeddings are the last of `rows`.

    Raises ValueError if they would have other ids there, or if the rows are missing and the method needs them.
    """
    from coconut.data.tokenization import add_as_special, token_ids

    before, known = len(tokens), set(tokens.get_vocab())
    if rows == before + sum(token not in known for token in release.tokens):
        add_as_special(tokens, release.tokens)
        places = list(range(rows - len(release.tokens), rows))
        if token_ids(tokens, release.tokens) != places:
            raise ValueError(
                f"{base} has {' or '.join(token for token in release.tokens if token in known)} already, and the "
                f"released code added {', '.join(release.tokens)} as its last tokens. Name the tokenizer of the model "
                "before that training, tokenizer=NAME."
            )
        if tokens.pad_token is None and "[PAD]" in release.tokens:
            tokens.pad_token = "[PAD]"
    elif release.known_by or not (rows < before or rows == of_base):
        raise ValueError(
            f"{place} has {rows} embeddings; {base} has {before} tokens, and the released code adds "
            f"{len(release.tokens)}. Name the model that it was trained from, base=NAME."
        )
    elif not reasoning.slot.is_empty:
        raise ValueError(
            f"{place} has {rows} embeddings, as many as {base}: it was saved without the markers that "
            f"{reasoning.method} needs. Name its method: cot, no_cot, icot."
        )


def _num_embeddings(config: Any, state: Mapping[str, Tensor], place: Path) -> int:
    """V of a state dict. Raises ValueError if it has no embeddings, or tied head, of this architecture."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    table = shape.get_input_embeddings().weight
    names = [name for name, weight in shape.named_parameters(remove_duplicate=False) if weight is table]
    for name in names:
        if name in state:
            return len(state[name])
    raise ValueError(f"{place} has no {names[0]}, so its weights are not those of a {config.model_type}.")
