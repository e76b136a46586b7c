"""LoRA: train a low-rank correction of a pretrained model, and the embeddings of the added tokens.

peft puts its layers into the base model in place, which stays a transformers model. The rows of the added tokens are
separate modules beside the frozen tables: no gradient is as large as a table, and ZeRO 3, which gathers a module's own
weights, gathers them.

The correction is saved in peft's format, the rows in a file of their own. The `Adapter` records where the base model
lies, and a fingerprint of it.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut.config import LoraConfig
from coconut.utils.pretrained import load_pretrained

ROWS_FILE = "added_rows.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in peft's files
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Adapter:
    """What is saved of a LoRA model besides its weights. `base`: a name on the hub or an absolute folder."""

    base: str
    settings: LoraConfig
    dtype: str
    fingerprint: str

    @classmethod
    def of(cls, base: PreTrainedModel, place: str, settings: LoraConfig) -> Adapter:
        place = str(Path(place).resolve()) if Path(place).is_dir() else place
        return cls(place, settings, str(base.dtype).removeprefix("torch."), fingerprint(base))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Adapter:
        return cls(**{**values, "settings": LoraConfig(**values["settings"])})

    def open_base(self, place: str | None, attention: str | None) -> PreTrainedModel:
        """Load the model that the adapter was trained on, from `place` if it has moved.

        Raises ValueError if it is missing or is another model.
        """
        from transformers import AutoModelForCausalLM

        place = place or self.base
        moved = f"If it has moved: ln -s PLACE {place}, or in Python LatentLM.from_pretrained(FOLDER, base=PLACE)."
        try:
            base = load_pretrained(
                AutoModelForCausalLM, place, dtype=getattr(torch, self.dtype), attn_implementation=attention
            )
        except (OSError, ValueError) as error:
            missing = Path(place).is_absolute() and not Path(place).exists()
            reason = "there is no such folder" if missing else str(error).strip().splitlines()[0]
            raise ValueError(
                f"The LoRA weights need the model {place}, which cannot be opened: {reason}\n{moved}"
            ) from None
        if fingerprint(base) != self.fingerprint:
            raise ValueError(f"The model {place} is not the one that the LoRA weights were trained on. {moved}")
        return base


def fingerprint(base: PreTrainedModel) -> str:
    """SHA-256 of the name, the shape and 16 bfloat16 values of every weight, without the embedding table and the head.

    Training changes it; another precision and added tokens do not.
    """
    tables = {id(table.weight) for table in _tables(base)}
    digest = hashlib.sha256()
    for name, weight in sorted(base.named_parameters()):
        if id(weight) not in tables:
            values = weight.detach().flatten()[:: -(-weight.numel() // 16)]
            digest.update(f"{name} {tuple(weight.shape)} {values.bfloat16().tolist()}\n".encode())
    return digest.hexdigest()


def attach(base: PreTrainedModel, added: list[int], settings: LoraConfig, place: str) -> None:
    """Freeze the model from `place`; add a correction, zero at first, and trained rows for the tokens `added`.

    Raises ValueError if peft is missing, or if a target is no linear layer of the model.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("LoRA needs peft. Install it: pip install peft") from None

    targets = find_targets(base, settings.targets)
    transposed = any(isinstance(base.get_submodule(name), Conv1D) for name in targets)
    correction = PeftConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        base_model_name_or_path=place,
    )
    # peft's own function: transformers' add_adapter requires a version of peft that may not be published
    inject_adapter_in_model(correction, base)
    table, head = _tables(base)
    ids = torch.tensor(added, device=table.weight.device)
    dtype = torch.promote_types(table.weight.dtype, torch.float32)  # trained weights have at least float32
    for weight in base.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    new_table = AddedEmbedding(table, nn.Embedding(len(added), table.weight.shape[1]), ids)
    new_head = AddedHead(head, nn.Linear(table.weight.shape[1], len(added), bias=_has_bias(head)), ids)
    for module in (new_table, new_head):
        module.added.to(table.weight.device, dtype)
        module.copy_rows_from_table()
        module.added.requires_grad_(settings.train_tokens)
    if head.weight is table.weight:
        new_head.added.weight = new_table.added.weight
    base.set_input_embeddings(new_table)
    base.set_output_embeddings(new_head)


