"""Open checkpoints of the released Coconut code as a LatentLM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.methods import Reasoning, Slot
from coconut.utils.pretrained import explain_load_errors, load_pretrained

if TYPE_CHECKING:
    from torch import Tensor

    from coconut.models.latent_lm import LatentLM

RELEASED_TOKENS = ("<bot>", "<eot>", "<latent>")  # in the order in which the released code adds its own three
WRAPPED_IN = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_causallm\.)+")
DERIVED = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq|\.attention\.(masked_)?bias)$")


# --- the released code's checkpoints ----------------------------------------------------------------


def from_released(
    file: Path | str, base: str, reasoning: Reasoning, tokenizer: str = "", attention: str | None = None
) -> LatentLM:
    """A checkpoint that the code released with arXiv 2412.06769 wrote: a state dict, its names perhaps with a prefix.

    `base` names the model that it was trained from, for its config and (if `tokenizer` is not given) its tokenizer;
    its weights are not read. The three added tokens become `<bot>`, `<eot>` and `<latent>`. The file does not say how
    the model is to be asked: that is `reasoning`.

    Raises FileNotFoundError, or ValueError if the file holds anything but tensors or does not fit the base.
    """
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from coconut.models.latent_lm import LatentLM

    state = _tensors(Path(file))
    with explain_load_errors(base, "base"):
        config = load_pretrained(AutoConfig, base)
    with explain_load_errors(tokenizer or base, "tokenizer" if tokenizer else "base"):
        words = load_pretrained(AutoTokenizer, tokenizer or base)
    rows = _rows_of_table(config, state, file)
    if rows == len(words) + len(RELEASED_TOKENS):
        words.add_tokens([AddedToken(token, special=True, normalized=False) for token in RELEASED_TOKENS],
                         special_tokens=True)  # fmt: skip
    elif rows < len(words) or rows == config.vocab_size:
        if reasoning.slot is not Slot.none:
            raise ValueError(
                f"{file} has {rows} embeddings, as many as {base}: it was saved without the markers that "
                f"{reasoning.method} needs. Name its method: cot, no_cot, icot."
            )
    else:
        raise ValueError(f"{file} has {rows} embeddings; {base} has {len(words)} tokens, and the released code adds 3.")
    config.get_text_config(decoder=True).vocab_size = rows
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    _refuse_others(model.state_dict(), state, f"The weights in {file} are not those of {base}")
    model.load_state_dict(state, strict=False)
    return LatentLM.from_base(model, words, reasoning=reasoning)


def _refuse_others(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Raises ValueError unless all that a model has is there, and nothing else; tied weights may be there once."""
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


def _tensors(file: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is no file of tensors alone, and nothing else is read: {error}") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict (names to tensors).")
    found = {WRAPPED_IN.sub("", name): value for name, value in state.items() if not DERIVED.search(name)}
    found.pop("embedding.weight", None)  # the wrapper's second name for the table
    return found


def _rows_of_table(config: Any, state: dict[str, Tensor], file: Path | str) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    table = shape.get_input_embeddings().weight
    name = next(name for name, weight in shape.named_parameters() if weight is table)
    if name not in state:
        raise ValueError(f"{file} has no {name}, so its weights are not those of a {config.model_type}.")
    return len(state[name])


# --- the command ------------------------------------------------------------------------------------
