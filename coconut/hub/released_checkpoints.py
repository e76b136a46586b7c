"""Load checkpoints of the paper's released code as a LatentLM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.methods import Reasoning
from coconut.utils.pretrained import explain_load_errors, load_pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.models.latent_lm import LatentLM

RELEASED_TOKENS = ("<bot>", "<eot>", "<latent>")  # in the order in which the released code adds its own three
WRAPPER_PREFIX = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_causallm\.)+")
DERIVED_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|\.attention\.(masked_)?bias)$")


def from_released(
    file: Path | str, base: str, reasoning: Reasoning, tokenizer: str = "", attention: str | None = None
) -> LatentLM:
    """Load a checkpoint of the code released with arXiv 2412.06769: a state dict, names optionally with a prefix.

    `base`: the model it was trained from, for its config and (without `tokenizer`) its tokenizer; its weights are not
    read. The three added tokens become `<bot>`, `<eot>` and `<latent>`. The file has no inference settings, so
    `reasoning` gives them.

    Raises FileNotFoundError, or ValueError if the file contains anything but tensors or does not match the base.
    """
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from coconut.models.latent_lm import LatentLM

    state = _read_state_dict(Path(file))
    with explain_load_errors(base, "base"):
        config = load_pretrained(AutoConfig, base)
    with explain_load_errors(tokenizer or base, "tokenizer" if tokenizer else "base"):
        tokens = load_pretrained(AutoTokenizer, tokenizer or base)
    rows = _num_embeddings(config, state, file)
    if rows == len(tokens) + len(RELEASED_TOKENS):
        tokens.add_tokens([AddedToken(token, special=True, normalized=False) for token in RELEASED_TOKENS],
                         special_tokens=True)  # fmt: skip
    elif rows < len(tokens) or rows == config.vocab_size:
        if not reasoning.slot.is_empty:
            raise ValueError(
                f"{file} has {rows} embeddings, as many as {base}: it was saved without the markers that "
                f"{reasoning.method} needs. Name its method: cot, no_cot, icot."
            )
    else:
        raise ValueError(
            f"{file} has {rows} embeddings; {base} has {len(tokens)} tokens, and the released code adds 3."
        )
    config.get_text_config(decoder=True).vocab_size = rows
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    _check_names_and_shapes(model.state_dict(), state, f"The weights in {file} are not those of {base}")
    model.load_state_dict(state, strict=False)
    return LatentLM.from_base(model, tokens, reasoning=reasoning)


def _check_names_and_shapes(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Raise ValueError unless `state` has the model's names and shapes; of tied weights one name suffices."""
    held = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name, weight in own.items() if name not in state and weight.data_ptr() not in held]
    others = [name for name in state if name not in own]
    if missing or others:
        raise ValueError(
            f"{what}: {len(missing)} are missing ({', '.join(missing[:3])}), {len(others)} too many "
            f"({', '.join(others[:3])})."
        )
    for name, weight in state.items():
        if weight.shape != own[name].shape:
            raise ValueError(f"{what}: {name} is {tuple(weight.shape)} there and {tuple(own[name].shape)} here.")


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} must contain tensors only; other objects are not loaded: {error}") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} contains no state dict (names to tensors).")
    found = {WRAPPER_PREFIX.sub("", name): value for name, value in state.items() if not DERIVED_BUFFERS.search(name)}
    found.pop("embedding.weight", None)  # the wrapper's second name for the embeddings
    return found


def _num_embeddings(config: Any, state: dict[str, Tensor], file: Path | str) -> int:
    """The number of token embeddings in a state dict. Raises ValueError if it has none of this architecture."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    table = shape.get_input_embeddings().weight
    name = next(name for name, weight in shape.named_parameters() if weight is table)
    if name not in state:
        raise ValueError(f"{file} has no {name}, so its weights are not those of a {config.model_type}.")
    return len(state[name])