def find_targets(base: PreTrainedModel, names: list[str]) -> list[str]:
    """The full names of the linear layers whose names end like this; without `names` all of them but the head."""
    head = base.get_output_embeddings()
    linear = [name for name, module in base.named_modules() if isinstance(module, LINEAR) and module is not head]
    found: set[str] = set()
    for end in names:
        if not (matching := {name for name in linear if f".{name}".endswith(f".{end}")}):
            existing = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(
                f"model.lora.targets names {end}, and this model ({base.config.model_type}) has no such linear layer. "
                f"There are: {', '.join(existing)}. Leave model.lora.targets out to correct all of them."
            )
        found |= matching
    return sorted(found) if names else linear


def save(base: PreTrainedModel, folder: Path | str) -> None:
    """Write what `attach` added: the correction in peft's format, and the rows."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    base.peft_config["default"].save_pretrained(str(folder))
    weights = {f"{PREFIX}{name}": weight.contiguous() for name, weight in _correction(base).items()}
    save_file(weights, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    embedding, head = _tables(base)
    sides = {"input": embedding.added, "output": head.added}
    rows = {f"{side}.{name}": w.detach() for side, added in sides.items() for name, w in added.named_parameters()}
    if head.added.weight is embedding.added.weight:
        del rows["output.weight"]
    save_file(rows, Path(folder) / ROWS_FILE)


def load(base: PreTrainedModel, folder: Path | str) -> None:
    """Load the weights that `save` wrote into what `attach` added. Raises ValueError if they do not fit."""
    from peft import set_peft_model_state_dict

    weights = {name.removeprefix(PREFIX): w for name, w in load_file(Path(folder) / ADAPTER_FILE).items()}
    if odd := sorted(_correction(base).keys() ^ weights.keys()):
        raise ValueError(f"The LoRA weights in {folder} do not fit the model: {', '.join(odd[:4])}.")
    set_peft_model_state_dict(base, weights)
    embedding, head = _tables(base)
    rows = load_file(Path(folder) / ROWS_FILE)
    with torch.no_grad():
        for name, values in rows.items():
            side, parameter = name.split(".")
            (embedding if side == "input" else head).added.get_parameter(parameter).copy_(values)


def _correction(base: PreTrainedModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(base, save_embedding_layers=False)


def merged(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with the correction and the rows in its own weights, and without LoRA layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = deepcopy(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
            model.set_submodule(name, module.get_base_layer())
    embedding, head = _tables(model)
    for module in (embedding, head):
        module.copy_rows_to_table()
    model.set_input_embeddings(embedding.whole)
    model.set_output_embeddings(head.whole)
    del model.peft_config
    return model.requires_grad_(True)


class _Added(nn.Module):
    """A frozen table, `whole`, in which trained rows, `added`, replace those of the tokens `ids`."""

    ids: Tensor

    def __init__(self, whole: nn.Module, added: nn.Module, ids: Tensor):
        super().__init__()
        self.whole, self.added = whole, added
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table with the trained rows. A copy: writing to it has no effect."""
        whole, added = self.whole.get_parameter("weight"), self.added.get_parameter("weight")
        return whole.index_copy(0, self.ids, added.to(whole.dtype))

    @torch.no_grad()
    def copy_rows_from_table(self) -> None:
        for name, weight in self.added.named_parameters():
            weight.copy_(self.whole.get_parameter(name)[self.ids])

    @torch.no_grad()
    def copy_rows_to_table(self) -> None:
        for name, weight in self.added.named_parameters():
            whole = self.whole.get_parameter(name)
            whole[self.ids] = weight.to(whole.dtype)


class AddedEmbedding(_Added):
    @property
    def num_embeddings(self) -> int:
        return self.whole.num_embeddings  # pyright: ignore

    @property
    def embedding_dim(self) -> int:
        return self.whole.embedding_dim  # pyright: ignore

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., D) embeddings, scaled where the model scales them (Gemma)."""
        embeds = self.whole(input_ids)
        match = input_ids[..., None] == self.ids
        rows = self.added(match.long().argmax(-1)).to(embeds.dtype)
        if (scale := getattr(self.whole, "embed_scale", None)) is not None:
            rows = rows * torch.as_tensor(scale).to(rows)
        return torch.where(match.any(-1, keepdim=True), rows, embeds)


class AddedHead(_Added):
    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) hidden states to (..., V) logits."""
        logits = self.whole(hidden_states)
        rows = self.added(hidden_states.to(self.added.weight.dtype))  # pyright: ignore
        logits[..., self.ids] = rows.to(logits.dtype)
        return logits


def _tables(base: PreTrainedModel) -> tuple[Any, Any]:
    return base.get_input_embeddings(), base.get_output_embeddings()


def _has_bias(head: Any) -> bool:
    return getattr(head, "bias", None) is not None
