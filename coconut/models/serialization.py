"""Write a LatentLM to a folder and read its parts back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.tokenization import ADDED_TOKENS, SpecialIds, rate_tokens, token_ids
from coconut.methods import REASONING_FILE, Reasoning, Slot, parse_mode
from coconut.models import gates, lora
from coconut.models.families import thought_size
from coconut.models.feedback import Feedback
from coconut.models.gates import Gates
from coconut.models.lora import Adapter
from coconut.models.module_files import load_module, save_module
from coconut.models.token_embeddings import resize_tables
from coconut.utils.files import apply_umask, read_json, write_json
from coconut.utils.pretrained import load_pretrained, resolve_local_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


FORMAT_VERSION = 5
# 2 knows sequential thoughts alone, 3 no iterations for each step, 4 neither gates nor mixtures nor merged thoughts
READABLE = (2, 3, 4, 5)


@dataclass
class SavedParts:
    """What a LatentLM consists of. With an adapter, `base` has its weights, in LoRA layers."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    special: SpecialIds
    reasoning: Reasoning
    new_tokens: dict[str, Any]
    feedback: Feedback
    adapter: Adapter | None = None
    gates: Gates | None = None


def save_parts(parts: SavedParts, folder: Path | str, max_shard_size: str) -> None:
    """Write the weights (of a LoRA model only what is trained), the tokenizer, and the record of the rest."""
    if parts.adapter:
        lora.save(parts.base, folder)
    else:
        parts.base.save_pretrained(folder, max_shard_size=max_shard_size)
    parts.feedback.save(folder)
    if parts.gates:
        save_module(parts.gates, Path(folder) / gates.WEIGHTS_FILE)
    for file in Path(folder).glob("*.safetensors"):  # safetensors makes them readable for their owner alone
        apply_umask(file)
    parts.tokenizer.save_pretrained(folder)
    record = {
        "format_version": FORMAT_VERSION,
        "reasoning": parts.reasoning.as_dict(),
        "new_tokens": parts.new_tokens,
        "special": asdict(parts.special),
        "feedback": asdict(parts.feedback.slot),
        "lora": asdict(parts.adapter) if parts.adapter else None,
    }
    write_json(Path(folder) / REASONING_FILE, record)


def load_parts(place: Path | str, attention: str | None, moved_base: str | None) -> SavedParts:
    """Read what `save_parts` wrote into a folder, or into OWNER/NAME on the hub.

    `moved_base`: where the model that LoRA corrects lies, if not where it lay at first. Raises FileNotFoundError or
    ValueError if the folder is no such model.
    """
    from transformers import AutoTokenizer

    folder = resolve_local_path(place)
    record, special, reasoning = _read_record(folder)
    tokenizer = load_pretrained(AutoTokenizer, folder)
    tokens = [*ADDED_TOKENS, *(parse_mode(name).token for name in special.control), *rate_tokens(len(special.rates))]
    if token_ids(tokenizer, tokens) != special.added:
        raise ValueError(f"The tokenizer in {folder} is not the one that the model was saved with.")
    if not record.get("lora"):
        base = _load_base(folder, attention)
        feedback = _load_feedback(folder, Slot.from_dict(record["feedback"]), base)
        own_gates = _load_gates(folder, reasoning, base)
        return SavedParts(base, tokenizer, special, reasoning, record["new_tokens"], feedback, gates=own_gates)
    saved = Adapter.from_dict(record["lora"])
    base = saved.open_base(moved_base, attention)
    resize_tables(base, len(tokenizer))
    adapter = Adapter.of(base, moved_base or saved.base, saved.settings)
    lora.attach(base, special.added, adapter.settings, adapter.base)
    lora.load(base, folder)
    feedback = _load_feedback(folder, Slot.from_dict(record["feedback"]), base)
    own_gates = _load_gates(folder, reasoning, base)
    return SavedParts(base, tokenizer, special, reasoning, record["new_tokens"], feedback, adapter, own_gates)


def _load_feedback(folder: Path, slot: Slot, base: PreTrainedModel) -> Feedback:
    feedback = Feedback(slot, thought_size(base)).to(base.device)
    feedback.load(folder)
    return feedback


def _load_gates(folder: Path, reasoning: Reasoning, base: PreTrainedModel) -> Gates | None:
    if not reasoning.gated:
        return None
    loaded = Gates(thought_size(base)).to(base.device)
    load_module(loaded, folder / gates.WEIGHTS_FILE, "the weights of the gates of its words")
    return loaded


def _read_record(folder: Path) -> tuple[dict[str, Any], SpecialIds, Reasoning]:
    """What coconut.json holds. Raises FileNotFoundError if it is missing, ValueError if it cannot be read."""
    record = folder / REASONING_FILE
    if not record.is_file():
        what = f"holds no {REASONING_FILE}, so it" if folder.is_dir() else "does not exist, so it"
        raise FileNotFoundError(
            f"{folder} {what} is no saved LatentLM. A plain model is wrapped with LatentLM.from_base(model, tokenizer)."
        )
    try:
        values = read_json(record)
        version = int(values["format_version"])
        if version in READABLE:
            return values, SpecialIds(**values["special"]), Reasoning.from_dict(values["reasoning"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} is damaged ({type(error).__name__}: {error}). Save the model again.") from error
    advice = "Update coconut-latent." if version > FORMAT_VERSION else "Export the model again from its run."
    raise ValueError(f"{folder} has format version {version}; this version of coconut reads {READABLE}. {advice}")


def _load_base(folder: Path, attention: str | None) -> PreTrainedModel:
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
