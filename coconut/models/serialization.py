"""What a saved model's folder holds, and opening it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.tokenization import SpecialIds
from coconut.methods import REASONING_FILE, Reasoning
from coconut.utils.files import read_json
from coconut.utils.pretrained import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FORMAT_VERSION = 1


def read_record(folder: Path) -> tuple[dict[str, Any], SpecialIds, Reasoning]:
    """What coconut.json holds. Raises FileNotFoundError or ValueError if there is none, or none that can be read."""
    record = folder / REASONING_FILE
    if not record.is_file():
        what = f"holds no {REASONING_FILE}, so it" if folder.is_dir() else "does not exist, so it"
        raise FileNotFoundError(
            f"{folder} {what} is no saved LatentLM. A plain model is wrapped with LatentLM.from_base(model, tokenizer)."
        )
    try:
        values = read_json(record)
        version = int(values["format_version"])
        if version <= FORMAT_VERSION:
            return values, SpecialIds(**values["special"]), Reasoning.from_dict(values["reasoning"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} is damaged ({type(error).__name__}: {error}). Save the model again.") from error
    raise ValueError(
        f"{folder} has format version {version}; this version of coconut reads up to {FORMAT_VERSION}. "
        "Update coconut-latent."
    )


def load_base(folder: Path, attention: str | None) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        base, report = load_pretrained(
            AutoModelForCausalLM, folder, output_loading_info=True, attn_implementation=attention
        )
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} are damaged: {error}") from error
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        problem = {key: sorted(map(str, value)) for key, value in report.items() if value}
        raise ValueError(f"The weights in {folder} do not fit the model that its config describes: {problem}.")
    return base
